package pkcs11

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/contracttest"
	"kedge/hsm"
	"kedge/test/hsmparts"
)

// TestMain lets the test program be the child that a module lives in.
func TestMain(m *testing.M) {
	if hsm.IsChild(os.Args) {
		os.Exit(hsm.ChildMain())
	}
	os.Setenv("GORACE", "atexit_sleep_ms=0") // for the children: under the race detector each would take a second to end
	os.Exit(m.Run())
}

// each runs a test on a token of each kind.
func each(t *testing.T, test func(t *testing.T, p *hsmparts.Part)) {
	for _, name := range []string{"SoftHSM", "NSS", "TPM", "opencryptoki"} {
		t.Run(name, func(t *testing.T) { test(t, hsmparts.All()[name](t)) })
	}
}

func openToken(t *testing.T, p *hsmparts.Part) *hsm.Token {
	t.Helper()
	token, err := hsm.Open(p.Options())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { token.Close() })
	return token
}

func TestTheKeyStoreKeepsItsPromisesOnEveryToken(t *testing.T) {
	each(t, func(t *testing.T, p *hsmparts.Part) {
		// RSA keys are made one at a time and take seconds to find: the kinds that a token makes are hsm's test, and here the first two stand for them.
		var kinds []ca.KeySpec
		for _, spec := range p.Specs[:min(2, len(p.Specs))] {
			kinds = append(kinds, ca.KeySpec(spec))
		}
		others := []ca.KeySpec{}
		for _, spec := range contracttest.AllKeySpecs {
			if !slices.Contains(kinds, spec) {
				others = append(others, spec)
			}
		}
		whole, token := t, openToken(t, p)
		newStore := func(t *testing.T) ca.KeyStore {
			s, err := OpenKeyStore(KeyStoreOptions{Token: token})
			if err != nil {
				t.Fatal(err)
			}
			return limited{s, others}
		}
		contracttest.KeyStore(t, newStore, func(t *testing.T, before ca.KeyStore) ca.KeyStore {
			token.Close()
			token = openToken(whole, p) // as another run of the program does
			return newStore(t)
		}, faults[ca.KeyStore](p), kinds...)
	})
}

// limited is a key store that makes fewer kinds of keys.
type limited struct {
	*KeyStore
	not []ca.KeySpec
}

func (l limited) Create(ctx context.Context, spec ca.KeySpec) (string, crypto.Signer, error) {
	if slices.Contains(l.not, spec) {
		return "", nil, errors.New("not here")
	}
	return l.KeyStore.Create(ctx, spec)
}

// faults take away the files or the process behind a token. NSS goes on with files that it has open, and the soft token of opencryptoki belongs to the whole machine: what hsm does when their
// children are gone is its own test.
func faults[T any](p *hsmparts.Part) map[string]func(T) contracttest.Fault {
	all := map[string]func(T) contracttest.Fault{}
	add := func(name string, fault contracttest.Fault) {
		fault.Says = p.URI.Token
		all[name] = func(T) contracttest.Fault { return fault }
	}
	switch p.Name {
	case "TPM":
		add("its process killed", contracttest.Fault{Away: func(*testing.T) { p.TPM.Kill() }, Back: func(t *testing.T) { p.TPM.Start(t) }})
		add("its process stopped", contracttest.Fault{Away: func(t *testing.T) { p.TPM.Signal(t, syscall.SIGSTOP) }, Back: func(t *testing.T) { p.TPM.Signal(t, syscall.SIGCONT) }, Hangs: true})
	case "SoftHSM":
		files := filepath.Join(p.Dir, "tokens")
		rename := func(from, to string) func(*testing.T) {
			return func(t *testing.T) {
				if err := os.Rename(from, to); err != nil {
					t.Fatal(err)
				}
			}
		}
		add("its files away", contracttest.Fault{Away: rename(files, files+".away"), Back: rename(files+".away", files)})
	}
	return all
}

