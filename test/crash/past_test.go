package crash

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/plugins/file"
)

// past is how long ago the CA of newPast issued: longer than anything that is kept in these tests.
const past = 3 * time.Hour

// newPast makes a data folder of a CA that issued so many certificates of seconds, three hours ago, and then stopped: with a short retention there is
// much to archive and to drop at once. It returns the number of the last event.
func newPast(t *testing.T, dir string, certificates int) (last uint64) {
	t.Helper()
	now := time.Now().Add(-past).Truncate(time.Second)
	clock := ca.Clock{Wall: func() time.Time { return now }, Elapsed: func() time.Duration { return 0 }}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	must(os.MkdirAll(dir, 0o700))
	book, err := ledger.Open(dir, ledger.Options{TrustDomain: td.Name(), Now: clock.Wall})
	must(err)
	root, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(dir, "root"), TrustDomain: td.Name(), Now: clock.Wall})
	must(err)
	keys, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(dir, "keys")})
	must(err)
	guarded, err := ca.OpenGuardedClock(filepath.Join(t.TempDir(), "clock.json"), clock, time.Time{})
	must(err)
	config := ca.DefaultProfileConfig()
	config.DefaultTTL, config.MaxTTL, config.MinTTL, config.Backdate = 5*time.Second, 5*time.Second, time.Second, 0
	profile, err := ca.NewProfile(ca.DefaultProfile, config)
	must(err)
	authority, err := ca.Open(t.Context(), ca.Options{
		TrustDomain: td, Ledger: book, Root: root, RootCoverage: ledger.Coverage{Kind: "complete"}, Keys: keys,
		Profiles: map[string]*ca.Profile{ca.DefaultProfile: profile}, IssuingLifetime: 15 * time.Second, IssuingKey: ca.P256,
		Clock: clock, Guarded: guarded, Logger: slog.New(slog.DiscardHandler),
	})
	must(err)
	must(root.Recorded())

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(err)
	proof := ledger.Proof{Method: ca.MethodKubernetes, Issuer: "cluster-1", Subject: "system:serviceaccount:default:old", Time: ledger.At(now)}
	caller := ca.Caller{ID: spiffeid.RequireFromPath(td, "/ns/default/sa/old"), Proofs: []ledger.Proof{proof}, First: &proof,
		Holder: ledger.Holder{Kind: "pod", ID: "old-pod-uid"}, Peer: "192.0.2.1:4711"}
	issued, err := authority.Issue(t.Context(), caller, ca.Request{CSR: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}),
		Delivery: ledger.DeliveryResponse, RequestID: "0123456789abcdef"})
	must(err)
	first, err := book.Event(t.Context(), issued.Number)
	must(err)
	for left := certificates - 1; left > 0; { // the others are like it, but for their serials
		var events []ledger.Body
		for range min(left, 256) {
			event := *first.Body.(*ledger.Issue)
			event.Serial = append(ledger.Serial{1}, make([]byte, 19)...)
			rand.Read(event.Serial[1:])
			events = append(events, &event)
		}
		_, err := book.Append(t.Context(), events...)
		must(err)
		left -= len(events)
	}
	last = book.Head().Number
	must(book.Close())
	// Somebody bore out since that the clock is right: else nothing of the past could go.
	guarded, err = ca.OpenGuardedClock(filepath.Join(dir, "clock.json"), ca.SystemClock(), time.Time{})
	must(err)
	must(guarded.Save())
	return last
}
