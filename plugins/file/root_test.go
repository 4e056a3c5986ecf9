package file

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/ca"
	"kedge/ca/contracttest"
)

// openRootIn makes the test binary a program that opens a root in the folder named there, for tests that kill it.
const openRootIn = "KEDGE_TEST_OPEN_ROOT_IN"

func TestMain(m *testing.M) {
	if dir := os.Getenv(openRootIn); dir != "" {
		root, err := OpenRoot(RootOptions{Dir: dir, TrustDomain: contracttest.TrustDomain})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Printf("%x\n", root.cert.SerialNumber)
		return
	}
	os.Exit(m.Run())
}

// openRoot opens a root, and says that a ledger has it.
func openRoot(t *testing.T, o RootOptions) *Root {
	t.Helper()
	root := openUnrecorded(t, o)
	if err := root.Recorded(); err != nil {
		t.Fatal(err)
	}
	return root
}

func openUnrecorded(t *testing.T, o RootOptions) *Root {
	t.Helper()
	if o.TrustDomain == "" {
		o.TrustDomain = contracttest.TrustDomain
	}
	root, err := OpenRoot(o)
	if err != nil {
		t.Fatalf("OpenRoot: %v", err)
	}
	return root
}

func writePassphrase(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "passphrase")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRootKeepsTheContract(t *testing.T) {
	contracttest.Root(t, func(t *testing.T) ca.Root {
		return openRoot(t, RootOptions{Dir: filepath.Join(t.TempDir(), "root")})
	}, map[string]func(ca.Root) contracttest.Fault{"its folder away": func(root ca.Root) contracttest.Fault { return folderAway(root.(*Root).dir) }})
}

// folderAway is the fault of a folder that is not mounted any more.
func folderAway(dir string) contracttest.Fault {
	rename := func(from, to string) func(t *testing.T) {
		return func(t *testing.T) {
			if err := os.Rename(from, to); err != nil {
				t.Fatal(err)
			}
		}
	}
	return contracttest.Fault{Away: rename(dir, dir+".away"), Back: rename(dir+".away", dir), Says: dir}
}

func TestEveryKindOfRootKeySignsChainsThatVerify(t *testing.T) {
	for _, spec := range []ca.KeySpec{"", ca.P256, ca.P384, ca.RSA2048} {
		t.Run(string(spec), func(t *testing.T) {
			root := openRoot(t, RootOptions{Dir: t.TempDir(), KeySpec: spec})
			key, err := ca.GenerateKey(ca.P256)
			if err != nil {
				t.Fatal(err)
			}
			now := time.Now()
			chain, err := root.Certify(t.Context(), ca.CertifyRequest{PublicKey: key.Public(), TrustDomain: contracttest.TrustDomain,
				CommonName: "issuing", NotBefore: now, NotAfter: now.Add(time.Hour)})
			if err != nil {
				t.Fatalf("Certify: %v", err)
			}
			pool := x509.NewCertPool()
			pool.AddCert(root.cert)
			if _, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
				t.Fatalf("Verify: %v", err)
			}
			verifyWithOpenSSL(t, root.CertificateFile(), chain[0])
		})
	}
}

// verifyWithOpenSSL has openssl judge the chain by its strictest rules.
func verifyWithOpenSSL(t *testing.T, rootFile string, cert *x509.Certificate) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "issuing.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("openssl", "verify", "-x509_strict", "-check_ss_sig", "-CAfile", rootFile, path).CombinedOutput(); err != nil {
		t.Fatalf("openssl verify: %v\n%s", err, out)
	}
}

