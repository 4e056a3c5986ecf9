// Package config is the one file that Kedge is configured by.
//
// The file is YAML, at most 1 MiB, and read strictly: an unknown key is an error that names the nearest valid one, and so is a
// key that stands there twice, a value of the wrong type, or a second document. Whatever the file leaves out has the default that stands
// below, so an empty file and no file are the same. A section without contents is as good as left out; a key with nothing
// behind it is an error, since it does not say what was meant. A list replaces its default as a whole: "[]" is no entry at all.
//
// Durations are written like "24h", "90m", "7d" or "1h30m"; a day, d, has 24 hours. They are never negative and at most 100 years.
//
// Relative paths begin at the folder of the file; with no file, at the working folder. Secrets never stand in the file, only the
// paths of the files that hold them.
//
// Files that are named must be there, and be right, when Kedge starts: otherwise it refuses to, before it makes anything. Four may come later, as a
// volume that is mounted then, since they are looked at again and again: jwksFile, bearerTokenFile, the folder archiveDir and the folder of highWaterFile.
//
// "kedge config check" says everything that is wrong with a file and with the files that it names, and "kedge config print" shows what holds, defaults filled in.
package config

// Load reads a file, Default is what holds without one, Validate judges either, and Print shows it. docs/configuration.md is
// generated from the comments in this file by gendocs.

//go:generate go run ./gendocs

// Config is everything that can be configured.
type Config struct {
	// The SPIFFE trust domain whose SVIDs are issued: the name alone, without "spiffe://". It stands in every certificate, so a
	// change needs a new data folder.
	TrustDomain string `yaml:"trustDomain"`
	// The folder (0700) for the ledger, keys and the admin socket. Made when it is not there. One process at a time uses it. Losing it loses the
	// record of what was issued; back it up.
	DataDir string `yaml:"dataDir" kind:"path"`
	// The door of the Istio CSR API: where istio-agents and ztunnels send their CSRs.
	CSR CSR `yaml:"csr"`
	// Envoy's SDS, on the same port.
	SDS SDS `yaml:"sds"`
	// Health and metrics, over plain HTTP.
	Operations Operations `yaml:"operations"`
	// The log goes to standard error.
	Log Log `yaml:"log"`
	// OpenTelemetry traces.
	Tracing Tracing `yaml:"tracing"`
	// Where the root of trust comes from.
	Root Root `yaml:"root"`
	// The issuing CA, which signs workload certificates and is certified by the root. It is renewed at half of its lifetime. With root.kind cacerts there is
	// none to make: the one that comes with the root signs.
	IssuingCA IssuingCA `yaml:"issuingCA"`
	// The HashiCorp Vault or OpenBao server that root.kind or issuingCA.keyStore "vault" asks.
	Vault Vault `yaml:"vault"`
	// How tokens (HSMs) are spoken to that root.kind or issuingCA.keyStore "pkcs11" names.
	PKCS11 PKCS11 `yaml:"pkcs11"`
	// Signing profiles, by the name that a caller gives as CertSigner. A caller who gives none gets the one named "default", which is always there.
	Profiles map[string]Profile `yaml:"profiles"`
	// A cfssl signing configuration (JSON) whose profiles are added to those above. A name that stands in both is an error. A profile
	// that lets the CSR decide anything, or is not a leaf's, is refused. "": none.
	CFSSLProfilesFile string `yaml:"cfsslProfilesFile" kind:"path"`
	// Who may ask, and how they prove who they are. The identity in a certificate comes from here, never from the CSR.
	Callers Callers `yaml:"callers"`
	// The record of every certificate that was issued.
	Ledger Ledger `yaml:"ledger"`
}

