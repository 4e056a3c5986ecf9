package istio

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestAnAgentWithoutATokenRenewsByItsClientCertificate(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	a := newAgent(t, k, k.issuer.sign(t, token{}))
	a.start(t, "SECRET_TTL=1h", "ECC_SIGNATURE_ALGORITHM=ECDSA")
	seen := []*identity{a.waitForCertificate(t)}
	a.process.stop(t)
	if err := os.Remove(a.tokenFile()); err != nil {
		t.Fatal(err)
	}

	// Each start opens a new connection, and shows the certificate that the agent has by then.
	for range 2 {
		a.start(t, "SECRET_TTL=1h", "ECC_SIGNATURE_ALGORITHM=ECDSA", "PROV_CERT=./out")
		seen = append(seen, a.waitForCertificate(t, seen...))
		a.process.stop(t)
	}
	// And a renewal at half-life is on the connection that is there already.
	a.start(t, "SECRET_TTL=6s", "ECC_SIGNATURE_ALGORITHM=ECDSA", "PROV_CERT=./out")
	for range 2 {
		seen = append(seen, a.waitForCertificate(t, seen...))
	}

	first := k.recordOf(t, seen[0].leaf())
	before := first
	for i, id := range seen[1:] {
		if i < 3 { // the agent renews on by itself, and short-lived ones may be over by now
			k.checkLinks(t, id)
		}
		r := k.recordOf(t, id.leaf())
		if len(r.Issue.Proofs) != 1 || r.Issue.Proofs[0].Method != "client-certificate" {
			t.Errorf("renewal %d was proved by %v", i+1, r.Issue.Proofs)
		}
		if r.Issue.FirstProof == nil || *r.Issue.FirstProof != first.Issue.Proofs[0] {
			t.Errorf("renewal %d has the first proof %v instead of %v", i+1, r.Issue.FirstProof, first.Issue.Proofs[0])
		}
		if r.Issue.SPIFFEID != agentID {
			t.Errorf("renewal %d is for %s", i+1, r.Issue.SPIFFEID)
		}
		if i < 3 && r.Issue.Replaces != before.Number {
			t.Errorf("renewal %d replaces number %d instead of %d", i+1, r.Issue.Replaces, before.Number)
		}
		before = r
	}
	k.checkLedger(t)
}

// A connection shows the client certificate of its handshake for as long as it lives, and the agent's renewals do not end it. When that
// certificate expires the CA must refuse it, and the agent, which then connects anew, must be served.
func TestAnAgentGoesOnWhenItsConnectionOutlivesItsClientCertificate(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	a := newAgent(t, k, k.issuer.sign(t, token{}))
	a.start(t, "SECRET_TTL=12s", "ECC_SIGNATURE_ALGORITHM=ECDSA")
	shown := a.waitForCertificate(t)
	a.process.stop(t)
	if err := os.Remove(a.tokenFile()); err != nil {
		t.Fatal(err)
	}
	a.start(t, "SECRET_TTL=10s", "ECC_SIGNATURE_ALGORITHM=ECDSA", "PROV_CERT=./out")
	seen := []*identity{shown}
	for !seen[len(seen)-1].leaf().NotBefore.After(shown.leaf().NotAfter) {
		seen = append(seen, a.waitForCertificate(t, seen...))
	}
	for _, id := range seen[1:] {
		if r := k.recordOf(t, id.leaf()); len(r.Issue.Proofs) != 1 || r.Issue.Proofs[0].Method != "client-certificate" {
			t.Errorf("number %d was proved by %v", r.Number, r.Issue.Proofs)
		}
	}
	k.checkLedger(t)
}

