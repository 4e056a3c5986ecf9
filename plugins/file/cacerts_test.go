package file

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"maps"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/contracttest"
	"kedge/test/process"
)

// someCA is a CA as Istio's own tools make it: no SPIFFE ID, a DNS name, an intermediate with the path length 0.
type someCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newSomeCA(t testing.TB, name string, by *someCA, change func(*x509.Certificate)) *someCA {
	t.Helper()
	key, err := ca.GenerateKey(ca.P256)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{Organization: []string{"Istio"}, CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true}
	parent, signer := template, key
	if by != nil {
		template.NotAfter, template.MaxPathLenZero, template.DNSNames = now.AddDate(2, 0, 0), true, []string{"istiod.istio-system.svc"}
		parent, signer = by.cert, by.key
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &someCA{cert, key}
}

func pemOf(cas ...*someCA) string {
	var text bytes.Buffer
	for _, c := range cas {
		pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})
	}
	return text.String()
}

func keyPEM(t testing.TB, key crypto.Signer, kind string) string {
	t.Helper()
	var der []byte
	var err error
	switch kind {
	case sec1Type:
		der, err = x509.MarshalECPrivateKey(key.(*ecdsa.PrivateKey))
	case pkcs1Type:
		der = x509.MarshalPKCS1PrivateKey(key.(*rsa.PrivateKey))
	default:
		der, err = x509.MarshalPKCS8PrivateKey(key)
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// cacerts are the files of istiod's Secret, as Istio's tools/certs make them: the chain file has the CA itself and the root.
func cacerts(t testing.TB, root, intermediate *someCA) map[string]string {
	return map[string]string{"ca-cert.pem": pemOf(intermediate), "ca-key.pem": keyPEM(t, intermediate.key, clearType), "cert-chain.pem": pemOf(intermediate, root), "root-cert.pem": pemOf(root)}
}

// quick is how often files are looked at in tests.
const quick = 10 * time.Millisecond

func openCACerts(t testing.TB, dir string, change func(*CACertsOptions)) *CACerts {
	t.Helper()
	o := CACertsOptions{Dir: dir, TrustDomain: contracttest.TrustDomain, PollInterval: quick}
	if change != nil {
		change(&o)
	}
	c, err := OpenCACerts(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// settled waits until the watch has looked once more.
func settled(t testing.TB, w *watch) {
	t.Helper()
	for w.current() == nil { // until the test's own time is up
		<-time.After(quick)
	}
}

func change(files map[string]string, name, text string) map[string]string {
	changed := maps.Clone(files)
	if text == "" {
		delete(changed, name)
	} else {
		changed[name] = text
	}
	return changed
}

// badSet is a set that must be refused, and what monitoring is told of it.
type badSet struct {
	files  map[string]string
	file   string
	reason ca.Reason
}

// badSets are by what is said of them.
func badSets(t testing.TB, root, good *someCA) map[string]badSet {
	files := cacerts(t, root, good)
	stranger, other := newSomeCA(t, "Another Root", nil, nil), newSomeCA(t, "Other Intermediate", root, nil)
	expired := newSomeCA(t, "Intermediate", root, func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(time.Minute) })
	early := newSomeCA(t, "Intermediate", root, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) })
	long := newSomeCA(t, "Intermediate", root, func(c *x509.Certificate) { c.NotAfter = root.cert.NotAfter.Add(time.Hour) })
	leaf := newSomeCA(t, "Leaf", root, func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false })
	below := newSomeCA(t, "Below", good, nil)
	elsewhere := newSomeCA(t, "Elsewhere", root, func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "elsewhere"}} })
	return map[string]badSet{
		"ca-key.pem is missing":                     {change(files, "ca-key.pem", ""), "ca-key.pem", ca.Incomplete},
		"root-cert.pem is missing":                  {change(files, "root-cert.pem", ""), "root-cert.pem", ca.Incomplete},
		"there is neither ca-cert.pem nor tls.crt":  {change(files, "ca-cert.pem", ""), "ca-cert.pem", ca.Incomplete},
		"ca-key.pem does not belong to ca-cert.pem": {change(files, "ca-key.pem", keyPEM(t, other.key, clearType)), "ca-key.pem", ca.Mismatched},
		"ca-cert.pem does not lead to any root":     {change(files, "root-cert.pem", pemOf(stranger)), "ca-cert.pem", ca.Mismatched},
		"does not belong to the chain":              {change(files, "cert-chain.pem", pemOf(good, stranger)), "cert-chain.pem", ca.Mismatched},
		"PEM blocks begin in it":                    {change(files, "root-cert.pem", pemOf(root)+"-----BEGIN CERTIFICATE-----\nAAAA"), "root-cert.pem", ca.Unreadable},
		"only certificates belong there":            {change(files, "root-cert.pem", pemOf(root)+keyPEM(t, root.key, clearType)), "root-cert.pem", ca.Unreadable},
		"ca-key.pem: it holds no PEM block":         {change(files, "ca-key.pem", "nothing"), "ca-key.pem", ca.Unreadable},
		"in the old form of PEM":                    {change(files, "ca-key.pem", "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n-----END EC PRIVATE KEY-----\n"), "ca-key.pem", ca.Unreadable},
		"expired at":                                {cacerts(t, root, expired), "ca-cert.pem", ca.Expired},
		"is valid only from":                        {cacerts(t, root, early), "ca-cert.pem", ca.NotYetValid},
		`ca-cert.pem: the certificate "CN=Intermediate,O=Istio" would outlive its issuer`: {cacerts(t, root, long), "ca-cert.pem", ca.OutlivesIssuer},
		"it is not a CA certificate":               {cacerts(t, root, leaf), "ca-cert.pem", ca.Unfit},
		"signs for servers":                        {cacerts(t, root, newSomeCA(t, "Intermediate", root, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })), "ca-cert.pem", ca.Unfit},
		"and the configured trust domain is":       {cacerts(t, root, elsewhere), "ca-cert.pem", ca.Unfit},
		"holds 2 certificates: it is the CA's own": {change(files, "ca-cert.pem", pemOf(good, root)), "ca-cert.pem", ca.Mismatched},
		"is self-signed and not in root-cert.pem":  {change(cacerts(t, root, stranger), "root-cert.pem", pemOf(root)), "root-cert.pem", ca.Mismatched},
		`cert-chain.pem: the certificate "CN=Intermediate,O=Istio" allows 0 CAs below it`: {change(cacerts(t, root, below), "cert-chain.pem", pemOf(below, good, root)), "cert-chain.pem", ca.Unfit},
		"it is encrypted and no passphrase file is co":                                    {change(files, "ca-key.pem", sealedPEM(t, good.key)), "ca-key.pem", ca.Unreadable},
	}
}