// CSR is the door of the Istio CSR API.
type CSR struct {
	// Address and port of the gRPC server. Only TLS 1.2 and 1.3 are spoken. Port 0 takes any free one.
	Listen string `yaml:"listen"`
	// DNS names and IP addresses in the server's own certificate. Clients check the one that they dialled; an istio-agent whose CA address
	// contains "localhost" checks istiod.istio-system.svc instead. A name that is missing here fails the handshake.
	ServerNames []string `yaml:"serverNames"`
	// How long the server's own certificate lives; it is renewed at half of that, without a restart. At most a third of issuingCA.lifetime.
	ServerCertificateTTL Duration `yaml:"serverCertificateTTL"`
	// How long a call may take once it has its turn. istio-agents set no deadline of their own and wait for as long as the server lets them.
	CallTimeout Duration `yaml:"callTimeout"`
	// How long a call may wait for its turn while very many call at once. Waiting costs next to nothing; an agent that is refused comes back
	// with a new handshake, which costs several times as much as its call.
	WaitTimeout Duration `yaml:"waitTimeout"`
	// How many connections there may be at once. One peer (an IPv4 address, or the /64 of an IPv6 one) may have as many as are still free; beyond the
	// limit a new one takes the place of one that is idle. 0: as many as the process may open files (RLIMIT_NOFILE), less 256 for everything else;
	// there are never more.
	MaxConnections int `yaml:"maxConnections"`
	// How long a client may keep the server waiting for what it has begun to send: a TLS handshake, in all, and each request, from its header on. Then
	// its connection is ended.
	SlowClientTimeout Duration `yaml:"slowClientTimeout"`
	// After this long a connection is ended in good order, so that clients spread over replicas. 0: never.
	MaxConnectionAge Duration `yaml:"maxConnectionAge"`
	// How long calls that are under way may still take on a connection that ends. At least waitTimeout and callTimeout together.
	MaxConnectionAgeGrace Duration `yaml:"maxConnectionAgeGrace"`
	// Clients that ping more often than this are cut off. istio-agents ping every 30s, and never more often than every 10s.
	KeepaliveMinTime Duration `yaml:"keepaliveMinTime"`
	// After this long without traffic the server pings a client, to find out that it is gone. At least 10s.
	KeepaliveTime Duration `yaml:"keepaliveTime"`
	// How long the server waits for the answer to its ping before it closes the connection.
	KeepaliveTimeout Duration `yaml:"keepaliveTimeout"`
	// Whether gRPC reflection answers, so that tools like grpcurl find the methods.
	Reflection bool `yaml:"reflection"`
}

// SDS is what Envoys get by the Secret Discovery Service.
type SDS struct {
	// Whether an Envoy that asks for its SVID gets one, with a private key that the CA makes for its stream and sends along. false: a key never travels, and only
	// trust bundles are served; 'kedge agent' beside the workload makes the key there.
	PrivateKeys bool `yaml:"privateKeys"`
}

// Operations is health and metrics.
type Operations struct {
	// Address and port of /healthz, /readyz and /metrics. There is no authentication: give it an address that only monitoring reaches.
	Listen string `yaml:"listen"`
}

// Log is what is logged, and how.
type Log struct {
	// The least important level that is logged: debug, info, warn or error. It can be changed while Kedge runs.
	Level string `yaml:"level"`
	// json for machines, text for people.
	Format string `yaml:"format"`
}

// Tracing is where traces go.
type Tracing struct {
	// Host and port of an OTLP gRPC receiver, like "otel-collector.observability.svc:4317". "": no traces.
	Endpoint string `yaml:"endpoint"`
	// Whether traces travel without TLS. They name SPIFFE IDs and addresses.
	Insecure bool `yaml:"insecure"`
	// PEM file with the CA certificates that the receiver's certificate is checked with. "": those of the system.
	CAFile string `yaml:"caFile" kind:"path"`
	// Which part of the calls is traced, from 0 to 1. A caller that traces already decides for itself.
	SampleRatio float64 `yaml:"sampleRatio"`
}

// Root is where the root of trust comes from.
type Root struct {
	// file: a root of Kedge's own, in files, made on first start. cacerts: the CA that istiod was given, mounted from the same Secret. vault: the PKI engine of a
	// Vault or OpenBao server. pkcs11: a key in a token (HSM), with its certificate in a file.
	Kind string `yaml:"kind"`
	// A root in files. It is made on first start, when its folder is empty.
	File RootFile `yaml:"file"`
	// The CA of Istio's cacerts Secret, or of any Secret with tls.crt, tls.key and ca.crt.
	CACerts RootCACerts `yaml:"cacerts"`
	// A root in Vault's PKI engine.
	Vault RootVault `yaml:"vault"`
	// A root whose key is in a token.
	PKCS11 RootPKCS11 `yaml:"pkcs11"`
	// PEM file of further trust anchors for the bundle, looked at again and again: those of a root that is to come, or that is on its way out. "": none.
	AnchorsFile string `yaml:"anchorsFile" kind:"path"`
	// How long certificates may live that others issued under a root which is not of Kedge's own making, so that the ledger does not know them. Until then no other
	// root takes over, and nothing is removed. istiod's maximum is 90 days.
	ForeignWindow Duration `yaml:"foreignWindow"`
}

