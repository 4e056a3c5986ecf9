package istio

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestAnAgentGetsCertificatesUnderEachRoot runs the real pilot-agent against a CA whose root and keys are elsewhere.
func TestAnAgentGetsCertificatesUnderEachRoot(t *testing.T) {
	for name, configure := range map[string]func(t *testing.T) (configuration string, above int){
		"the root in a token, keys in memory": func(t *testing.T) (string, int) {
			uri, certificate := rootInToken(t)
			return fmt.Sprintf("root: {kind: pkcs11, pkcs11: {uri: %q, certificateFile: %q}}\nissuingCA: {keyStore: memory}\n", uri, certificate), 1
		},
		"root and issuing key in a token": func(t *testing.T) (string, int) {
			uri, certificate := rootInToken(t)
			return fmt.Sprintf("root: {kind: pkcs11, pkcs11: {uri: %q, certificateFile: %q}}\nissuingCA: {keyStore: pkcs11, pkcs11: {uri: %q}}\n", uri, certificate,
				strings.Replace(uri, ";object=root", "", 1)), 1
		},
		"the root in Vault, keys in Transit": func(t *testing.T) (string, int) {
			address, token := startVault(t)
			return fmt.Sprintf("root: {kind: vault}\nissuingCA: {keyStore: vault}\nvault: {address: %q, login: {token: %q}}\n", address, token), 1
		},
	} {
		t.Run(name, func(t *testing.T) {
			configuration, above := configure(t)
			k := startKedge(t, configuration)
			a := newAgent(t, k, k.issuer.sign(t, token{}))
			a.start(t, "SECRET_TTL=1h", "ECC_SIGNATURE_ALGORITHM=ECDSA")
			id := a.waitForCertificate(t)
			if len(id.chain) != 1+above {
				t.Errorf("the chain has %d certificates", len(id.chain))
			}
			k.checkSVID(t, id.chain, agentID)
			k.recordOf(t, id.leaf())
			k.checkLedger(t)
		})
	}
}

// TestAnAgentNoticesNothingWhenKedgeTakesTheSecretOfIstiod runs the real pilot-agent against a CA that signs with what istiod signed with before, and then with another
// intermediate of the same root.
func TestAnAgentNoticesNothingWhenKedgeTakesTheSecretOfIstiod(t *testing.T) {
	t.Parallel()
	root := makeCA(t, "Istio Root", nil)
	one, two := makeCA(t, "Istio Intermediate 1", root), makeCA(t, "Istio Intermediate 2", root)
	secret := t.TempDir()
	mount(t, secret, "one", root, one)
	k := startKedge(t, fmt.Sprintf("root: {kind: cacerts, cacerts: {dir: %q}}\n", secret))
	a := newAgent(t, k, k.issuer.sign(t, token{}))
	a.start(t, "SECRET_TTL=6s", "ECC_SIGNATURE_ALGORITHM=ECDSA")
	first := a.waitForCertificate(t)
	k.checkSVID(t, first.chain, agentID)
	if len(first.chain) != 2 || !first.chain[1].Equal(one.cert) {
		t.Errorf("the chain has %d certificates, and the leaf was signed by %s", len(first.chain), first.leaf().Issuer)
	}
	if string(first.roots)+"\n" != string(encode(root.cert)) {
		t.Errorf("the agent trusts other roots than istiod's:\n%s", first.roots)
	}
	// A set of files that do not belong together is refused as a whole, and said.
	mount(t, secret, "bad", makeCA(t, "A Stranger", nil), one)
	eventually(t, "the doctor to name the file", func() error {
		out, err := exec.CommandContext(t.Context(), kedgeBin, "doctor", "--config", k.configFile).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "ca-cert.pem does not lead to any root in root-cert.pem") {
			return fmt.Errorf("it says %w\n%s", err, out)
		}
		return nil
	})
	const refused = `kedge_problem{about="root",file="ca-cert.pem",reason="mismatched"} 1`
	if text := k.metrics(t); !strings.Contains(text, refused) {
		t.Errorf("the metrics do not say %s:\n%s", refused, text)
	}
	mount(t, secret, "two", root, two)
	eventually(t, "a certificate by the other intermediate", func() error {
		id, err := a.read()
		if err == nil && !id.chain[len(id.chain)-1].Equal(two.cert) {
			err = errors.New("it is by the first one")
		}
		return err
	})
	if text := k.metrics(t); strings.Contains(text, "kedge_problem{") {
		t.Errorf("the set is good, and the metrics say:\n%s", text)
	}
	if out := run(t, kedgeBin, "authority", "list", "--config", k.configFile); !strings.Contains(string(out), "foreign until") || strings.Count(string(out), " retired ") != 1 {
		t.Errorf("the authorities are:\n%s", out)
	}
	k.checkLedger(t)
}

