package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// Bundle is a trust bundle as it is handed out. It never changes: a change makes a new one with the next sequence number.
type Bundle struct {
	Sequence uint64              //
	Roots    []*x509.Certificate // in the order in which they are handed out
	PEM      string              // the very bytes that every holder gets: istio-agent compares them
	SHA256   ledger.Hash         // of PEM
	record   ledger.BundleRecord
}

// Record returns the bundle as the ledger has it.
func (b *Bundle) Record() ledger.BundleRecord { return b.record }

// Incarnation is that of the store that numbered the bundle. A restore begins a new one: the sequence numbers of two incarnations cannot be compared.
func (b *Bundle) Incarnation() ledger.Hash { return b.record.Incarnation }

// refreshHint is how often a client of the bundle document should ask again (SPIFFE Trust Domain and Bundle 4.1.4).
const refreshHint = 300 // seconds

// SPIFFE returns the bundle document of the SPIFFE Trust Domain and Bundle specification: a JWKS with one x509-svid key a root.
func (b *Bundle) SPIFFE(td spiffeid.TrustDomain) ([]byte, error) {
	document := spiffebundle.FromX509Authorities(td, b.Roots)
	document.SetSequenceNumber(b.Sequence)
	document.SetRefreshHint(refreshHint * 1e9)
	return document.Marshal()
}

// loadBundle reads a bundle back, and makes sure that its bytes are those that were recorded.
func loadBundle(record ledger.BundleRecord) (*Bundle, error) {
	roots := make([]*x509.Certificate, 0, len(record.Roots))
	for i, der := range record.Roots {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("root %d of trust bundle %d in the ledger: %w", i+1, record.Sequence, err)
		}
		roots = append(roots, root)
	}
	text := encodePEM(record.Roots...)
	b := &Bundle{Sequence: record.Sequence, Roots: roots, PEM: text, SHA256: sha256.Sum256([]byte(text)), record: record}
	if b.SHA256 != record.SHA256 {
		return nil, fmt.Errorf("trust bundle %d in the ledger has the SHA-256 %s, its PEM has %s: run 'kedge ledger verify'",
			record.Sequence, record.SHA256, b.SHA256)
	}
	return b, nil
}

// encodePEM renders certificates one after the other, each ending with a newline.
func encodePEM(ders ...[]byte) string {
	size := 0
	for _, der := range ders {
		size += len(der)*4/3 + len(der)/48 + 64 // base64, an end of line after every 64 of its letters, and the two lines around it
	}
	text := bytes.NewBuffer(make([]byte, 0, size))
	for _, der := range ders {
		pem.Encode(text, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // a bytes.Buffer takes everything
	}
	return text.String()
}