// RootCACerts is a CA that came from elsewhere, with its key.
type RootCACerts struct {
	// The folder, with ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem, or with tls.crt, tls.key and ca.crt. It is looked at again and again: a new set takes
	// over without a restart, and a bad one is refused as a whole.
	Dir string `yaml:"dir" kind:"path"`
	// File of one line, the passphrase of an encrypted key. "": the key is not encrypted.
	PassphraseFile string `yaml:"passphraseFile" kind:"path"`
}

// RootVault is a root in Vault's PKI engine.
type RootVault struct {
	// Where the PKI engine is mounted.
	Mount string `yaml:"mount"`
	// Name or id of the issuer in it. "default" is the one that the mount says.
	Issuer string `yaml:"issuer"`
}

// RootPKCS11 is a root whose key is in a token.
type RootPKCS11 struct {
	// PKCS #11 URI (RFC 7512) of the key: the token, the module, and where the PIN is, like "pkcs11:token=roots;object=mesh?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/pin".
	URI string `yaml:"uri"`
	// PEM file of its certificate, as "kedge ceremony" writes it; what stands between it and a root, and the root, come after it when it is not one itself.
	CertificateFile string `yaml:"certificateFile" kind:"path"`
}

// RootFile is a root in files.
type RootFile struct {
	// The folder (0700) of the root's certificate and key. When the file leaves it out, or says "": the folder "root" in dataDir.
	Dir string `yaml:"dir" kind:"path"`
	// File of one line, the passphrase that encrypts the root's key. "": the key file is not encrypted, and only its mode (0600) protects
	// it. Whoever has the key can make any identity.
	PassphraseFile string `yaml:"passphraseFile" kind:"path"`
	// Type of the root's key when it is made: P-256, P-384, RSA-2048, RSA-3072 or RSA-4096.
	KeyType string `yaml:"keyType"`
	// How long the root lives when it is made. At least twice issuingCA.lifetime.
	Lifetime Duration `yaml:"lifetime"`
}

// IssuingCA is what signs workload certificates.
type IssuingCA struct {
	// How long an issuing CA lives; its successor takes over at half of that. At least three times the longest maxTTL of all
	// profiles, so that no workload certificate is cut short by its issuer's end.
	Lifetime Duration `yaml:"lifetime"`
	// Type of its key: P-256, P-384, RSA-2048, RSA-3072 or RSA-4096. A change holds from the next renewal on. RSA signs some twenty times slower.
	KeyType string `yaml:"keyType"`
	// Where its key is. file: in dataDir. memory: nowhere else; each start makes a new issuing CA. vault: in Vault's Transit engine, which then signs each certificate. pkcs11: in a
	// token, likewise. A change holds from the next renewal on.
	KeyStore string `yaml:"keyStore"`
	// File of one line, the passphrase that encrypts the keys in dataDir. "": they are not encrypted, and only their mode (0600)
	// protects them.
	PassphraseFile string `yaml:"passphraseFile" kind:"path"`
	// Keys in Vault's Transit engine.
	Vault KeysVault `yaml:"vault"`
	// Keys in a token.
	PKCS11 KeysPKCS11 `yaml:"pkcs11"`
}

// KeysVault is a key store in Vault.
type KeysVault struct {
	// Where the Transit engine is mounted.
	Mount string `yaml:"mount"`
	// What the names of the keys begin with. Each CA that uses the mount has one of its own; no key with another name is opened or deleted.
	Prefix string `yaml:"prefix"`
}

// KeysPKCS11 is a key store in a token.
type KeysPKCS11 struct {
	// PKCS #11 URI (RFC 7512) of the token and its module; "object" begins the labels of the keys that are made. See root.pkcs11.uri.
	URI string `yaml:"uri"`
}

