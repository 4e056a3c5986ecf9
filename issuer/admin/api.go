// Package admin is the door for the admins of a running CA: JSON over HTTP on a unix socket in its data folder. The socket's mode
// (0600 in a folder 0700) and the peer's credentials decide who may; the credentials go into the ledger with what was done.
//
// The package has both ends: Server answers, Client asks (the verbs of the kedge command).
package admin

import (
	"time"

	"kedge/ca/ledger"
)

// Status is what a running CA says of itself.
type Status struct {
	Version     string      `json:"version"`
	Started     time.Time   `json:"started"`
	TrustDomain string      `json:"trust_domain"`
	DataDir     string      `json:"data_dir"`
	CSRAddress  string      `json:"csr_address"`
	OpsAddress  string      `json:"operations_address"`
	RootFile    string      `json:"root_file"`        // PEM of the trust bundle, kept up to date
	Root        ledger.Hash `json:"root_fingerprint"` // SHA-256 of the first root certificate
	Log         string      `json:"log"`              // id of the ledger's log
	Number      uint64      `json:"number"`           // of its last event
	Bundle      uint64      `json:"bundle_sequence"`  //
	Ready       bool        `json:"ready"`
	NotReady    string      `json:"not_ready,omitempty"` // why
	Problems    []string    `json:"problems"`            // what is wrong though the CA goes on
	LogLevel    string      `json:"log_level"`
}

// Bundle is the trust bundle of now, in both formats.
type Bundle struct {
	TrustDomain string        `json:"trust_domain"`
	Sequence    uint64        `json:"sequence"`
	Incarnation ledger.Hash   `json:"incarnation"`
	SHA256      ledger.Hash   `json:"sha256"` // of PEM
	Floor       uint64        `json:"floor"`
	Since       time.Time     `json:"since"`
	Roots       []ledger.Hash `json:"roots"` // their ids, in order
	PEM         string        `json:"pem"`
	SPIFFE      string        `json:"spiffe"` // the bundle document
}

// Event is an event of the ledger as it travels: the envelope, and the body under the name of its type.
type Event struct {
	Version   uint8             `json:"version"`
	Type      string            `json:"type"` // as text: a later version's CA may have types that this one does not know
	Time      ledger.Time       `json:"time"`
	Log       ledger.LogID      `json:"log"`
	Number    uint64            `json:"number"`
	Issue     *ledger.Issue     `json:"issue,omitempty"`
	Confirm   *ledger.Confirm   `json:"confirm,omitempty"`
	Authority *ledger.Authority `json:"authority,omitempty"`
	Bundle    *ledger.Bundle    `json:"bundle,omitempty"`
	Token     *ledger.Token     `json:"token,omitempty"`
	Revoke    *ledger.Revoke    `json:"revoke,omitempty"`
	Waiver    *ledger.Waiver    `json:"waiver,omitempty"`
	Restore   *ledger.Restore   `json:"restore,omitempty"`
}

// TokenRequest asks for a join token.
type TokenRequest struct {
	Identity string `json:"identity"`           // path of the SPIFFE ID: ns/default/sa/web; or the whole ID
	TTL      int64  `json:"ttl_seconds"`        //
	Reusable bool   `json:"reusable,omitempty"` // otherwise it is spent by its first use
}

// TokenResponse carries a new join token. It is nowhere else.
type TokenResponse struct {
	Token    string      `json:"token"`
	ID       string      `json:"id"`
	SPIFFEID string      `json:"spiffe_id"`
	Expires  ledger.Time `json:"expires"`
	Reusable bool        `json:"reusable"`
	Number   uint64      `json:"number"` // of the event that records it
}

// RevokeRequest asks that a certificate authenticate nobody any more. The answer is a ca.Revocation.
type RevokeRequest struct {
	Serial  string `json:"serial"`
	Reason  string `json:"reason"`
	Lineage bool   `json:"lineage,omitempty"` // and with it every one that follows on it
}

// TaintRequest says that an issuing CA is compromised.
type TaintRequest struct {
	ID     ledger.Hash `json:"id"`
	Reason string      `json:"reason"`
}

// Tainted says how things stand after a taint.
type Tainted struct {
	ID         ledger.Hash  `json:"id"`
	Signing    *ledger.Hash `json:"signing,omitempty"`     // the issuing CA that signs now; absent while there is none
	Live       uint64       `json:"live_certificates"`     // under the tainted one; this CA's serving certificates under it count, too
	LastExpiry *time.Time   `json:"last_expiry,omitempty"` // of these
}

// Recorded says which event has what was done.
type Recorded struct {
	Number uint64 `json:"number"`
}

// Failure is the body of every answer that is not a success.
type Failure struct {
	Error string `json:"error"`
}
