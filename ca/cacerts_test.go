package ca_test

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/plugins/file"
	"kedge/test/process"
)

func certificatesPEM(all ...*madeCA) []byte {
	var text bytes.Buffer
	for _, c := range all {
		pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw}) // into memory
	}
	return text.Bytes()
}

// istioSet are the files of a CA under the first of some roots, as Istio's tools/certs lay them out.
func istioSet(t *testing.T, issuing *madeCA, roots ...*madeCA) map[string][]byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(issuing.key)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{"ca-cert.pem": certificatesPEM(issuing), "ca-key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		"cert-chain.pem": certificatesPEM(issuing, roots[0]), "root-cert.pem": certificatesPEM(roots...)}
}

// asIstio makes an intermediate what Istio's tools/certs make it: a DNS name, no SPIFFE ID, no cRLSign.
func asIstio(c *x509.Certificate) {
	c.DNSNames, c.KeyUsage = []string{"istiod.istio-system.svc"}, x509.KeyUsageDigitalSignature|x509.KeyUsageContentCommitment|x509.KeyUsageKeyEncipherment|x509.KeyUsageCertSign
}

// mount lets the CA of the fixture follow a Secret.
func mount(t *testing.T, f *fixture, secret string) *file.CACerts {
	t.Helper()
	root, err := file.OpenCACerts(file.CACertsOptions{Dir: secret, TrustDomain: td.Name(), PollInterval: 10 * time.Millisecond, Now: f.clock.clock().Wall})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	f.root, f.foreign = root, ledger.Coverage{Kind: "foreign", Until: ledger.At(f.clock.clock().Wall().Add(f.window))}
	return root
}

// eventually does the CA's chores until try finds no fault.
func (f *fixture) eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	process.Eventually(t, what, func() error {
		f.chores(t)
		return try()
	})
}

// signs says whether the CA signs with one of the issuing CAs, and whether what it signs is good.
func (f *fixture) signs(t *testing.T, by *madeCA) error {
	issued, err := f.issue(t, f.caller("/ns/default/sa/a"), 0)
	if err != nil {
		return err
	}
	if issued.Authority != ca.AuthorityID(by.cert) {
		return fmt.Errorf("%s signs", issued.Authority)
	}
	return f.verify(t, issued)
}

func TestAMountedSecretIsExchangedAndTakenBack(t *testing.T) {
	f := newFixture(t)
	root := makeCA(t, f, "Root CA", nil, nil)
	one, two := makeCA(t, f, "Intermediate one", root, asIstio), makeCA(t, f, "Intermediate two", root, asIstio)
	secret := t.TempDir()
	process.Mount(t, secret, istioSet(t, one, root))
	mount(t, f, secret)
	f.mustOpen(t)
	first := f.mustIssue(t, f.caller("/ns/default/sa/a"), 0)
	if first.Authority != ca.AuthorityID(one.cert) || len(first.Chain) != 2 {
		t.Fatalf("%s signs, and the chain has %d", first.Authority, len(first.Chain))
	}
	process.Mount(t, secret, istioSet(t, two, root))
	f.eventually(t, "the second intermediate", func() error { return f.signs(t, two) })
	second := f.mustIssue(t, f.caller("/ns/default/sa/b"), 0)
	for _, holder := range []*ca.Issued{first, second} {
		for _, peer := range []*ca.Issued{first, second} {
			if err := verifyUnder(peer, holder.Bundle, f.clock.clock().Wall()); err != nil {
				t.Error(err)
			}
		}
	}
	if got := f.states(t); got != "retired active" {
		t.Errorf("the states are %q", got)
	}
	process.Mount(t, secret, istioSet(t, one, root))
	f.eventually(t, "the first intermediate again", func() error { return f.signs(t, one) })
	if got := f.states(t); got != "active retired" {
		t.Errorf("the states are %q", got)
	}
	if report, err := f.ledger.Verify(t.Context()); err != nil || len(report.Problems) > 0 {
		t.Errorf("verify: %v %v", report.Problems, err)
	}
}

func TestASecondRootInAMountedSecretComesAfterTheFirst(t *testing.T) {
	f := newFixture(t)
	root, next := makeCA(t, f, "Root CA", nil, nil), makeCA(t, f, "Next root CA", nil, nil)
	issuing := makeCA(t, f, "Intermediate", root, asIstio)
	secret := t.TempDir()
	process.Mount(t, secret, istioSet(t, issuing, root))
	mount(t, f, secret)
	f.mustOpen(t)
	set := istioSet(t, issuing, root)
	set["root-cert.pem"] = certificatesPEM(next, root) // whatever their order in the file
	process.Mount(t, secret, set)
	f.eventually(t, "bundle 2", func() error {
		if sequence := f.ca.Bundle().Sequence; sequence != 2 {
			return fmt.Errorf("the bundle is %d", sequence)
		}
		return nil
	})
	if roots := f.ca.Bundle().Roots; len(roots) != 2 || !roots[0].Equal(root.cert) || !roots[1].Equal(next.cert) {
		t.Errorf("the bundle has %d roots, or in another order", len(roots))
	}
	if err := f.signs(t, issuing); err != nil {
		t.Error(err)
	}
}