// Vault is a server of Vault's API.
type Vault struct {
	// URL of the server; https (http only on a loopback address).
	Address string `yaml:"address"`
	// Namespace (Vault Enterprise, OpenBao). "": none.
	Namespace string `yaml:"namespace"`
	// PEM file with the CA certificates that the server's certificate is checked with. "": those of the system.
	CAFile string `yaml:"caFile" kind:"path"`
	// Name that is checked in it. "": the host of the address.
	ServerName string `yaml:"serverName"`
	// How long an answer may take.
	Timeout Duration `yaml:"timeout"`
	// How Kedge proves who it is.
	Login VaultLogin `yaml:"login"`
}

// VaultLogin is how Kedge proves to Vault who it is.
type VaultLogin struct {
	// token, approle, kubernetes or cert.
	Method string `yaml:"method"`
	// Where the login method is mounted. "": at its usual place, the name of the method.
	Mount string `yaml:"mount"`
	// For kubernetes and cert: the role to log in as.
	Role string `yaml:"role"`
	// For token: where the token is, a file or "env:NAME". The file is read again at each login.
	Token string `yaml:"token" kind:"secret"`
	// For approle: the role id.
	RoleID string `yaml:"roleID"`
	// For approle: where the secret id is, a file or "env:NAME".
	SecretID string `yaml:"secretID" kind:"secret"`
	// For kubernetes: file of the service account token, read again at each login.
	TokenFile string `yaml:"tokenFile" kind:"path"`
	// For cert: PEM files of the client certificate and its key, read again at each login.
	CertificateFile string `yaml:"certificateFile" kind:"path"`
	// See certificateFile.
	KeyFile string `yaml:"keyFile" kind:"path"`
}

// PKCS11 is how tokens are spoken to.
type PKCS11 struct {
	// How many signatures the token makes at once, each in a session of its own. From 1 to 256.
	Sessions int `yaml:"sessions"`
	// How long a call of the module may take before its process is ended and replaced.
	Timeout Duration `yaml:"timeout"`
	// What the module is initialised with, for those that want it (NSS: configdir='sql:/path' ...). "": nothing.
	ModuleParameters string `yaml:"moduleParameters"`
	// Whether keys are used that the token says can be exported, or were not made on it. A key that was once elsewhere may still be there.
	AllowExportableKeys bool `yaml:"allowExportableKeys"`
}

// Profile is a signing profile: what a certificate may be, and who may have it.
type Profile struct {
	// How long a certificate lives when the caller does not say. When the file leaves it out: 24h, or maxTTL if that is shorter.
	DefaultTTL Duration `yaml:"defaultTTL"`
	// No certificate lives longer from the time of issue on, whatever the caller asks for. The backdate comes before that: with the defaults notAfter is
	// 24h and 1m after notBefore.
	MaxTTL Duration `yaml:"maxTTL"`
	// No certificate lives shorter: a caller that asks for less is refused, and when the issuing CA has less left nothing is issued. Below 5m
	// there is a warning: agents renew at half of the lifetime, and a CA that is away for so long cuts them off.
	MinTTL Duration `yaml:"minTTL"`
	// What becomes of a caller that asks for more than maxTTL: clamp grants maxTTL and counts it; refuse answers InvalidArgument, and an
	// istio-agent, which asks for 24h unasked, gets no certificate until its SECRET_TTL is lowered.
	OverMax string `yaml:"overMax"`
	// How far notBefore lies before the time of issue, for verifiers whose clocks are late. At most 1h, and never more than a tenth
	// of the certificate's lifetime, to which it is added: a TTL counts from the time of issue.
	Backdate Duration `yaml:"backdate"`
	// Key types that are allowed besides RSA of 2048 to 4096 bits, P-256 and P-384: P-521, Ed25519.
	ExtraKeys []string `yaml:"extraKeys"`
	// How long client certificates may renew each other before the caller must show a token again. 0s: for ever.
	MaxLineageAge Duration `yaml:"maxLineageAge"`
	// Patterns of the SPIFFE ID paths that may use this profile, like "ns/prod/sa/*"; "*" stands within one segment. Empty: all that were authenticated.
	Identities []string `yaml:"identities"`
}

