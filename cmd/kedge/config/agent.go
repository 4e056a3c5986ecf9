package config

// LoadAgent reads the file of 'kedge agent', DefaultAgent is what holds where it says nothing. docs/agent-configuration.md is generated from the comments in this file.

// Agent is everything that can be configured of 'kedge agent'.
type Agent struct {
	// Required. Address and port of the CA, such as ca.example.org:15012. The name must be among the CA's csr.serverNames.
	Server string `yaml:"server"`
	// Required. PEM file with the roots that the CA's server must prove itself under: the CA's root-cert.pem. It is read again for every connection. When a certificate of it is in the
	// trust bundle, it is the CA's own, and roots that come to the trust bundle later count without a new file.
	RootFile string `yaml:"rootFile" kind:"path"`
	// The type of the keys, which are made on this machine and never leave it: P-256, P-384 or RSA-2048.
	KeyType string `yaml:"keyType"`
	// How long an SVID shall be valid. The CA may grant less. It is renewed at half of its life. 0s: the CA's default.
	TTL Duration `yaml:"ttl"`
	// Folder (0700) in memory, on a tmpfs or ramfs, in which keys, SVIDs and trust bundles are kept, so that a restart of the agent needs no new ones. A folder on a disk, or of another agent that runs, is refused.
	// "": nowhere, so that a restart has every SVID issued anew.
	State string `yaml:"state" kind:"path"`
	// For how long a program that went away counts as one that holds the trust bundle it had, since it may come back; and how long after its start the agent tells the CA of none,
	// since programs may hold one of before.
	ConsumerGrace Duration `yaml:"consumerGrace"`
	// Health and metrics, over plain HTTP.
	Operations AgentOperations `yaml:"operations"`
	// The log goes to standard error.
	Log Log `yaml:"log"`
	// Required. The workloads beside which the agent runs, each with an identity of its own.
	Workloads []AgentWorkload `yaml:"workloads"`
}

// AgentOperations is health and metrics of the agent.
type AgentOperations struct {
	// Address and port of /healthz, /readyz and /metrics. There is no authentication: give it an address that only monitoring reaches. "": there are none.
	Listen string `yaml:"listen"`
}

// AgentWorkload is one identity.
type AgentWorkload struct {
	// What logs, metrics and the file in the state folder call it: a-z, 0-9 and "-". Each has another one.
	Name string `yaml:"name"`
	// File with the token that says whose the identity is: a service account token, or a join token. It is read again for every call, and shown when it is another than before; until
	// then the SVID itself proves its holder. Either this or clientCertificate.
	TokenFile string `yaml:"tokenFile" kind:"path"`
	// Folder with cert-chain.pem and key.pem of a client certificate that says whose the identity is. It is read again for every call, as tokenFile is. Whoever writes it exchanges
	// both at one instant, as 'kedge svid fetch' does.
	ClientCertificate string `yaml:"clientCertificate" kind:"path"`
	// Unix sockets, each with both SDS and the SPIFFE Workload API.
	Sockets []AgentSocket `yaml:"sockets"`
	// The SVID as PEM files, for programs that read files.
	Files AgentFiles `yaml:"files"`
}

// AgentSocket is a unix socket.
type AgentSocket struct {
	// Required. Its path, of at most 107 octets. A missing folder is made: 0700, or so that those may enter who may use the socket; those above it 0711. Whoever may use the socket has the
	// workload's identity. A socket that nobody serves is replaced; one that somebody serves is refused.
	Path string `yaml:"path" kind:"path"`
	// Who may use it, in quotes: "0600" is the agent's user alone, "0660" its group too, "0666" everybody who gets to the folder.
	Mode string `yaml:"mode"`
	// Name or number of the group that it belongs to. "": the agent's own.
	Group string `yaml:"group"`
	// How many connections it may have at once. More are refused.
	MaxConnections int `yaml:"maxConnections"`
}

// AgentFiles is the SVID as files.
type AgentFiles struct {
	// Folder for cert-chain.pem, key.pem and root-cert.pem, which change at one instant. Made if need be. "": no files are written.
	Dir string `yaml:"dir" kind:"path"`
	// Who may read them, in quotes: "0600" is the agent's user alone, "0640" their group too.
	Mode string `yaml:"mode"`
	// Name or number of the group that they belong to. "": the agent's own.
	Group string `yaml:"group"`
	// After which time programs have read new files. So long after a new trust bundle was written the agent tells the CA that they hold it. Programs that read
	// files at their start only are restarted within it.
	RereadAfter Duration `yaml:"rereadAfter"`
}