func TestFirstStartMakesARootAndLaterOnesFindIt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data", "root")
	now := time.Date(2026, 3, 4, 5, 6, 7, 8, time.UTC)
	o := RootOptions{Dir: dir, Lifetime: 1000 * time.Hour, Now: func() time.Time { return now }}
	first := openRoot(t, o)
	if !first.Created() {
		t.Error("the root was made, and Created says no")
	}
	cert := first.cert
	switch {
	case cert.MaxPathLen != 1:
		t.Errorf("path length constraint %d instead of 1 (root, issuing CA, leaf)", cert.MaxPathLen)
	case cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign:
		t.Errorf("keyUsage %#x", cert.KeyUsage)
	case len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://"+contracttest.TrustDomain:
		t.Errorf("URI SANs %v", cert.URIs)
	case len(cert.SerialNumber.Bytes()) != 20 || cert.SerialNumber.Sign() <= 0:
		t.Errorf("serial number %x", cert.SerialNumber)
	case len(cert.SubjectKeyId) != 20:
		t.Errorf("subject key identifier %x", cert.SubjectKeyId)
	case !cert.NotAfter.Equal(now.Truncate(time.Second).Add(1000 * time.Hour)):
		t.Errorf("valid until %s", cert.NotAfter)
	case !cert.NotBefore.Before(now) || cert.NotBefore.Before(now.Add(-24*time.Hour)):
		t.Errorf("valid from %s", cert.NotBefore)
	case cert.Subject.CommonName == "" || len(cert.Subject.Organization) != 1:
		t.Errorf("subject %s", cert.Subject)
	}
	for path, mode := range map[string]os.FileMode{dir: 0o700, first.path(keyFile): 0o600, first.path(certificateFile): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	o.KeySpec = ca.P384 // of a root that would be made
	again := openRoot(t, o)
	if again.Created() || !again.cert.Equal(cert) {
		t.Error("the second start made another root")
	}
}

// A first start may be cut short after any of its writes. What it left is what these states are.
func TestAFirstStartThatWasCutShortIsFinished(t *testing.T) {
	whole := openRoot(t, RootOptions{Dir: t.TempDir()})
	key, err := os.ReadFile(whole.path(keyFile))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := os.ReadFile(whole.path(certificateFile))
	if err != nil {
		t.Fatal(err)
	}
	for name, state := range map[string]struct {
		files map[string][]byte
		same  bool // the root of those files is the one to find
	}{
		"before anything":             {files: map[string][]byte{}},
		"while writing the key":       {files: map[string][]byte{"." + newKeyFile + ".123": key[:20]}},
		"after the key":               {files: map[string][]byte{newKeyFile: key}},
		"while writing the cert":      {files: map[string][]byte{newKeyFile: key, "." + certificateFile + ".1": cert[:99]}},
		"after the certificate":       {files: map[string][]byte{newKeyFile: key, certificateFile: cert}, same: true},
		"the key half, by a bad disk": {files: map[string][]byte{newKeyFile: key[:40]}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir, state.files)
			root := openRoot(t, RootOptions{Dir: dir})
			if !root.Created() {
				t.Error("Created says that the root was there before")
			}
			if state.same != root.cert.Equal(whole.cert) {
				t.Errorf("the root that was begun was kept: %t", !state.same)
			}
			if names := list(t, dir); names != certificateFile+" "+keyFile {
				t.Errorf("the folder holds %s", names)
			}
			if again := openRoot(t, RootOptions{Dir: dir}); again.Created() || !again.cert.Equal(root.cert) {
				t.Error("the next start made another root")
			}
		})
	}
}