// sealedPEM encrypts a key with the passphrase "secret".
func sealedPEM(t testing.TB, key crypto.Signer) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	encrypted, err := seal(der, []byte("secret"), iterations)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: sealedType, Bytes: encrypted}))
}

// tells makes sure that an error tells monitoring of one file.
func tells(t testing.TB, err error, file string, reason ca.Reason) {
	t.Helper()
	if found := ca.FileErrors(err); len(found) != 1 || found[0].File != file || found[0].Reason != reason {
		t.Errorf("monitoring is told %+v of: %v", found, err)
	}
}

func TestCACertsKeepThePromisesOfAnIssuingRoot(t *testing.T) {
	root := newSomeCA(t, "Root", nil, nil)
	good := newSomeCA(t, "Intermediate", root, nil)
	bad := badSets(t, root, good)
	contracttest.IssuingRoot(t, func(t *testing.T) contracttest.Moving {
		volume := t.TempDir()
		process.Mount(t, volume, cacerts(t, root, good))
		c := openCACerts(t, volume, nil)
		m := contracttest.Moving{Root: c, Faults: map[string]contracttest.Fault{"its folder away": folderAway(volume)},
			Other: func(t *testing.T) {
				process.Mount(t, volume, cacerts(t, root, newSomeCA(t, "Next Intermediate", root, nil)))
			}, Spoil: map[string]func(*testing.T){},
			Settle: func(t *testing.T) { settled(t, c.watch) }}
		for name, set := range bad {
			m.Spoil[name] = func(t *testing.T) { process.Mount(t, volume, set.files) }
		}
		return m
	})
}

