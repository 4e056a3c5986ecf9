package cfsslprofile

// Why keys that cfssl knows are refused, by key. cfssl finds keys in any spelling of upper and lower case: the others are unknown here.
const (
	csrDecides  = "it lets the CSR decide what stands in a certificate; here only the public key is taken from a CSR: remove it"
	notALeaf    = "it is about CA certificates, and this CA signs only leaves under a profile: remove it"
	signsItself = "it hands requests to another signer, and this CA signs itself: remove it"
	noAuthKeys  = "cfssl's shared keys authenticate nobody here; callers prove who they are by token or client certificate: remove it"
	ownLinting  = "the linting of certificates cannot be turned down: this CA lints a throwaway leaf before it uses an issuing CA. Remove it"
	noPointers  = "an SVID carries no such pointer here: it lives too short for one to be followed, and trust travels by bundle. Remove it"
	fixedDates  = "fixed dates give every certificate the same end, and renewal at half-life could not work: give an expiry"
	internal    = "it is a part of cfssl's own memory, and no configuration: remove it"
)

var refusedAtTop = map[string]string{
	"auth_keys": noAuthKeys,
	"remotes":   signsItself,
	"ocsp":      "this CA answers no OCSP: remove it",
}

var refusedInProfile = map[string]string{
	"copy_extensions":    csrDecides,
	"allowed_extensions": csrDecides,
	"CSRWhitelist":       csrDecides,
	"csr_whitelist":      csrDecides,
	"ExtensionWhitelist": csrDecides,
	"name_whitelist": "it judges names that the CSR asks for, and here no name is taken from a CSR: say in this CA's own configuration " +
		"which identities may use a profile, and remove it",
	"NameWhitelist":               csrDecides,
	"ClientProvidesSerialNumbers": "it lets the client choose the serial number, and this CA makes its own: remove it",

	"ca_constraint": notALeaf,
	"is_ca":         notALeaf,
	"ocsp_no_check": "it is for OCSP responders, and an SVID is none: remove it",

	"not_before": fixedDates,
	"not_after":  fixedDates,

	"issuer_urls": noPointers,
	"ocsp_url":    noPointers,
	"crl_url":     noPointers,

	"auth_key":      noAuthKeys,
	"prev_auth_key": noAuthKeys,
	"remote":        signsItself,
	"auth_remote":   signsItself,
	"provider":      internal,

	"ct_log_servers": "certificates of a private trust domain go to no public log; the ledger records each of them: remove it",
	"cert_store":     "the ledger is this CA's store: remove it",
	"policies":       "an SVID here carries no certificate policies: remove it",
	"Policies":       "an SVID here carries no certificate policies: remove it",

	"lint_error_level":     ownLinting,
	"ignored_lints":        ownLinting,
	"ignored_lint_sources": ownLinting,

	"Expiry":         `it is a part of cfssl's own memory, a number of nanoseconds: write "expiry"`,
	"Backdate":       `it is a part of cfssl's own memory, a number of nanoseconds: write "backdate"`,
	"Provider":       internal,
	"PrevProvider":   internal,
	"RemoteProvider": internal,
	"RemoteServer":   signsItself,
	"RemoteCAs":      signsItself,
	"ClientCert":     signsItself,
	"LintRegistry":   ownLinting,
}