type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// makeCA makes a CA as Istio's tools do: an intermediate has the path length 0 and a DNS name, and nothing has a SPIFFE ID.
func makeCA(t *testing.T, name string, by *authority) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{Organization: []string{"Istio"}, CommonName: name}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().AddDate(1, 0, 0), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, IsCA: true}
	parent, signer := template, crypto.Signer(key)
	if by != nil {
		template.MaxPathLenZero, template.DNSNames, template.NotAfter = true, []string{"istiod.istio-system.svc"}, time.Now().AddDate(0, 6, 0)
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

// mount puts istiod's Secret into a folder as the kubelet does, all of it at once.
func mount(t *testing.T, dir, version string, root, intermediate *authority) {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(intermediate.key)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{"ca-cert.pem": encode(intermediate.cert), "ca-key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), "cert-chain.pem": encode(intermediate.cert, root.cert), "root-cert.pem": encode(root.cert)} {
		write(t, filepath.Join(dir, ".."+version, name), text)
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
	}
	link := filepath.Join(dir, "..data")
	if err := os.Symlink(".."+version, link+"_tmp"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link+"_tmp", link); err != nil {
		t.Fatal(err)
	}
}

// rootInToken makes a token of SoftHSM with a root on it, in a ceremony, and returns the root's URI and the file of its certificate.
func rootInToken(t *testing.T) (uri, certificate string) {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "tokens", ".keep"), nil)
	write(t, filepath.Join(dir, "softhsm2.conf"), fmt.Appendf(nil, "directories.tokendir = %s/tokens\nobjectstore.backend = file\nlog.level = ERROR\n", dir))
	write(t, filepath.Join(dir, "pin"), []byte("123456\n"))
	t.Setenv("SOFTHSM2_CONF", filepath.Join(dir, "softhsm2.conf"))
	run(t, "softhsm2-util", "--init-token", "--free", "--label", "tok", "--so-pin", "so1234", "--pin", "123456")
	uri = fmt.Sprintf("pkcs11:token=tok;object=root?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:%s/pin", dir)
	plan := string(run(t, kedgeBin, "ceremony", "--template", "root"))
	for from, to := range map[string]string{`purpose: ""`: "purpose: a test", "operators: []": "operators: [test]", `commonName: ""`: "commonName: Token Root",
		"pkcs11:token=LABEL;object=KEY?module-path=/PATH/MODULE.so&pin-source=file:/PATH/PIN": uri} {
		plan = strings.Replace(plan, from, to, 1)
	}
	write(t, filepath.Join(dir, "plan.yaml"), []byte(plan))
	run(t, kedgeBin, "ceremony", filepath.Join(dir, "plan.yaml"))
	return uri, filepath.Join(dir, "root.pem")
}

// startVault runs an OpenBao server with a PKI and a Transit engine, and returns its address and the file of a token for it.
func startVault(t *testing.T) (address, tokenFile string) {
	t.Helper()
	bao := os.Getenv("BAO_BIN")
	if bao == "" {
		t.Fatal("BAO_BIN names no program: run these tests with 'make e2e', which has what they need")
	}
	dir, port := t.TempDir(), freePort(t)
	address, tokenFile = fmt.Sprintf("http://127.0.0.1:%d", port), filepath.Join(dir, "token")
	server := start(t, "openbao", dir, append(os.Environ(), "HOME="+dir), bao, "server", "-dev", "-dev-root-token-id=root", fmt.Sprintf("-dev-listen-address=127.0.0.1:%d", port))
	command := func(args ...string) ([]byte, error) {
		c := exec.CommandContext(t.Context(), bao, args...)
		c.Env = append(os.Environ(), "HOME="+dir, "BAO_ADDR="+address, "BAO_TOKEN=root")
		return c.CombinedOutput()
	}
	eventually(t, "OpenBao to answer", func() error {
		if err := server.running(); err != nil {
			t.Fatal(err)
		}
		out, err := command("status")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	for _, args := range []string{"secrets enable pki", "secrets tune -max-lease-ttl=87600h pki", "secrets enable transit",
		"write pki/root/generate/internal common_name=root key_type=ec key_bits=256 ttl=87600h max_path_length=1"} {
		if out, err := command(strings.Fields(args)...); err != nil {
			t.Fatalf("bao %s: %v: %s", args, err, out)
		}
	}
	write(t, tokenFile, []byte("root\n"))
	return address, tokenFile
}
