package contracttest_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/contracttest"
)

// Root is a ca.Root whose key is in the memory of this process: a whole one, and of no use but as an example.
type Root struct {
	key     crypto.Signer
	issuers ca.Issuers // its certificate; above it nothing
}

var _ ca.Root = (*Root)(nil)

// New makes a root that lives for ten years.
func New(td spiffeid.TrustDomain) (*Root, error) {
	key, err := ca.GenerateKey(ca.P256)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	cert, err := ca.SignRoot(td, key, now.Add(-time.Hour), now.AddDate(10, 0, 0))
	if err != nil {
		return nil, fmt.Errorf("making a root: %w", err)
	}
	return &Root{key, ca.Issuers{cert}}, nil
}

// Certify signs the certificate of an issuing CA. ca checks what it returns.
func (r *Root) Certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	chain, err := r.issuers.Certify(r.key, request, time.Now())
	if err != nil {
		return nil, fmt.Errorf("certifying the issuing CA %.80q: %w", request.CommonName, err)
	}
	return chain, nil
}

// Roots returns the trust anchor.
func (r *Root) Roots(context.Context) ([]*x509.Certificate, error) {
	return []*x509.Certificate{r.issuers.Root()}, nil
}

// Changed returns nil: this root stays what it is.
func (r *Root) Changed() <-chan struct{} { return nil }

func TestTheExampleKeepsThePromises(t *testing.T) {
	contracttest.Root(t, func(t *testing.T) ca.Root {
		root, err := New(spiffeid.RequireTrustDomainFromString(contracttest.TrustDomain))
		if err != nil {
			t.Fatal(err)
		}
		return root
	}, nil)
}

// TestTheGuideShowsTheExample holds docs/roots.md against this file.
func TestTheGuideShowsTheExample(t *testing.T) {
	code, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, part, _ := strings.Cut(string(code), "// Root is a ca.Root")
	part, _, _ = strings.Cut("// Root is a ca.Root"+part, "\nfunc Test")
	page, err := os.ReadFile("../../docs/roots.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(page), part) {
		t.Error("the guide shows other code than this file has")
	}
}