// Until a ledger has it for certain, a root counts as made here, however often the program is killed in between: so the ledger that records it knows
// every certificate that will ever be under it.
func TestARootCountsAsMadeHereUntilItIsRecorded(t *testing.T) {
	dir := t.TempDir()
	first := openUnrecorded(t, RootOptions{Dir: dir})
	key, err := ca.GenerateKey(ca.P256)
	if err != nil {
		t.Fatal(err)
	}
	request := ca.CertifyRequest{PublicKey: key.Public(), TrustDomain: contracttest.TrustDomain, CommonName: "issuing",
		NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	for range 2 {
		again := openUnrecorded(t, RootOptions{Dir: dir})
		if !again.Created() || !again.cert.Equal(first.cert) {
			t.Fatal("after a crash the root counts as another's")
		}
		if _, err := again.Certify(t.Context(), request); err != nil {
			t.Errorf("it does not certify: %v", err)
		}
	}
	if err := first.Recorded(); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Certify(t.Context(), request); err != nil {
		t.Errorf("it does not certify once it is recorded: %v", err)
	}
	if later := openUnrecorded(t, RootOptions{Dir: dir}); later.Created() || !later.cert.Equal(first.cert) {
		t.Error("it still counts as new")
	}
}

func TestAKilledFirstStartGoesOnAtTheNext(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// Each start is killed once a file whose name has this in it is seen, or a little later: every outcome must be sound.
	for _, seen := range []string{"", "." + newKeyFile, newKeyFile, "." + certificateFile, certificateFile, keyFile} {
		dir := t.TempDir()
		command := exec.Command(self)
		command.Env = append(os.Environ(), openRootIn+"="+dir)
		var out bytes.Buffer
		command.Stdout = &out
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- command.Wait() }()
		for waiting := true; waiting; {
			select {
			case <-ended:
				waiting = false
			default:
				if strings.Contains(" "+list(t, dir), " "+seen) {
					command.Process.Kill() // it may have ended by itself
					<-ended
					waiting = false
				}
			}
		}
		root := openRoot(t, RootOptions{Dir: dir})
		if said := strings.TrimSpace(out.String()); said != "" && said != fmt.Sprintf("%x", root.cert.SerialNumber) {
			t.Errorf("killed at %q: the first start said that its root is %s, the next one has %x", seen, said, root.cert.SerialNumber)
		}
		if again := openRoot(t, RootOptions{Dir: dir}); again.Created() || !again.cert.Equal(root.cert) {
			t.Errorf("killed at %q: the start after that has another root", seen)
		}
	}
}

