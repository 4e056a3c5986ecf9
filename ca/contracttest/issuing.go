package contracttest

import (
	"context"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"kedge/ca"
)

// Moving is an IssuingRoot that the suite moves.
type Moving struct {
	Root   ca.IssuingRoot
	Other  func(t *testing.T)            // puts another good issuing CA, under the same root, in the place of the one that there is
	Spoil  map[string]func(t *testing.T) // by name: puts something there that must be refused
	Settle func(t *testing.T)            // returns once what was put there was looked at
	Faults map[string]Fault              // by name: what can happen to what it depends on; it holds what it brings
}

// IssuingRoot tests that what make returns keeps the promises of ca.IssuingRoot: that what it brings is good, that another one takes over, and that nothing bad does.
func IssuingRoot(t *testing.T, make func(t *testing.T) Moving) {
	check := func(t *testing.T, root ca.IssuingRoot) *x509.Certificate {
		t.Helper()
		chain, key, err := root.Issuing(t.Context())
		if err != nil || len(chain) == 0 {
			t.Fatalf("Issuing brings %d certificates: %v", len(chain), err)
		}
		checkSigns(t, key, chain[0].PublicKey)
		anchors, intermediates := x509.NewCertPool(), x509.NewCertPool()
		for _, anchor := range roots(t, root) {
			anchors.AddCert(anchor)
		}
		for _, link := range chain[1:] {
			intermediates.AddCert(link)
		}
		if _, err := chain[0].Verify(x509.VerifyOptions{Roots: anchors, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Errorf("what it brings does not lead to its roots: %v", err)
		}
		for i, link := range chain {
			if !link.IsCA || time.Now().After(link.NotAfter) {
				t.Errorf("link %d is no CA, or has expired", i)
			}
		}
		return chain[0]
	}
	t.Run("what it brings is good, and stays the same", func(t *testing.T) {
		m := make(t)
		first := check(t, m.Root)
		if again := check(t, m.Root); !again.Equal(first) {
			t.Error("Issuing brought two different ones")
		}
	})
	t.Run("what a caller does to the chain changes nothing", func(t *testing.T) {
		m := make(t)
		chain, _, err := m.Root.Issuing(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		chain[0] = &x509.Certificate{}
		check(t, m.Root)
	})
	t.Run("another one takes over", func(t *testing.T) {
		m := make(t)
		first := check(t, m.Root)
		m.Other(t)
		<-m.Root.Changed()
		if check(t, m.Root).Equal(first) {
			t.Error("Changed received, and the issuing CA is the same")
		}
	})
	for name := range make(t).Spoil {
		t.Run(name+" is refused as a whole, and said; the old one goes on", func(t *testing.T) {
			m := make(t)
			first, anchors := check(t, m.Root), roots(t, m.Root)
			m.Spoil[name](t)
			m.Settle(t)
			if !check(t, m.Root).Equal(first) || !sameCertificates(anchors, roots(t, m.Root)) {
				t.Error("something of it was taken up")
			}
			if reporter, ok := m.Root.(ca.Reporter); ok && reporter.Problem() == nil {
				t.Error("nothing is said to be wrong")
			}
			m.Other(t)
			<-m.Root.Changed()
			if reporter, ok := m.Root.(ca.Reporter); ok && reporter.Problem() != nil {
				t.Errorf("a good one came, and it still says: %v", reporter.Problem())
			}
		})
	}
	for name := range make(t).Faults {
		t.Run("with "+name+" what it brought goes on, and it says so", func(t *testing.T) {
			m := make(t)
			first := check(t, m.Root)
			m.Faults[name].without(t, m.Root, func() {
				if !check(t, m.Root).Equal(first) {
					t.Error("Issuing brought another one")
				}
			})
		})
	}
	t.Run("a cancelled context ends it with that error", func(t *testing.T) {
		m := make(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := m.Root.Issuing(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Issuing with a cancelled context: %v", err)
		}
	})
}
