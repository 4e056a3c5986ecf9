package contracttest

import (
	"context"
	"crypto/x509"
	"errors"
	"testing"

	"kedge/ca"
)

// Anchors tests that what make returns keeps the promises of ca.Anchors. change puts other trust anchors in the place of those that there are; the suite waits for Changed. faults are what can
// happen to what they depend on, by name; they hold what they read.
func Anchors(t *testing.T, make func(t *testing.T) (anchors ca.Anchors, change func(t *testing.T)), faults map[string]func(anchors ca.Anchors) Fault) {
	all := func(t *testing.T, a ca.Anchors) []*x509.Certificate {
		t.Helper()
		certs, err := a.Anchors(t.Context())
		if err != nil {
			t.Fatalf("Anchors: %v", err)
		}
		return certs
	}
	t.Run("they keep their order, and what a caller does to them changes nothing", func(t *testing.T) {
		anchors, _ := make(t)
		first := all(t, anchors)
		kept := append([]*x509.Certificate(nil), first...)
		if len(first) > 0 {
			first[0] = &x509.Certificate{}
		}
		if !sameCertificates(kept, all(t, anchors)) {
			t.Error("Anchors gave others, or in another order")
		}
	})
	t.Run("Changed receives once there are others", func(t *testing.T) {
		anchors, change := make(t)
		before := all(t, anchors)
		change(t)
		<-anchors.Changed()
		if sameCertificates(before, all(t, anchors)) {
			t.Error("Changed received, and they are the same")
		}
	})
	for name, fault := range faults {
		t.Run("with "+name+" they go on, and say so", func(t *testing.T) {
			anchors, _ := make(t)
			before := all(t, anchors)
			fault(anchors).without(t, anchors, func() {
				if !sameCertificates(before, all(t, anchors)) {
					t.Error("Anchors gave others than before")
				}
			})
		})
	}
	t.Run("a cancelled context ends it with that error", func(t *testing.T) {
		anchors, _ := make(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := anchors.Anchors(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Anchors with a cancelled context: %v", err)
		}
	})
}
