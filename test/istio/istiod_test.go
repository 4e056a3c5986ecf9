package istio

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestAgentsOfIstiodMoveToKedgeByTheSameSecret has certificates of Istio's own CA server, which then ends. Kedge takes its Secret and its address: an agent that runs goes on renewing, one
// that has nothing but a certificate of istiod's renews by that, and what istiod issued and what Kedge issues verify each other.
func TestAgentsOfIstiodMoveToKedgeByTheSameSecret(t *testing.T) {
	t.Parallel()
	root := makeCA(t, "Istio Root", nil)
	intermediate := makeCA(t, "Istio Intermediate", root)
	secret := t.TempDir()
	mount(t, secret, "one", root, intermediate)
	k := newKedge(t, fmt.Sprintf("root: {kind: cacerts, cacerts: {dir: %q}}\n", secret))
	istiod := startIstioCA(t, k, secret, intermediate)
	environment := []string{"ECC_SIGNATURE_ALGORITHM=ECDSA", "CA_ROOT_CA=" + filepath.Join(secret, "root-cert.pem")}
	moving, alone := newAgent(t, k, k.issuer.sign(t, token{})), newAgent(t, k, k.issuer.sign(t, token{}))
	moving.start(t, append(environment, "SECRET_TTL=6s")...)
	alone.start(t, append(environment, "SECRET_TTL=1h")...)
	before, old := moving.waitForCertificate(t), alone.waitForCertificate(t)
	if old.chain[1].Subject.CommonName != "Istio Intermediate" || old.leaf().URIs[0].String() != agentID {
		t.Fatalf("istiod issued %s under %s", old.leaf().URIs, old.leaf().Issuer)
	}
	alone.process.stop(t)
	istiod.stop(t)
	k.start(t)

	var renewed *identity
	eventually(t, "the agent that runs to have a certificate of Kedge's", func() (err error) {
		if renewed, err = moving.read(); err != nil {
			return err
		}
		for _, r := range k.ledger(t) {
			if r.Issue.Serial == fmt.Sprintf("%x", renewed.leaf().SerialNumber.Bytes()) {
				return nil
			}
		}
		return errors.New("it has one of istiod's")
	})
	if !bytes.Equal(renewed.roots, before.roots) || len(renewed.chain) != len(before.chain) || !renewed.chain[1].Equal(before.chain[1]) {
		t.Errorf("the agent notices: another chain or other roots than istiod's\n%s\n%s", before.roots, renewed.roots)
	}

	if err := os.Remove(alone.tokenFile()); err != nil {
		t.Fatal(err)
	}
	alone.start(t, append(environment, "SECRET_TTL=1h", "PROV_CERT=./out")...)
	next := alone.waitForCertificate(t, old)
	k.checkSVID(t, next.chain, agentID)
	r := k.recordOf(t, next.leaf())
	if len(r.Issue.Proofs) != 1 || r.Issue.Proofs[0].Method != "client-certificate" || r.Issue.FirstProof != nil || r.Issue.Replaces != 0 {
		t.Errorf("proved by %v, first by %v, replaces %d", r.Issue.Proofs, r.Issue.FirstProof, r.Issue.Replaces)
	}
	for name, ends := range map[string][2]*identity{"istiod's calls Kedge's": {old, next}, "Kedge's calls istiod's": {next, old}} {
		if err := call(t, ends[0], ends[1]); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if out := run(t, kedgeBin, "authority", "list", "--config", k.configFile); strings.Count(string(out), "foreign until") != 2 {
		t.Errorf("the authorities are:\n%s", out)
	}
	k.checkLedger(t)
}

// startIstioCA runs Istio's own CA server on the CA's address, with the Secret that is mounted, believing the CA's issuer, and waits until it serves.
func startIstioCA(t *testing.T, k *kedge, secret string, intermediate *authority) *process {
	t.Helper()
	dir, key := t.TempDir(), newKey(t)
	for _, name := range []string{"ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"} {
		text, err := os.ReadFile(filepath.Join(secret, name))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name), text)
	}
	host, _, err := net.SplitHostPort(k.address)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.ParseIP(host)}}
	der, err := x509.CreateCertificate(rand.Reader, template, intermediate.cert, key.Public(), intermediate.key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "tls-cert.pem"), append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), encode(intermediate.cert)...))
	write(t, filepath.Join(dir, "tls-key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	write(t, filepath.Join(dir, "jwks.json"), k.issuer.jwks(t))
	write(t, filepath.Join(dir, "issuer"), []byte(k.issuer.url))
	p := start(t, "istio-ca", dir, nil, istioCABin, dir, k.address)
	eventually(t, "Istio's CA server to serve", func() error {
		if err := p.running(); err != nil {
			t.Fatal(err)
		}
		_, err := os.Stat(filepath.Join(dir, "address"))
		return err
	})
	return p
}

// call is one workload's call of another by mTLS, as their sidecars make it: each trusts the roots that it was given.
func call(t *testing.T, client, server *identity) error {
	t.Helper()
	settings := func(id *identity, peer x509.ExtKeyUsage) *tls.Config {
		certificate, roots := tls.Certificate{PrivateKey: id.key}, x509.NewCertPool()
		for _, link := range id.chain {
			certificate.Certificate = append(certificate.Certificate, link.Raw)
		}
		if !roots.AppendCertsFromPEM(id.roots) {
			t.Fatalf("no roots in %s", id.roots)
		}
		return &tls.Config{Certificates: []tls.Certificate{certificate}, ClientAuth: tls.RequireAnyClientCert, InsecureSkipVerify: true, // no DNS name is in it; what follows verifies
			VerifyConnection: func(state tls.ConnectionState) error {
				intermediates := x509.NewCertPool()
				for _, link := range state.PeerCertificates[1:] {
					intermediates.AddCert(link)
				}
				leaf := state.PeerCertificates[0]
				if len(leaf.URIs) != 1 || leaf.URIs[0].String() != agentID {
					return fmt.Errorf("the peer is %v", leaf.URIs)
				}
				_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{peer}})
				return err
			}}
	}
	near, far := net.Pipe()
	answered := make(chan error, 1)
	go func() {
		defer far.Close()
		_, err := io.WriteString(tls.Server(far, settings(server, x509.ExtKeyUsageClientAuth)), "hello") // the handshake first
		answered <- err
	}()
	text := make([]byte, len("hello"))
	_, err := io.ReadFull(tls.Client(near, settings(client, x509.ExtKeyUsageServerAuth)), text)
	return errors.Join(err, near.Close(), <-answered)
}
