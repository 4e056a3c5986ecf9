package istio

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

func TestAnAgentGetsItsFirstCertificateWithAToken(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	for name, c := range map[string]struct {
		token       token
		environment []string
		key         func(any) bool
	}{
		"RSA, its default": {key: func(key any) bool { k, ok := key.(*rsa.PrivateKey); return ok && k.N.BitLen() == 2048 }},
		"RSA 4096": {environment: []string{"WORKLOAD_RSA_KEY_SIZE=4096"},
			key: func(key any) bool { k, ok := key.(*rsa.PrivateKey); return ok && k.N.BitLen() == 4096 }},
		"ECDSA": {environment: []string{"ECC_SIGNATURE_ALGORITHM=ECDSA"},
			key: func(key any) bool { k, ok := key.(*ecdsa.PrivateKey); return ok && k.Params().BitSize == 256 }},
		"ECDSA P-384, ES256 token": {token: token{algorithm: jose.ES256},
			environment: []string{"ECC_SIGNATURE_ALGORITHM=ECDSA", "ECC_CURVE=P384", "PKCS8_KEY=true"},
			key:         func(key any) bool { k, ok := key.(*ecdsa.PrivateKey); return ok && k.Params().BitSize == 384 }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAgent(t, k, k.issuer.sign(t, c.token))
			a.start(t, append(c.environment, "SECRET_TTL=1h")...)
			id := a.waitForCertificate(t)
			k.checkSVID(t, id.chain, agentID)
			if !c.key(id.key) {
				t.Errorf("the key is a %T of another size than was configured", id.key)
			}
			if _, want := k.roots(t); !bytes.Equal(id.roots, bytes.TrimSpace(want)) {
				t.Errorf("root-cert.pem is not the bundle that %s holds", k.rootFile())
			}
			r := k.recordOf(t, id.leaf())
			if r.Issue.SPIFFEID != agentID {
				t.Errorf("the ledger has it for %s", r.Issue.SPIFFEID)
			}
			if !r.Issue.NotAfter.Equal(id.leaf().NotAfter) || !r.Issue.NotBefore.Equal(id.leaf().NotBefore) {
				t.Errorf("the ledger has it valid from %s to %s, and it is from %s to %s",
					r.Issue.NotBefore, r.Issue.NotAfter, id.leaf().NotBefore, id.leaf().NotAfter)
			}
			want := proof{Method: "kubernetes", Issuer: "main", Subject: "system:serviceaccount:ns1:sa1"}
			if len(r.Issue.Proofs) != 1 || r.Issue.Proofs[0] != want {
				t.Errorf("the ledger has the proofs %v instead of %v", r.Issue.Proofs, want)
			}
			if r.Issue.Holder.Kind != "pod" || r.Issue.Holder.ID != podUID {
				t.Errorf("the ledger has it held by the %s %s instead of the pod %s", r.Issue.Holder.Kind, r.Issue.Holder.ID, podUID)
			}
			if r.Issue.ClusterID != "Kubernetes" || r.Issue.RequestID == "" {
				t.Errorf("the ledger has the cluster %q and the request id %q", r.Issue.ClusterID, r.Issue.RequestID)
			}
		})
	}
}

func TestTheIdentityComesFromTheTokenAndNotFromTheCSR(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	a := newAgent(t, k, k.issuer.sign(t, token{namespace: "other", account: "somebody"}))
	a.start(t) // its CSR says ns1 and sa1
	id := a.waitForCertificate(t)
	k.checkSVID(t, id.chain, "spiffe://"+trustDomain+"/ns/other/sa/somebody")
}

func TestAnAgentRenewsAtHalfLifeAndTheLedgerHasEveryCertificate(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	a := newAgent(t, k, k.issuer.sign(t, token{}))
	a.start(t, "SECRET_TTL=6s", "ECC_SIGNATURE_ALGORITHM=ECDSA")
	var seen []*identity
	for range 3 {
		seen = append(seen, a.waitForCertificate(t, seen...))
	}
	for _, id := range seen {
		k.recordOf(t, id.leaf())
		if !bytes.Equal(id.roots, seen[0].roots) {
			t.Error("root-cert.pem changed although the bundle did not")
		}
	}
	k.checkSuccession(t)
	k.checkLedger(t)
}

// checkSuccession makes sure that the ledger has all SVIDs for one holder, that none says that it replaces another than the one
// before it, and that no serial is there twice. All of them must be one agent's, got with its pod's token.
func (k *kedge) checkSuccession(t *testing.T) {
	t.Helper()
	serials := map[string]bool{}
	var before uint64
	for _, r := range k.ledger(t) {
		if r.Issue.Holder.Kind != "pod" || r.Issue.Holder.ID != podUID {
			t.Errorf("number %d is held by the %s %s instead of the pod %s", r.Number, r.Issue.Holder.Kind, r.Issue.Holder.ID, podUID)
		}
		if r.Issue.Replaces != 0 && r.Issue.Replaces != before {
			t.Errorf("number %d replaces number %d instead of %d", r.Number, r.Issue.Replaces, before)
		}
		if serials[r.Issue.Serial] {
			t.Errorf("the serial %s is in the ledger twice", r.Issue.Serial)
		}
		before, serials[r.Issue.Serial] = r.Number, true
	}
}

func TestAnAgentGoesOnWhenTheCARestarts(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*testing.T, *kedge, *agent){
		"in good order, between two renewals": func(t *testing.T, k *kedge, _ *agent) { k.process.stop(t) },
		"by kill -9, between two renewals":    func(_ *testing.T, k *kedge, _ *agent) { k.process.kill() },
		"by kill -9, and it is away when a renewal is due": func(t *testing.T, k *kedge, a *agent) {
			k.process.kill()
			a.waitForLog(t, "failed to sign CSR")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := startKedge(t)
			a := newAgent(t, k, k.issuer.sign(t, token{}))
			a.start(t, "SECRET_TTL=6s", "ECC_SIGNATURE_ALGORITHM=ECDSA")
			seen := []*identity{a.waitForCertificate(t)}
			_, before := k.roots(t)
			end(t, k, a)
			k.start(t)
			if _, after := k.roots(t); !bytes.Equal(before, after) {
				t.Error("the CA came back with another root")
			}
			for range 2 {
				seen = append(seen, a.waitForCertificate(t, seen...))
			}
			for _, id := range seen {
				k.recordOf(t, id.leaf())
			}
			k.checkSuccession(t)
			k.checkLedger(t)
		})
	}
}

// noCertificate is an error when the agent has anything in its output folder.
func (a *agent) noCertificate() error {
	entries, err := os.ReadDir(a.out())
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		return fmt.Errorf("the agent has %s", entries[0].Name())
	}
	if a.process.running() != nil {
		return errors.New("the agent has ended")
	}
	return nil
}