// What 'kedge svid fetch' writes is the agent's PROV_CERT, before and after it changed; and what the agent writes is taken over.
func TestAnAgentRenewsByWhatSVIDFetchWrote(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	a := newAgent(t, k, nil)
	given, prov := filepath.Join(a.dir, "given"), filepath.Join(a.dir, "prov")
	write(t, given, k.issuer.sign(t, token{}))
	fetch := func(dir string, proof ...string) *x509.Certificate {
		t.Helper()
		run(t, kedgeBin, append([]string{"svid", "fetch", "--config", k.configFile, "--out", dir}, proof...)...)
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert-chain.pem"), filepath.Join(dir, "key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		return pair.Leaf
	}
	var seen []*identity
	replaced := func(shown *x509.Certificate, folder string) {
		t.Helper()
		a.start(t, "SECRET_TTL=1h", "ECC_SIGNATURE_ALGORITHM=ECDSA", "PROV_CERT="+folder)
		seen = append(seen, a.waitForCertificate(t, seen...))
		a.process.stop(t)
		r := k.recordOf(t, seen[len(seen)-1].leaf())
		if len(r.Issue.Proofs) != 1 || r.Issue.Proofs[0].Method != "client-certificate" || r.Issue.Replaces != k.recordOf(t, shown).Number {
			t.Errorf("it was proved by %v and replaces number %d", r.Issue.Proofs, r.Issue.Replaces)
		}
	}
	replaced(fetch(prov, "--token-file", given), "./prov")
	replaced(fetch(prov, "--renew"), "./prov")
	out := fetch(a.out(), "--renew") // by the plain files that the agent left there
	seen = append(seen, &identity{chain: []*x509.Certificate{out}})
	replaced(out, "./out")
	k.checkLedger(t)
}

// checkLinks makes sure that a chain leads to the CA's root, whatever the time is.
func (k *kedge) checkLinks(t *testing.T, id *identity) {
	t.Helper()
	roots, _ := k.roots(t)
	intermediates := x509.NewCertPool()
	for _, link := range id.chain[1:] {
		intermediates.AddCert(link)
	}
	if _, err := id.leaf().Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: id.leaf().NotAfter,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("the certificate does not verify: %v", err)
	}
}

// The handshake must not fail on a client certificate that nothing speaks for, as it would with Go's VerifyClientCertIfGiven:
// an agent drops such a certificate only when it is expired, and would be locked out in spite of its token.
func TestAClientCertificateOfAnUnknownRootDoesNotLockOutAValidToken(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	a := newAgent(t, k, k.issuer.sign(t, token{}))
	writeForeignSVID(t, filepath.Join(a.dir, "prov"))
	a.start(t, "SECRET_TTL=1h", "ECC_SIGNATURE_ALGORITHM=ECDSA", "PROV_CERT=./prov")
	id := a.waitForCertificate(t)
	k.checkSVID(t, id.chain, agentID)
	r := k.recordOf(t, id.leaf())
	if len(r.Issue.Proofs) != 1 || r.Issue.Proofs[0].Method != "kubernetes" || r.Issue.FirstProof != nil || r.Issue.Replaces != 0 {
		t.Errorf("proved by %v, first by %v, replaces %d", r.Issue.Proofs, r.Issue.FirstProof, r.Issue.Replaces)
	}
	said := false
	for line := range bytes.Lines(k.process.log()) {
		said = said || bytes.Contains(line, []byte(r.Issue.RequestID)) && bytes.Contains(line, []byte("client certificate"))
	}
	if !said {
		t.Errorf("the CA's log does not say for the request %s that the client certificate did not count", r.Issue.RequestID)
	}
}

func TestAClientCertificateOfAnUnknownRootAloneProvesNothing(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	a := newAgent(t, k, nil)
	writeForeignSVID(t, filepath.Join(a.dir, "prov"))
	a.start(t, "ECC_SIGNATURE_ALGORITHM=ECDSA", "PROV_CERT=./prov")
	a.waitForLog(t, "code = Unauthenticated")
	if err := a.noCertificate(); err != nil {
		t.Error(err)
	}
	if records := k.ledger(t); len(records) != 0 {
		t.Errorf("the ledger has %d SVIDs", len(records))
	}
}

// writeForeignSVID puts into a folder what an agent was given by a CA whose root this CA does not have (any more): the same
// trust domain and the same name.
func writeForeignSVID(t *testing.T, dir string) {
	t.Helper()
	now := time.Now()
	rootKey, leafKey := newKey(t), newKey(t)
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "removed root"}, NotBefore: now.Add(-time.Hour),
		NotAfter: now.Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain}}}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain, Path: "/ns/ns1/sa/sa1"}}}
	for name, made := range map[string]*x509.Certificate{"root-cert.pem": root, "cert-chain.pem": leaf} {
		key := rootKey
		if made == leaf {
			key = leafKey
		}
		der, err := x509.CreateCertificate(rand.Reader, made, root, key.Public(), rootKey)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	der, err := x509.MarshalPKCS8PrivateKey(leafKey)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