func TestARestartWithoutTheMountedKeyIsNotReadySaysWhyAndHeals(t *testing.T) {
	f := newFixture(t)
	root := makeCA(t, f, "Root CA", nil, nil)
	issuing := makeCA(t, f, "Intermediate", root, asIstio)
	secret := t.TempDir()
	process.Mount(t, secret, istioSet(t, issuing, root))
	mount(t, f, secret)
	f.mustOpen(t)
	set := istioSet(t, issuing, root)
	delete(set, "ca-key.pem")
	process.Mount(t, secret, set)
	mount(t, f, secret) // another process
	f.reopen(t)
	if err := f.ca.Ready(t.Context()); err == nil {
		t.Error("it says that it is ready")
	}
	if problems := f.problemsText(); !strings.Contains(problems, "ca-key.pem is missing") {
		t.Errorf("the problems are %q", problems)
	}
	process.Mount(t, secret, istioSet(t, issuing, root))
	f.eventually(t, "the key", func() error { return f.ca.Ready(t.Context()) })
	if err := f.signs(t, issuing); err != nil {
		t.Error(err)
	}
	f.eventually(t, "no problem", func() error { return problem(f) })
}

// renewed is a root with the same key and name, and another life.
func renewed(t *testing.T, root *madeCA, change func(*x509.Certificate)) *madeCA {
	t.Helper()
	template := *root.cert
	template.SerialNumber = newSerialNumber(t)
	change(&template)
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, root.key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	return &madeCA{parse(t, der), root.key}
}

// TestAnIntermediateMayOutliveTheRootThatARenewalReplaced: the old root and the renewed one have one key and are both trusted, the old one for longer. The intermediate ends
// before the renewed one does.
func TestAnIntermediateMayOutliveTheRootThatARenewalReplaced(t *testing.T) {
	f := newFixture(t)
	f.window = time.Minute
	old := makeCA(t, f, "Root CA", nil, func(c *x509.Certificate) { c.NotAfter = c.NotBefore.AddDate(0, 9, 0) })
	new := renewed(t, old, func(c *x509.Certificate) { c.NotAfter = c.NotBefore.AddDate(5, 0, 0) })
	before := makeCA(t, f, "Intermediate", old, asIstio)
	after := makeCA(t, f, "Next intermediate", new, func(c *x509.Certificate) { asIstio(c); c.NotAfter = c.NotBefore.AddDate(1, 0, 0) })
	secret := t.TempDir()
	process.Mount(t, secret, istioSet(t, before, old))
	mount(t, f, secret)
	f.mustOpen(t)
	process.Mount(t, secret, istioSet(t, before, old, new))
	f.eventually(t, "the renewed root in the bundle", func() error {
		if roots := f.ca.Bundle().Roots; len(roots) != 2 || !roots[0].Equal(old.cert) {
			return fmt.Errorf("it has %d roots", len(roots))
		}
		return nil
	})
	f.clock.pass(time.Hour) // nothing unseen is left
	process.Mount(t, secret, istioSet(t, after, new, old))
	f.eventually(t, "the next intermediate", func() error { return errors.Join(f.signs(t, after), problem(f)) })
}

// problem makes an error of the CA's problems.
func problem(f *fixture) error {
	if text := f.problemsText(); text != "" {
		return errors.New(text)
	}
	return nil
}

// TestAnIntermediateMayBeOlderThanItsRenewedRoot: the root was renewed with its key, and only the renewed one is left.
func TestAnIntermediateMayBeOlderThanItsRenewedRoot(t *testing.T) {
	f := newFixture(t)
	old := makeCA(t, f, "Root CA", nil, func(c *x509.Certificate) { c.NotBefore = c.NotBefore.AddDate(-1, 0, 0) })
	issuing := makeCA(t, f, "Intermediate", old, func(c *x509.Certificate) { asIstio(c); c.NotBefore = c.NotBefore.AddDate(0, -2, 0) })
	new := renewed(t, old, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = f.clock.clock().Wall().Add(-time.Hour), c.NotAfter.AddDate(5, 0, 0)
	})
	secret := t.TempDir()
	process.Mount(t, secret, istioSet(t, issuing, new))
	mount(t, f, secret)
	f.mustOpen(t)
	if err := f.signs(t, issuing); err != nil {
		t.Error(err)
	}
}

func newSerialNumber(t *testing.T) *big.Int {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	return serial
}