func TestEachBadSetIsSaidWithItsFileAndReason(t *testing.T) {
	root := newSomeCA(t, "Root", nil, nil)
	good := newSomeCA(t, "Intermediate", root, nil)
	for want, set := range badSets(t, root, good) {
		volume := t.TempDir()
		process.Mount(t, volume, set.files)
		c := openCACerts(t, volume, nil)
		_, _, issuingErr := c.Issuing(t.Context())
		_, rootsErr := c.Roots(t.Context())
		for _, err := range []error{c.Problem(), issuingErr, rootsErr} {
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), volume) {
				t.Errorf("want %q, got: %v", want, err)
			}
			tells(t, err, set.file, set.reason)
		}
		process.Mount(t, volume, cacerts(t, root, good)) // and it heals
		<-c.Changed()
		if err := c.Problem(); err != nil {
			t.Errorf("after a good set: %v", err)
		}
	}
}

// TestACAThatIsARootKeepsThePromisesOfARoot is about what istiod makes for itself: it leaves the file of roots empty.
func TestACAThatIsARootKeepsThePromisesOfARoot(t *testing.T) {
	for name, roots := range map[string]bool{"with root-cert.pem": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			contracttest.Root(t, func(t *testing.T) ca.Root {
				root := newSomeCA(t, "istiod's own", nil, nil)
				files := map[string]string{"ca-cert.pem": pemOf(root), "ca-key.pem": keyPEM(t, root.key, sec1Type), "cert-chain.pem": "", "root-cert.pem": ""}
				if roots {
					files["root-cert.pem"] = pemOf(root)
				}
				volume := t.TempDir()
				process.Mount(t, volume, files)
				c := openCACerts(t, volume, nil)
				if chain, _, err := c.Issuing(t.Context()); err != nil || len(chain) > 0 {
					t.Fatalf("it brings %d certificates, %v", len(chain), err)
				}
				return c
			}, map[string]func(ca.Root) contracttest.Fault{"its folder away": func(root ca.Root) contracttest.Fault {
				f := folderAway(root.(*CACerts).dir)
				f.Holds = true
				return f
			}})
		})
	}
}

func TestBothLayoutsAndEveryFormOfAKeyAreRead(t *testing.T) {
	root := newSomeCA(t, "Root", nil, nil)
	upper := newSomeCA(t, "Upper", root, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false })
	lower := newSomeCA(t, "Lower", upper, func(c *x509.Certificate) { c.NotAfter = upper.cert.NotAfter })
	second := newSomeCA(t, "Second Root", nil, nil)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaDER, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "RSA"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().AddDate(1, 0, 0), KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true}, root.cert, rsaKey.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	rsaCert, err := x509.ParseCertificate(rsaDER)
	if err != nil {
		t.Fatal(err)
	}
	withRSA := &someCA{rsaCert, rsaKey}
	phrase := filepath.Join(t.TempDir(), "passphrase")
	if err := os.WriteFile(phrase, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		files      map[string]string
		passphrase string
		chain      int
		roots      int
	}{
		"istiod's, PKCS#8":             {cacerts(t, root, newSomeCA(t, "I", root, nil)), "", 1, 1},
		"istiod's, the chain in order": {map[string]string{"ca-cert.pem": pemOf(lower), "ca-key.pem": keyPEM(t, lower.key, sec1Type), "cert-chain.pem": pemOf(lower, upper, root), "root-cert.pem": pemOf(root)}, "", 2, 1},
		"istiod's, the chain upside down": {map[string]string{"ca-cert.pem": pemOf(lower), "ca-key.pem": keyPEM(t, lower.key, sec1Type), "cert-chain.pem": pemOf(root, upper), "root-cert.pem": pemOf(second, root)},
			"", 2, 2},
		"tls.crt with its chain": {map[string]string{"tls.crt": pemOf(lower, upper), "tls.key": keyPEM(t, lower.key, clearType), "ca.crt": pemOf(root)}, "", 2, 1},
		"PKCS#1":                 {map[string]string{"tls.crt": pemOf(withRSA), "tls.key": keyPEM(t, rsaKey, pkcs1Type), "ca.crt": pemOf(root)}, "", 1, 1},
		"encrypted PKCS#8":       {map[string]string{"tls.crt": pemOf(lower, upper), "tls.key": sealedPEM(t, lower.key), "ca.crt": pemOf(root)}, phrase, 2, 1},
	} {
		t.Run(name, func(t *testing.T) {
			volume := t.TempDir()
			process.Mount(t, volume, test.files)
			c := openCACerts(t, volume, func(o *CACertsOptions) { o.PassphraseFile = test.passphrase })
			if err := c.Problem(); err != nil {
				t.Fatal(err)
			}
			chain, key, err := c.Issuing(t.Context())
			if err != nil || len(chain) != test.chain || key == nil {
				t.Errorf("the chain has %d, %v", len(chain), err)
			}
			anchors, err := c.Roots(t.Context())
			if err != nil || len(anchors) != test.roots || !anchors[0].Equal(root.cert) {
				t.Errorf("there are %d roots, %v", len(anchors), err)
			}
		})
	}
}

