package ca_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/ca"
	"kedge/plugins/file"
)

// deadKeys is a key store whose keys do not sign right.
type deadKeys struct{ ca.KeyStore }

func dead(key crypto.Signer) crypto.Signer {
	return &badKey{Signer: key, sign: func() ([]byte, error) { return nil, errors.New("the token is gone") }}
}

func (k deadKeys) Open(ctx context.Context, ref string) (crypto.Signer, error) {
	key, err := k.KeyStore.Open(ctx, ref)
	return dead(key), err
}

func (k deadKeys) Create(ctx context.Context, spec ca.KeySpec) (string, crypto.Signer, error) {
	ref, key, err := k.KeyStore.Create(ctx, spec)
	return ref, dead(key), err
}

// TestARehearsalRefusesWhatAFirstStartRefuses, for the same reason, and takes what that takes. It leaves no key behind.
func TestARehearsalRefusesWhatAFirstStartRefuses(t *testing.T) {
	elsewhere := []*url.URL{{Scheme: "spiffe", Host: "elsewhere"}}
	for name, test := range map[string]struct {
		arrange func(t *testing.T, f *fixture, root *movingRoot, anchor *madeCA)
		reason  string // "": both take it
	}{
		"a root that certifies": {arrange: func(*testing.T, *fixture, *movingRoot, *madeCA) {}},
		"an issuing CA that comes with its root": {arrange: func(t *testing.T, f *fixture, root *movingRoot, anchor *madeCA) {
			root.bring(makeCA(t, f, "intermediate", anchor, nil))
		}},
		"further anchors": {arrange: func(t *testing.T, f *fixture, _ *movingRoot, _ *madeCA) {
			f.anchors = &somebodysAnchors{all: []*x509.Certificate{makeCA(t, f, "other", nil, nil).cert}}
		}},
		"one of another trust domain": {func(t *testing.T, f *fixture, root *movingRoot, anchor *madeCA) {
			root.bring(makeCA(t, f, "intermediate", anchor, func(c *x509.Certificate) { c.URIs = elsewhere }))
		}, "its URI SAN is [spiffe://elsewhere]"},
		"one with another's key": {func(t *testing.T, f *fixture, root *movingRoot, anchor *madeCA) {
			root.bring(makeCA(t, f, "intermediate", anchor, nil))
			root.set(func() { root.key = newKey(t) })
		}, "is not the one in the certificate"},
		"one that has expired": {func(t *testing.T, f *fixture, root *movingRoot, anchor *madeCA) {
			root.bring(makeCA(t, f, "intermediate", anchor, func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(time.Minute) }))
		}, "it expired at"},
		"one that ends too soon": {func(t *testing.T, f *fixture, root *movingRoot, anchor *madeCA) {
			root.bring(makeCA(t, f, "intermediate", anchor, func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(time.Hour + time.Minute) }))
		}, "too short for a certificate of 5m"},
		"one that verifiers refuse": {func(t *testing.T, f *fixture, root *movingRoot, anchor *madeCA) {
			root.bring(makeCA(t, f, "intermediate", anchor, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }))
		}, "a client would refuse what it signs"},
		"a root that ends too soon": {func(t *testing.T, f *fixture, _ *movingRoot, _ *madeCA) {
			own, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(f.dir, "root"), TrustDomain: td.Name(), Lifetime: 2 * time.Minute, Now: f.clock.clock().Wall})
			if err != nil {
				t.Fatal(err)
			}
			f.root = own
		}, "too short for a certificate of 5m"},
		"a root of another trust domain": {func(t *testing.T, f *fixture, root *movingRoot, _ *madeCA) {
			root.anchors = []*madeCA{makeCA(t, f, "root", nil, func(c *x509.Certificate) { c.URIs = elsewhere })}
		}, "cannot be a trust anchor: its URI SAN is"},
		"a root without anchors": {func(_ *testing.T, _ *fixture, root *movingRoot, _ *madeCA) { root.anchors = nil }, "the root has no trust anchor"},
		"a further anchor of another trust domain": {func(t *testing.T, f *fixture, _ *movingRoot, _ *madeCA) {
			f.anchors = &somebodysAnchors{all: []*x509.Certificate{makeCA(t, f, "other", nil, func(c *x509.Certificate) { c.URIs = elsewhere }).cert}}
		}, "cannot be a trust anchor: its URI SAN is"},
		"a root that is away": {func(_ *testing.T, _ *fixture, root *movingRoot, _ *madeCA) {
			root.err = errors.New("the vault is sealed")
		}, "the vault is sealed"},
		"a key that signs wrong": {func(_ *testing.T, f *fixture, _ *movingRoot, _ *madeCA) { f.keys = deadKeys{f.keys} }, "the request for its certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			f, root, anchor := newMoving(t)
			folder := filepath.Join(f.dir, "keys")
			keys, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: folder})
			if err != nil {
				t.Fatal(err)
			}
			f.keys = keys
			test.arrange(t, f, root, anchor)
			profile, err := ca.NewProfile(ca.DefaultProfile, f.profile)
			if err != nil {
				t.Fatal(err)
			}
			found, rehearsed := ca.Rehearse(t.Context(), ca.Options{TrustDomain: td, Root: f.root, Anchors: f.anchors, Keys: f.keys, IssuingKey: ca.P256,
				Profiles: map[string]*ca.Profile{ca.DefaultProfile: profile}, Clock: f.clock.clock()})
			if left, err := os.ReadDir(folder); err != nil || len(left) > 0 {
				t.Errorf("it left %v, %v", left, err)
			}
			started := f.open(t)
			for what, err := range map[string]error{"the rehearsal": rehearsed, "the first start": started} {
				if test.reason == "" && err != nil || test.reason != "" && (err == nil || !strings.Contains(err.Error(), test.reason)) {
					t.Errorf("%s says %v, want %q", what, err, test.reason)
				}
			}
			if test.reason == "" && (len(found.Roots) == 0 || len(found.Chain) != 1 || found.Brought != (len(root.brings) > 0)) {
				t.Errorf("it found %d roots and a chain of %d, brought: %t", len(found.Roots), len(found.Chain), found.Brought)
			}
		})
	}
}
