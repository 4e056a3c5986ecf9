package sds

import (
	"context"
	"crypto"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Materials are what there is to hand out at one moment. They never change.
type Materials struct {
	ID      spiffeid.ID // that a stream's SVID is or will be for; zero: not known yet
	SVID    *SVID       // nil: there is none
	Bundles []*Bundle   // trust bundles, the own trust domain's first. Sources with the same ones share the slice: then what is made of it is made once
}

// SVID is an X.509-SVID with its key.
type SVID struct {
	ID                  spiffeid.ID
	Chain               []*x509.Certificate // the leaf first, without the root
	Key                 crypto.Signer
	NotBefore, NotAfter time.Time
}

// Bundle is the trust bundle of one trust domain.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	Incarnation string // of the store that numbered it: numbers of two incarnations cannot be compared
	Sequence    uint64 // grows with every change
	Roots       []*x509.Certificate
	PEM         string // of Roots, as every holder gets it
}

// Wants is what a stream has asked for so far. It only grows.
type Wants struct {
	SVID   bool // the SVID with its key, by whatever name
	Bundle bool // a trust bundle, by whatever name
	Own    bool // that of the own trust domain, with which the client verifies then
	// Holds is the serial number, in lower-case hex, of the SVID that the client has had since an earlier stream, as it says; "": it has none. If Materials still
	// has that one, it is not sent again.
	Holds string
}

// Answer is what a client said of a response.
type Answer struct {
	Names []string // the secrets that were in it, as the client asked for them; or those that it has had since an earlier stream and need not be sent
	SVID  *SVID    // the one that was in it; nil: none
	// Bundle is of the own trust domain, and was in it by a name that makes the client verify with it; nil: none was. If the client took it, it is the oldest that the
	// client has by any such name of the stream; nil then, too, while it has none by one of them.
	Bundle *Bundle
	Reason string // of a refusal (NACK); "": the client took it (ACK)
}

// Source is where a stream's secrets come from. Its methods may be called at once from several goroutines.
type Source interface {
	// Materials are those of now. changed is closed once there are others.
	Materials() (m *Materials, changed <-chan struct{})
	// Want says what the stream asks for, when that has grown. Materials follow.
	Want(Wants)
	// Answered hears what the client says of what it was sent. It answers at once.
	Answered(Answer)
	// Ended is closed when the stream has to end; Err then is the gRPC status that the client gets.
	Ended() <-chan struct{}
	Err() error
	// Close is called when the stream is over.
	Close()
}

// Opener decides who may have a stream. The context is the stream's, with what the caller proves itself by; an error is a gRPC status.
type Opener interface {
	Open(ctx context.Context) (Source, error)
}