func TestWhatIsWrongWithARootIsSaidAndNeverReplacedByANewOne(t *testing.T) {
	whole := openRoot(t, RootOptions{Dir: t.TempDir()})
	other := openRoot(t, RootOptions{Dir: t.TempDir()})
	load := func(root *Root, name string) []byte {
		data, err := os.ReadFile(root.path(name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	key, cert := load(whole, keyFile), load(whole, certificateFile)
	sealedKey := sealText(t, key, "one")
	damaged, doubled := bytes.Replace(cert, []byte("MII"), []byte("MIA"), 1), bytes.Repeat(cert, 2)
	both := map[string][]byte{keyFile: key, certificateFile: cert}
	encrypted := map[string][]byte{keyFile: sealedKey, certificateFile: cert}
	at := func(years int) RootOptions {
		return RootOptions{Now: func() time.Time { return time.Now().AddDate(years, 0, 0) }}
	}
	with := func(path string) RootOptions { return RootOptions{PassphraseFile: path} }
	noPathLength := func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }
	for name, c := range map[string]struct {
		files   map[string][]byte
		options RootOptions
		mode    os.FileMode // of the key
		want    []string    // in the error
	}{
		"lost key":               {files: map[string][]byte{certificateFile: cert}, want: []string{"lost its key", keyFile, "backup"}},
		"lost certificate":       {files: map[string][]byte{keyFile: key}, want: []string{"lost its certificate", certificateFile, "backup"}},
		"two keys":               {files: map[string][]byte{keyFile: key, newKeyFile: key, certificateFile: cert}, want: []string{"two keys", "remove"}},
		"another root's key":     {files: map[string][]byte{keyFile: load(other, keyFile), certificateFile: cert}, want: []string{"does not belong"}},
		"a new key of another":   {files: map[string][]byte{newKeyFile: load(other, keyFile), certificateFile: cert}, want: []string{"does not belong"}},
		"another trust domain":   {files: both, options: RootOptions{TrustDomain: "other.example"}, want: []string{"other.example", contracttest.TrustDomain}},
		"expired":                {files: both, options: at(11), want: []string{"expired at"}},
		"not yet valid":          {files: both, options: at(-1), want: []string{"clock"}},
		"key readable by others": {files: both, mode: 0o644, want: []string{"chmod 600", keyFile, "0644"}},
		"key readable by group":  {files: both, mode: 0o640, want: []string{"chmod 600", keyFile}},
		"certificate is not PEM": {files: map[string][]byte{keyFile: key, certificateFile: []byte("hello")}, want: []string{certificateFile, "PEM"}},
		"certificate is damaged": {files: map[string][]byte{keyFile: key, certificateFile: damaged}, want: []string{certificateFile}},
		"two certificates":       {files: map[string][]byte{keyFile: key, certificateFile: doubled}, want: []string{"one certificate"}},
		"key is not PEM":         {files: map[string][]byte{keyFile: []byte("hello"), certificateFile: cert}, want: []string{keyFile, "PEM"}},
		"key is empty":           {files: map[string][]byte{keyFile: nil, certificateFile: cert}, want: []string{keyFile, "PEM"}},
		"key is huge":            {files: map[string][]byte{keyFile: make([]byte, maxFile+1), certificateFile: cert}, want: []string{keyFile, "octets"}},
		"sealed, no passphrase":  {files: encrypted, want: []string{"encrypted", "passphrase file"}},
		"sealed, wrong one":      {files: encrypted, options: with(writePassphrase(t, "two")), want: []string{"passphrase is wrong", keyFile}},
		"clear, but passphrase":  {files: both, options: with(writePassphrase(t, "two")), want: []string{"not encrypted", "openssl pkcs8"}},
		"no passphrase file":     {files: encrypted, options: with("/nowhere/passphrase"), want: []string{"/nowhere/passphrase", "passphrase file"}},
		"bad trust domain":       {options: RootOptions{TrustDomain: "Not A Domain"}, want: []string{"Not A Domain"}},
		"unknown kind of key":    {options: RootOptions{KeySpec: "DSA"}, want: []string{"DSA", "P-256"}},
		"negative lifetime":      {options: RootOptions{Lifetime: -time.Hour}, want: []string{"-1h"}},
		"an issuing CA's":        {files: ownRoot(t, noPathLength), want: []string{"path length constraint 0"}},
		"a leaf":                 {files: ownRoot(t, func(c *x509.Certificate) { c.IsCA, c.MaxPathLen = false, -1 }), want: []string{"not a CA certificate"}},
		"may not sign":           {files: ownRoot(t, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), want: []string{"keyCertSign"}},
		"two SPIFFE IDs":         {files: ownRoot(t, func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), want: []string{"trust domain"}},
		"an ID with a path":      {files: ownRoot(t, func(c *x509.Certificate) { c.URIs[0].Path = "/x" }), want: []string{"trust domain"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir, c.files)
			if c.mode != 0 {
				if err := os.Chmod(filepath.Join(dir, keyFile), c.mode); err != nil {
					t.Fatal(err)
				}
			}
			before := list(t, dir)
			c.options.Dir = dir
			if c.options.TrustDomain == "" {
				c.options.TrustDomain = contracttest.TrustDomain
			}
			_, err := OpenRoot(c.options)
			if err == nil {
				t.Fatal("OpenRoot found nothing wrong")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
			if after := list(t, dir); after != before {
				t.Errorf("OpenRoot failed and changed the folder from %s to %s", before, after)
			}
		})
	}
}

// ownRoot gives the files of a root that an admin made.
func ownRoot(t *testing.T, spoil func(*x509.Certificate)) map[string][]byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "corporate root"}, SubjectKeyId: []byte{1, 2, 3},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1,
		KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: contracttest.TrustDomain}}}
	spoil(template)
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		certificateFile: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}),
		keyFile:         pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
	}
}

