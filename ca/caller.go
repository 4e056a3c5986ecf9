package ca

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// The methods of proof, as they stand in the ledger.
const (
	MethodKubernetes        = "kubernetes"
	MethodOIDC              = "oidc"
	MethodJoinToken         = "join-token"
	MethodClientCertificate = ledger.MethodClientCertificate
)

// Caller is who a front door found to be asking. It is the only source of the identity in a certificate (I4).
type Caller struct {
	ID     spiffeid.ID    // the one identity that all Proofs agree on
	Proofs []ledger.Proof // what was accepted for this call; at least one
	// First is where the lineage began: the first of Proofs, unless the only proof is a client certificate. Then it is what
	// the ledger says of that certificate's lineage; nil when the ledger does not know.
	First    *ledger.Proof
	Holder   ledger.Holder // who will hold the certificate
	Replaces uint64        // number of the issue that the new certificate follows; 0: none
	// Presented is set when a client certificate of this CA was presented: its holder evidently has it.
	Presented *Presented
	// Until is when the first of Proofs stops being one, as a token or a client certificate expires. What outlives a call, such as a stream, ends by then.
	Until     time.Time
	JoinToken string    // id of the join token that this call spends; "": none
	IssuedAt  time.Time // when a token issuer outside this process signed the token; zero: no such token. It corroborates the clock (I8)
	Peer      string    // network address
	ClusterID string    // the caller's own word, not checked
}

// Presented is a certificate of this CA in the hands of its holder.
type Presented struct {
	Number uint64 // of its Issue event
	Serial ledger.Serial
}