// newRoot makes a root on a token: the key there, its certificate in a file.
func newRoot(t *testing.T, token *hsm.Token, spec hsm.Spec, label string) *Root {
	t.Helper()
	signer, _, err := token.Generate(t.Context(), spec, label, []byte(label))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.SignRoot(spiffeid.RequireTrustDomainFromString(contracttest.TrustDomain), signer, time.Now().Add(-time.Hour), time.Now().AddDate(1, 0, 0))
	if err != nil {
		t.Fatal(err)
	}
	r, err := OpenRoot(RootOptions{Token: token, CertificateFile: writePEM(t, cert)})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func writePEM(t *testing.T, certs ...*x509.Certificate) string {
	t.Helper()
	var text []byte
	for _, cert := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	path := filepath.Join(t.TempDir(), "root.pem")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestTheRootKeepsItsPromisesOnEveryToken(t *testing.T) {
	each(t, func(t *testing.T, p *hsmparts.Part) {
		root := newRoot(t, openToken(t, p), p.Specs[0], "root")
		contracttest.Root(t, func(*testing.T) ca.Root { return root }, faults[ca.Root](p))
	})
}

func TestAnIntermediateOnATokenIsPartOfEveryChain(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	token := openToken(t, p)
	made := func(name string, spec hsm.Spec, pathLength int, by *x509.Certificate) *x509.Certificate {
		signer, _, err := token.Generate(t.Context(), spec, name, []byte(name))
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(pathLength, 0, 0), IsCA: true, BasicConstraintsValid: true,
			MaxPathLen: pathLength, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte(name)}
		template.Subject.CommonName = name
		if by == nil {
			by = template
			by.PublicKey = signer.Public()
		}
		bySigner, _, err := token.Find(t.Context(), by.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificate(nil, template, by, signer.Public(), bySigner)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	upper := made("upper", hsm.P384, 2, nil)
	lower := made("lower", hsm.P256, 1, upper)
	key, err := ca.GenerateKey(ca.P256)
	if err != nil {
		t.Fatal(err)
	}
	r, err := OpenRoot(RootOptions{Token: token, CertificateFile: writePEM(t, lower, upper)})
	if err != nil {
		t.Fatal(err)
	}
	chain, err := r.Certify(t.Context(), ca.CertifyRequest{PublicKey: key.Public(), TrustDomain: contracttest.TrustDomain, CommonName: "issuing", NotBefore: time.Now(), NotAfter: time.Now().AddDate(5, 0, 0)})
	if err != nil || len(chain) != 2 || !chain[1].Equal(lower) || chain[0].NotAfter.After(lower.NotAfter) {
		t.Errorf("the chain has %d, %v", len(chain), err)
	}
	for want, certs := range map[string][]*x509.Certificate{"does not lead to a self-signed root": {lower}, "take the others out": {upper, lower}} {
		r, err := OpenRoot(RootOptions{Token: token, CertificateFile: writePEM(t, certs...)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Roots(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
	}
}

func TestACertificateThatComesLateIsTakenUp(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	token := openToken(t, p)
	good := newRoot(t, token, hsm.P256, "root").o.CertificateFile
	late := filepath.Join(t.TempDir(), "mounted", "root.pem")
	r, err := OpenRoot(RootOptions{Token: token, CertificateFile: late})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := r.Roots(t.Context()); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), late) {
			t.Errorf("before the file is there: %v", err)
		}
	}
	if err := r.Problem(); err == nil || !strings.Contains(err.Error(), late) {
		t.Errorf("the problem is %v", err)
	}
	if len(r.Changed()) > 0 {
		t.Error("something changed before the file was there")
	}
	if err := os.Symlink(filepath.Dir(good), filepath.Dir(late)); err != nil {
		t.Fatal(err)
	}
	if roots, err := r.Roots(t.Context()); err != nil || len(roots) != 1 {
		t.Errorf("once the file is there: %d roots, %v", len(roots), err)
	}
	if len(r.Changed()) != 1 || r.Problem() != nil {
		t.Errorf("once the file is there %d changes are told, and the problem is %v", len(r.Changed()), r.Problem())
	}
}

func TestWhatATokenSaysOfAKeyDecidesWhetherItIsGoodEnough(t *testing.T) {
	good := hsm.Key{Label: "k", Sensitive: hsm.Yes, Extractable: hsm.No, NeverExtractable: hsm.Yes, AlwaysSensitive: hsm.Yes, Local: hsm.Yes}
	for want, change := range map[string]func(*hsm.Key){
		"":                     func(*hsm.Key) {},
		"can be exported":      func(k *hsm.Key) { k.Extractable = hsm.Yes },
		"can be read":          func(k *hsm.Key) { k.Sensitive = hsm.No },
		"could once be export": func(k *hsm.Key) { k.NeverExtractable = hsm.No },
		"was not made on it":   func(k *hsm.Key) { k.NeverExtractable, k.Local = hsm.Unsaid, hsm.No },
	} {
		k := good
		change(&k)
		err := Acceptable(k, false)
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
		if err := Acceptable(k, true); err != nil {
			t.Errorf("it is allowed: %v", err)
		}
	}
	if err := Acceptable(hsm.Key{AlwaysAuthenticate: hsm.Yes}, true); err == nil {
		t.Error("a key that wants the PIN for each signature is good enough")
	}
	for _, k := range []hsm.Key{{Label: "silent"}, {Local: hsm.No, NeverExtractable: hsm.Yes, Sensitive: hsm.Yes, Extractable: hsm.No}} { // what NSS says
		if err := Acceptable(k, false); err != nil {
			t.Error(err)
		}
	}
}

func TestAnImportedKeyIsRefusedUnlessItIsAllowed(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	p.Import(t, "imported", "0a0b")
	token := openToken(t, p)
	keys, err := token.Keys(t.Context())
	if err != nil || len(keys) != 1 {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	if err := Acceptable(keys[0], false); err == nil {
		t.Errorf("%+v is good enough", keys[0])
	}
}