// Callers is who may ask, and how they prove who they are.
type Callers struct {
	// Issuers whose tokens are accepted, for instance one for each cluster. Tokens are checked here, without asking the issuer each time.
	TokenIssuers []TokenIssuer `yaml:"tokenIssuers"`
	// Join tokens, which Kedge signs itself ("kedge token create"), for machines that no token issuer knows.
	JoinTokens JoinTokens `yaml:"joinTokens"`
	// Client certificates, with which holders of an SVID renew it.
	ClientCertificates ClientCertificates `yaml:"clientCertificates"`
	// How far the clocks of token issuers may be ahead or behind. From 1s to 5m.
	ClockSkew Duration `yaml:"clockSkew"`
}

// TokenIssuer is an issuer of JSON Web Tokens whose word counts.
type TokenIssuer struct {
	// Required. What the issuer is called in the ledger, in logs and metrics, for instance the name of its cluster. No two have the same.
	Name string `yaml:"name"`
	// kubernetes: service account tokens, whose holder becomes ns/NAMESPACE/sa/ACCOUNT. oidc: any other issuer of OpenID Connect tokens.
	Kind string `yaml:"kind"`
	// Required. The token's "iss", to the letter. No two issuers have the same. Without jwksFile and jwksURL the keys are found by OpenID
	// Connect discovery at this URL, which then must be https (http only on a loopback address).
	Issuer string `yaml:"issuer"`
	// A token must name one of these in "aud". When the file leaves it out: istio-ca for kubernetes; oidc has no default.
	Audiences []string `yaml:"audiences"`
	// File with the issuer's keys as a JWKS, read again when it changes. "": they come from jwksURL or by discovery.
	JWKSFile string `yaml:"jwksFile" kind:"path"`
	// URL of the issuer's keys as a JWKS; https (http only on a loopback address). "": they come from jwksFile or by discovery.
	JWKSURL string `yaml:"jwksURL"`
	// PEM file with the CA certificates that the issuer's own server certificate is checked with. "": those of the system.
	CAFile string `yaml:"caFile" kind:"path"`
	// File with a bearer token to show when the keys are fetched, read again each time. A Kubernetes API server gives its keys only to those with one.
	BearerTokenFile string `yaml:"bearerTokenFile" kind:"path"`
	// For oidc, and required there: how claims of the token make a SPIFFE ID path, like "ci/{claim:repository}/{claim:job.name}". The value of a
	// claim fills its place within one segment; a value that cannot do so is refused.
	Identity string `yaml:"identity"`
}

// JoinTokens is what join tokens may be made for.
type JoinTokens struct {
	// Patterns of the SPIFFE ID paths that a join token may be made for; "*" stands within one segment. []: no join tokens.
	Identities []string `yaml:"identities"`
	// How long a join token may be valid.
	MaxTTL Duration `yaml:"maxTTL"`
}

// ClientCertificates is whose client certificates count.
type ClientCertificates struct {
	// Whether a client certificate alone proves who the caller is. With false everybody needs a token each time.
	Enabled bool `yaml:"enabled"`
	// PEM files of issuing CAs of others whose client certificates count as well, for instance of the CA that workloads come from.
	// Name issuing CAs, not a shared root: whoever can get any certificate under it would be a caller.
	OtherIssuers []string `yaml:"otherIssuers" kind:"path"`
}

// Ledger is the record of every certificate that was issued.
type Ledger struct {
	// How long a record is kept after it ceased to matter (a certificate: after it expired).
	Retention Duration `yaml:"retention"`
	// Folder for archives. When given, no record is dropped before it is in an archive file there; when the folder is full or away, the
	// ledger grows instead. "": records are dropped without an archive.
	ArchiveDir string `yaml:"archiveDir" kind:"path"`
	// File that says up to which event the ledger was durable, written about once a second. At start it shows whether ledger.db is an older copy of
	// itself, which is not served. "": high-water.json in dataDir. On another disk it also shows that all of dataDir was put back. Every CA has
	// a file of its own.
	HighWaterFile string `yaml:"highWaterFile" kind:"path"`
}
