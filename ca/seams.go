package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"time"
)

// Root is where trust begins: it certifies the keys of issuing CAs, and says which trust anchors it stands for.
// Its methods may be called at once from several goroutines. An error means that nothing was done, or that what was done
// is of no consequence (a certificate nobody has); calling again is always safe. Every method returns soon after ctx ends.
// A Root checks nothing of what it returns: ca verifies every chain before use.
type Root interface {
	// Certify has the root sign a certificate for an issuing CA. It returns the chain that is handed out with leaves:
	// the new certificate first, then what stands between it and a root, without the root itself.
	Certify(ctx context.Context, request CertifyRequest) (chain []*x509.Certificate, err error)
	// Roots returns the trust anchors, in an order that does not change while they do not: at least one, the one that Certify
	// chains to first.
	Roots(ctx context.Context) ([]*x509.Certificate, error)
	// Changed receives after Roots may have changed. It may be nil when that never happens.
	Changed() <-chan struct{}
}

// IssuingRoot is what a Root may be, too: one that brings an issuing CA with its key, as a CA does that another program signed with before. Then no
// issuing CA is made here, and what the root brings signs the leaves itself.
type IssuingRoot interface {
	Root
	// Issuing returns what signs now: its chain, as from Certify, and its key. No chain and no error: the root brings none at this time, and
	// Certify is asked. It may be another after Changed received.
	Issuing(ctx context.Context) (chain []*x509.Certificate, key crypto.Signer, err error)
}

// Anchors are trust anchors besides those of the root, such as those of a CA that is to come or that is on its way out.
type Anchors interface {
	// Anchors returns them, in an order that does not change while they do not. There may be none.
	Anchors(ctx context.Context) ([]*x509.Certificate, error)
	// Changed receives after Anchors may have changed. It may be nil when that never happens.
	Changed() <-chan struct{}
}

// Reporter is what a Root, a KeyStore or Anchors may be, too: one that can say that something is wrong while it goes on with what it had.
type Reporter interface {
	// Problem says what is wrong, on what, and what to do; nil: nothing is. It answers at once.
	Problem() error
}

// CertifyRequest asks a Root for the certificate of an issuing CA.
type CertifyRequest struct {
	PublicKey   crypto.PublicKey
	CSR         []byte    // a PKCS#10 request for PublicKey, signed with its key (DER), for roots that want a proof of possession; only the key in it counts
	TrustDomain string    // the name without scheme; the certificate carries spiffe://TrustDomain (X509-SVID 3.1, a CA's ID has no path)
	CommonName  string    // for people
	NotBefore   time.Time //
	NotAfter    time.Time // the root may shorten this, never lengthen it
}

// KeySpec is the kind of a signing key.
type KeySpec string

// The kinds of keys that authorities have.
const (
	P256    KeySpec = "P-256"
	P384    KeySpec = "P-384"
	RSA2048 KeySpec = "RSA-2048"
	RSA3072 KeySpec = "RSA-3072"
	RSA4096 KeySpec = "RSA-4096"
)

// KeyStore makes and keeps the signing keys of issuing CAs. Its methods may be called at once from several goroutines.
type KeyStore interface {
	// Create makes a key. ref finds it again with Open, after a restart too; it is no secret.
	Create(ctx context.Context, spec KeySpec) (ref string, key crypto.Signer, err error)
	// Open returns the key that Create named ref. An error that wraps fs.ErrNotExist says that there is no such key.
	Open(ctx context.Context, ref string) (crypto.Signer, error)
	// Delete destroys the key. Deleting one that is not there is no error.
	Delete(ctx context.Context, ref string) error
}

// PortableRoot is what a Root may be, too: one that is made of files on this machine, so that a backup of the CA has to hold them. A root
// whose key is kept elsewhere has nothing to back up.
type PortableRoot interface {
	Root
	// Files returns the files of the root's folder.
	Files(ctx context.Context) ([]KeyFile, error)
}

// PortableKeyStore is what a KeyStore may be, too: one that keeps its keys in files on this machine.
type PortableKeyStore interface {
	KeyStore
	// File returns the file of the key that Create named ref. An error that wraps fs.ErrNotExist says that there is no such key.
	File(ctx context.Context, ref string) (KeyFile, error)
}

// KeyFile is a file of a root or of a key store. Whoever gets it wipes Content after use.
type KeyFile struct {
	Name    string // in the folder of the root or of the key store
	Content []byte // as it is on disk
	Clear   bool   // it holds a key that is not encrypted
}