func TestAKeyThatOthersMayReadIsRefused(t *testing.T) {
	root := newSomeCA(t, "Root", nil, nil)
	volume := t.TempDir()
	process.Mount(t, volume, cacerts(t, root, newSomeCA(t, "Intermediate", root, nil)))
	key := filepath.Join(volume, "ca-key.pem")
	for mode, bad := range map[os.FileMode]bool{0o644: true, 0o640: false, 0o440: false, 0o660: true} {
		if err := os.Chmod(key, mode); err != nil {
			t.Fatal(err)
		}
		err := openCACerts(t, volume, nil).Problem()
		if bad != (err != nil) || err != nil && !strings.Contains(err.Error(), "defaultMode 0400") {
			t.Errorf("mode %#o: %v", mode, err)
		}
		if bad {
			tells(t, err, "ca-key.pem", ca.Exposed)
		}
	}
}

func TestACRLThatIsNoGoodIsSaidAndStandsInNobodysWay(t *testing.T) {
	root := newSomeCA(t, "Root", nil, nil)
	good := newSomeCA(t, "Intermediate", root, nil)
	stranger := newSomeCA(t, "Stranger", nil, nil)
	crl := func(by *someCA, next time.Duration) string {
		der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-48 * time.Hour), NextUpdate: time.Now().Add(next)}, by.cert, by.key)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: crlType, Bytes: der}))
	}
	for want, test := range map[string]struct {
		text   string
		reason ca.Reason
	}{
		"":                               {crl(root, time.Hour) + crl(good, time.Hour), ""},
		"one of every CA of a chain":     {crl(root, time.Hour), ca.Incomplete},
		"is of no CA in the set":         {crl(root, time.Hour) + crl(stranger, time.Hour), ca.Mismatched},
		"expired at":                     {crl(root, -time.Hour) + crl(good, time.Hour), ca.Expired},
		"ca-crl.pem: it holds a PEM blo": {pemOf(root), ca.Unreadable},
	} {
		volume := t.TempDir()
		process.Mount(t, volume, change(cacerts(t, root, good), "ca-crl.pem", test.text))
		c := openCACerts(t, volume, nil)
		err := c.Problem()
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
		if want != "" {
			tells(t, err, "ca-crl.pem", test.reason)
		}
		if chain, _, err := c.Issuing(t.Context()); err != nil || len(chain) != 1 {
			t.Errorf("it brings %d, %v", len(chain), err)
		}
	}
}