func TestARootThatAnAdminMadeIsUsed(t *testing.T) {
	for name, change := range map[string]func(*x509.Certificate){
		"as it is":                func(*x509.Certificate) {},
		"without a SPIFFE ID":     func(c *x509.Certificate) { c.URIs = nil },
		"with a path length of 3": func(c *x509.Certificate) { c.MaxPathLen = 3 },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir, ownRoot(t, change))
			if root := openRoot(t, RootOptions{Dir: dir}); root.Created() {
				t.Error("Created says that OpenRoot made it")
			}
		})
	}
}

func TestTheRootKeyIsReadWhenItIsNeeded(t *testing.T) {
	root := openRoot(t, RootOptions{Dir: t.TempDir()})
	key, err := ca.GenerateKey(ca.P256)
	if err != nil {
		t.Fatal(err)
	}
	request := ca.CertifyRequest{PublicKey: key.Public(), TrustDomain: contracttest.TrustDomain, CommonName: "issuing",
		NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	away := filepath.Join(t.TempDir(), "away")
	if err := os.Rename(root.path(keyFile), away); err != nil {
		t.Fatal(err)
	}
	if _, err := root.Certify(t.Context(), request); err == nil || !strings.Contains(err.Error(), "lost its key") {
		t.Errorf("Certify without the key file: %v", err)
	}
	if err := os.Rename(away, root.path(keyFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := root.Certify(t.Context(), request); err != nil {
		t.Errorf("Certify with the key file back in its place: %v", err)
	}
}

func TestCertifyRefusesWhatIsNotForThisRoot(t *testing.T) {
	now := time.Now()
	root := openRoot(t, RootOptions{Dir: t.TempDir(), Now: func() time.Time { return now }})
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*ca.CertifyRequest)
		want   string
	}{
		"another trust domain": {func(r *ca.CertifyRequest) { r.TrustDomain = "other.example" }, "other.example"},
		"no trust domain":      {func(r *ca.CertifyRequest) { r.TrustDomain = "" }, "trust domain"},
		"a weak key":           {func(r *ca.CertifyRequest) { r.PublicKey = weak.Public() }, "1024"},
		"another curve":        {func(r *ca.CertifyRequest) { r.PublicKey = p521.Public() }, "P-521"},
		"a long name":          {func(r *ca.CertifyRequest) { r.CommonName = strings.Repeat("ü", 65) }, "64"},
		"the root's own name":  {func(r *ca.CertifyRequest) { r.CommonName = root.cert.Subject.CommonName }, "own name"},
		"after the root's end": {func(r *ca.CertifyRequest) { r.NotBefore, r.NotAfter = now.AddDate(20, 0, 0), now.AddDate(21, 0, 0) }, "no time is left"},
	} {
		t.Run(name, func(t *testing.T) {
			key, err := ca.GenerateKey(ca.P256)
			if err != nil {
				t.Fatal(err)
			}
			request := ca.CertifyRequest{PublicKey: key.Public(), TrustDomain: contracttest.TrustDomain, CommonName: "issuing",
				NotBefore: now, NotAfter: now.Add(time.Hour)}
			c.change(&request)
			if _, err := root.Certify(t.Context(), request); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Certify: %v, which does not say %q", err, c.want)
			}
		})
	}
	now = now.AddDate(11, 0, 0)
	key, err := ca.GenerateKey(ca.P256)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := root.Certify(t.Context(), ca.CertifyRequest{PublicKey: key.Public(), TrustDomain: contracttest.TrustDomain, CommonName: "issuing",
		NotBefore: now, NotAfter: now.Add(time.Hour)}); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("Certify with an expired root: %v", err)
	}
}

func TestALongTrustDomainStillGetsARoot(t *testing.T) {
	td := strings.Repeat("a123456789.", 22) + "example"
	root := openRoot(t, RootOptions{Dir: t.TempDir(), TrustDomain: td})
	if n := len(root.cert.Subject.CommonName); n == 0 || n > 64 { // RFC 5280 A.1, ub-common-name
		t.Errorf("the common name has %d characters", n)
	}
}

func TestAFolderThatOthersMayWriteToIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "root[1]")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o770); err != nil {
		t.Fatal(err)
	}
	for name, open := range map[string]func() error{
		"root":      func() error { _, err := OpenRoot(RootOptions{Dir: dir, TrustDomain: "a.example"}); return err },
		"key store": func() error { _, err := OpenKeyStore(KeyStoreOptions{Dir: dir}); return err },
	} {
		if err := open(); err == nil || !strings.Contains(err.Error(), "chmod 700 "+dir) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(dir, ".left.pem.1")
	if err := os.WriteFile(left, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenKeyStore(KeyStoreOptions{Dir: dir}); err != nil {
		t.Errorf("a folder with an odd name: %v", err)
	}
	if _, err := os.Stat(left); err == nil {
		t.Error("what a crash left is still there")
	}
}

func TestANewRootKeyIsEncryptedAndNothingSecretIsLogged(t *testing.T) {
	t.Parallel() // 600,000 iterations take a while under the race detector
	var log bytes.Buffer
	root := openRoot(t, RootOptions{Dir: t.TempDir(), PassphraseFile: writePassphrase(t, "open sesame\n"),
		Logger: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	text, err := os.ReadFile(root.path(keyFile))
	if err != nil || !strings.HasPrefix(string(text), "-----BEGIN ENCRYPTED PRIVATE KEY-----") {
		t.Errorf("the key file begins with %.40q, %v", text, err)
	}
	if !strings.Contains(log.String(), root.CertificateFile()) {
		t.Errorf("the log does not say where the new root is: %s", log.String())
	}
	if strings.Contains(log.String(), "sesame") || strings.Contains(log.String(), "PRIVATE") {
		t.Errorf("the log holds a secret: %s", log.String())
	}
}

func TestAnEncryptedRootKeySigns(t *testing.T) {
	files := ownRoot(t, func(*x509.Certificate) {})
	files[keyFile] = sealText(t, files[keyFile], "open sesame")
	dir := t.TempDir()
	put(t, dir, files)
	root := openRoot(t, RootOptions{Dir: dir, PassphraseFile: writePassphrase(t, "open sesame")})
	key, err := ca.GenerateKey(ca.P256)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := root.Certify(t.Context(), ca.CertifyRequest{PublicKey: key.Public(), TrustDomain: contracttest.TrustDomain, CommonName: "issuing",
		NotBefore: time.Now(), NotAfter: time.Now().Add(time.Minute)}); err != nil {
		t.Errorf("Certify: %v", err)
	}
}

// sealText encrypts a clear key file, with fewer iterations than Kedge writes, to be quick.
func sealText(t *testing.T, text []byte, phrase string) []byte {
	t.Helper()
	block, _ := pem.Decode(text)
	der, err := seal(block.Bytes, []byte(phrase), minIterations)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: sealedType, Bytes: der})
}

func put(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func list(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	names := make([]string, len(entries))
	for i, entry := range entries {
		names[i] = entry.Name()
	}
	return strings.Join(names, " ")
}

func TestTheFilesOfARootAreWhatABackupHolds(t *testing.T) {
	for _, recorded := range []bool{false, true} {
		root := openUnrecorded(t, RootOptions{Dir: t.TempDir()})
		if recorded {
			if err := root.Recorded(); err != nil {
				t.Fatal(err)
			}
		}
		kept, err := root.Files(t.Context())
		if err != nil || len(kept) != 2 || kept[0].Clear || !kept[1].Clear {
			t.Fatalf("%d files, %v", len(kept), err)
		}
		dir := t.TempDir()
		for _, file := range kept {
			put(t, dir, map[string][]byte{file.Name: file.Content})
		}
		again := openUnrecorded(t, RootOptions{Dir: dir})
		if !again.cert.Equal(root.cert) || again.Created() == recorded {
			t.Errorf("recorded %t: in another folder it is another root, or counts as made here: %t", recorded, again.Created())
		}
	}
}