func TestARefusedSetIsLoggedOnceAndSoIsThatItIsGood(t *testing.T) {
	root := newSomeCA(t, "Root", nil, nil)
	good := newSomeCA(t, "Intermediate", root, nil)
	volume := t.TempDir()
	process.Mount(t, volume, cacerts(t, root, good))
	var log safeBuffer
	c := openCACerts(t, volume, func(o *CACertsOptions) { o.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	process.Mount(t, volume, change(cacerts(t, root, good), "ca-key.pem", ""))
	settled(t, c.watch)
	for range 3 {
		c.watch.again()
	}
	process.Mount(t, volume, cacerts(t, root, newSomeCA(t, "Next", root, nil)))
	<-c.Changed()
	text := log.String()
	if strings.Count(text, "ca-key.pem is missing") != 1 || strings.Count(text, "files are good again") != 1 || strings.Contains(text, "PRIVATE KEY") {
		t.Errorf("the log says:\n%s", text)
	}
}

// TestARefusedSetIsLookedIntoOnce: opening an encrypted key takes long, and the files are looked at every three seconds. What the time of day decides is judged anew each time, and so is
// everything once a file, or the passphrase, has changed.
func TestARefusedSetIsLookedIntoOnce(t *testing.T) {
	root := newSomeCA(t, "Root", nil, nil)
	young := newSomeCA(t, "Intermediate", root, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) })
	volume, phrase := t.TempDir(), writePassphrase(t, "wrong")
	good := change(cacerts(t, root, young), "ca-key.pem", sealedPEM(t, young.key))
	process.Mount(t, volume, good)
	var later atomic.Int64 // hours
	c := openCACerts(t, volume, func(o *CACertsOptions) {
		o.PassphraseFile, o.PollInterval = phrase, time.Hour
		o.Now = func() time.Time { return time.Now().Add(time.Duration(later.Load()) * time.Hour) }
	})
	looks := func(says string) (verdicts int) {
		t.Helper()
		seen := map[*verdict]bool{}
		for range 5 {
			c.watch.again()
			seen[c.latest] = true
			if err := c.watch.current(); says == "" && err != nil || says != "" && (err == nil || !strings.Contains(err.Error(), says)) {
				t.Errorf("it says %v, want %q", err, says)
			}
		}
		return len(seen)
	}
	before := c.latest
	if n := looks("the passphrase is wrong"); n != 1 || c.latest != before {
		t.Errorf("a set with a wrong passphrase was looked into %d times", n)
	}
	if err := os.WriteFile(phrase, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n := looks("is valid only from"); n != 1 || c.latest == before {
		t.Errorf("a set that is not valid yet, with another passphrase than before, was looked into %d times", n)
	}
	before = c.latest
	later.Store(2)
	if n := looks(""); n != 1 || c.latest != before {
		t.Errorf("when its time has come it was looked into %d times", n)
	}
	if _, err := c.Roots(t.Context()); err != nil {
		t.Error(err)
	}
	// A bad set that comes and goes leaves the one that counts as it was.
	process.Mount(t, volume, change(cacerts(t, root, young), "ca-key.pem", ""))
	looks("ca-key.pem is missing")
	before = c.counts
	process.Mount(t, volume, good)
	if n := looks(""); n != 1 || c.latest != before {
		t.Errorf("what counts already was looked into %d times", n)
	}
	// A passphrase that cannot be read is no verdict on the set.
	if err := os.Chmod(phrase, 0o644); err != nil {
		t.Fatal(err)
	}
	if n := looks("the passphrase file"); n != 1 || c.latest != before {
		t.Errorf("without a passphrase it was looked into %d times", n)
	}
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestAnchorsKeepTheirPromises(t *testing.T) {
	one, two := newSomeCA(t, "One", nil, nil), newSomeCA(t, "Two", nil, nil)
	old := newSomeCA(t, "Old", nil, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	path := func(t *testing.T, text string) string {
		file := filepath.Join(t.TempDir(), "anchors.pem")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	rewrite := func(t *testing.T, file, text string) {
		if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	open := func(t *testing.T, file string) *Anchors {
		a, err := OpenAnchors(AnchorsOptions{File: file, TrustDomain: contracttest.TrustDomain, PollInterval: quick})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { a.Close() })
		return a
	}
	contracttest.Anchors(t, func(t *testing.T) (ca.Anchors, func(*testing.T)) {
		file := path(t, pemOf(one, two))
		return open(t, file), func(t *testing.T) { rewrite(t, file, pemOf(two)) }
	}, map[string]func(ca.Anchors) contracttest.Fault{
		"its folder away": func(anchors ca.Anchors) contracttest.Fault { return folderAway(filepath.Dir(anchors.(*Anchors).path)) },
	})
	t.Run("a bad file is refused as a whole", func(t *testing.T) {
		leaf := newSomeCA(t, "Leaf", nil, func(c *x509.Certificate) { c.IsCA = false })
		file := path(t, pemOf(one))
		a := open(t, file)
		rewrite(t, file, pemOf(two, leaf))
		settled(t, a.watch)
		certs, err := a.Anchors(t.Context())
		if err != nil || len(certs) != 1 || !certs[0].Equal(one.cert) {
			t.Errorf("%d anchors, %v", len(certs), err)
		}
		if err := a.Problem(); err == nil || !strings.Contains(err.Error(), "not a CA certificate") || !strings.Contains(err.Error(), file) {
			t.Errorf("the problem is %v", err)
		}
		tells(t, a.Problem(), "anchors.pem", ca.Unfit)
		rewrite(t, file, pemOf(two))
		<-a.Changed()
		if err := a.Problem(); err != nil {
			t.Error(err)
		}
	})
	t.Run("an expired one is left out, and said", func(t *testing.T) {
		a := open(t, path(t, pemOf(one, old)))
		certs, err := a.Anchors(t.Context())
		if err != nil || len(certs) != 1 {
			t.Errorf("%d anchors, %v", len(certs), err)
		}
		if err := a.Problem(); err == nil || !strings.Contains(err.Error(), "left out") {
			t.Errorf("the problem is %v", err)
		}
		tells(t, a.Problem(), "anchors.pem", ca.Expired)
	})
	t.Run("a missing file is said, and heals", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "anchors.pem")
		a := open(t, file)
		if _, err := a.Anchors(t.Context()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("without the file: %v", err)
		}
		tells(t, a.Problem(), "anchors.pem", ca.Incomplete)
		rewrite(t, file, "")
		<-a.Changed()
		if certs, err := a.Anchors(t.Context()); err != nil || len(certs) != 0 {
			t.Errorf("%d anchors, %v", len(certs), err)
		}
	})
}

// FuzzCASet: whatever the files hold, they are refused, or make a set whose key is the CA's and whose chain leads to its first root.
func FuzzCASet(f *testing.F) {
	root := newSomeCA(f, "Root", nil, nil)
	good := cacerts(f, root, newSomeCA(f, "Intermediate", root, nil))
	own := cacerts(f, root, root)
	for _, files := range []map[string]string{good, own, change(good, "root-cert.pem", ""), change(good, "cert-chain.pem", "")} {
		f.Add([]byte(files["ca-cert.pem"]), []byte(files["ca-key.pem"]), []byte(files["cert-chain.pem"]), []byte(files["root-cert.pem"]), []byte{})
	}
	f.Add([]byte(good["ca-cert.pem"]), []byte(good["ca-key.pem"]), []byte{}, []byte(good["root-cert.pem"]), []byte("-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n"))
	td := spiffeid.RequireTrustDomainFromString(contracttest.TrustDomain)
	f.Fuzz(func(t *testing.T, cert, key, chain, roots, crl []byte) {
		names := map[string][]byte{istioLayout.cert: cert, istioLayout.key: key, istioLayout.chain: chain, istioLayout.roots: roots, istioLayout.crl: crl}
		for _, l := range []layout{istioLayout, tlsLayout} {
			files := contents{l.cert: bytes.Clone(cert), l.key: bytes.Clone(key), l.roots: bytes.Clone(roots)}
			if l == istioLayout {
				for name, text := range names {
					files[name] = bytes.Clone(text)
				}
			}
			s, err := parseCASet("/", files, passphrase{}, td)
			if (s == nil) == (err == nil) {
				t.Fatalf("a set %v and the error %v", s, err)
			}
			if err != nil {
				continue
			}
			if pub := s.key.Public().(interface{ Equal(crypto.PublicKey) bool }); !pub.Equal(s.cert.PublicKey) {
				t.Fatal("the key is another's")
			}
			for i, link := range s.chain {
				issuer := s.roots[0]
				if i+1 < len(s.chain) {
					issuer = s.chain[i+1]
				}
				if err := link.CheckSignatureFrom(issuer); err != nil {
					t.Fatalf("link %d of %d: %v", i, len(s.chain), err)
				}
			}
			if len(s.chain) == 0 && !s.roots[0].Equal(s.cert) {
				t.Fatal("a CA without a chain is not its own root")
			}
			_ = errors.Join(s.usable(time.Now()), s.remarks(time.Now())) // which must not panic
		}
	})
}
