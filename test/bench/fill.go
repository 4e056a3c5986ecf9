package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/plugins/file"
)

const (
	// age is for how long a CA that fill made has been issuing.
	age = 23 * time.Hour
	// lifetime of what it issued: all of it is live for another hour.
	lifetime = 24 * time.Hour
	// provenAt is at which part of that time the client certificates were issued that callers prove themselves with: late enough to survive prune.
	provenAt = 0.95
	// pruneAt is at which time, from now, prune pretends to be: what was issued in the last two hours is left.
	pruneAt = lifetime - 2*time.Hour
	// draft is how many events the ledger takes in one call.
	draft = 256
)

// fill makes the data folder of a CA that has issued so many certificates in the last day, each to another pod, and returns client certificates of
// callers that it issued long ago, as agents have them that renew. In the second in which it issued those it issued so many others, too, half of them before.
func fill(ctx context.Context, dir string, records, others int) (certificates []*tls.Certificate, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	var wall atomic.Int64
	began := time.Now().Add(-age - time.Minute)
	now := func() time.Time { return time.Unix(0, wall.Load()) }
	wall.Store(began.UnixNano())
	book, err := ledger.Open(dir, ledger.Options{TrustDomain: trustDomain, ProgramVersion: "0.1.0", Now: now, Logger: log})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, book.Close()) }()
	authority, err := openCA(ctx, dir, book, now, log)
	if err != nil {
		return nil, err
	}
	// The first certificate shows what an event of this CA looks like.
	if _, err := prove(ctx, authority, 0, now()); err != nil {
		return nil, err
	}
	event, err := book.Event(ctx, book.Head().Number)
	if err != nil {
		return nil, err
	}
	pattern, ok := event.Body.(*ledger.Issue)
	if !ok {
		return nil, fmt.Errorf("the last event is %s, and not an issue", event.Type)
	}
	at := func(i int) time.Time { return began.Add(time.Duration(float64(age) * float64(i) / float64(records))) }
	proven := int(provenAt * float64(records))
	if err := appendMany(ctx, book, pattern, 0, proven, &wall, at); err != nil {
		return nil, err
	}
	busy := func(int) time.Time { return at(proven) }
	if err := appendMany(ctx, book, pattern, 0, others/2, &wall, busy); err != nil {
		return nil, err
	}
	wall.Store(at(proven).UnixNano())
	for i := range inFlight {
		certificate, err := prove(ctx, authority, i, now())
		if err != nil {
			return nil, err
		}
		certificates = append(certificates, certificate)
	}
	if err := appendMany(ctx, book, pattern, others/2, others, &wall, busy); err != nil {
		return nil, err
	}
	return certificates, appendMany(ctx, book, pattern, proven, records, &wall, at)
}

// openCA opens a CA over the files that 'kedge serve' will find.
func openCA(ctx context.Context, dir string, book *ledger.Ledger, now func() time.Time, log *slog.Logger) (*ca.CA, error) {
	root, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(dir, "root"), TrustDomain: trustDomain, Now: now})
	if err != nil {
		return nil, err
	}
	keys, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(dir, "keys")})
	if err != nil {
		return nil, err
	}
	profile, err := ca.NewProfile(ca.DefaultProfile, ca.DefaultProfileConfig())
	if err != nil {
		return nil, err
	}
	clock := ca.SystemClock()
	clock.Wall = now
	guarded, err := ca.OpenGuardedClock(filepath.Join(dir, "clock.json"), clock, time.Time{})
	if err != nil {
		return nil, err
	}
	authority, err := ca.Open(ctx, ca.Options{TrustDomain: spiffeid.RequireTrustDomainFromString(trustDomain), Ledger: book, Root: root,
		RootCoverage: ledger.Coverage{Kind: "complete"}, Keys: keys, Profiles: map[string]*ca.Profile{ca.DefaultProfile: profile},
		IssuingLifetime: 7 * 24 * time.Hour, IssuingKey: ca.P256, Clock: clock, Guarded: guarded, Logger: log})
	if err != nil {
		return nil, err
	}
	return authority, root.Recorded()
}

// prove has the CA issue a certificate to a service account that showed a token.
func prove(ctx context.Context, authority *ca.CA, i int, now time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := newCSR(key, i)
	if err != nil {
		return nil, err
	}
	namespace, account := accountOf(i)
	proof := ledger.Proof{Method: ca.MethodKubernetes, Issuer: "cluster-1", Subject: "system:serviceaccount:" + namespace + ":" + account, Time: ledger.At(now)}
	issued, err := authority.Issue(ctx, ca.Caller{
		ID: spiffeid.RequireFromString(spiffeID(i)), Proofs: []ledger.Proof{proof}, First: &proof, Holder: ledger.Holder{Kind: "pod", ID: uid(i)},
		Peer: "127.0.0.1:50000", ClusterID: "Kubernetes",
	}, ca.Request{CSR: []byte(csr), TTL: lifetime, Delivery: ledger.DeliveryResponse, RequestID: "0123456789abcdef"})
	if err != nil {
		return nil, err
	}
	return tlsCertificate(key, issued.Chain)
}

// appendMany appends the issues of the numbers from first on to last, exclusive, at the times that at says. They are like pattern, each to another pod
// and of another key.
func appendMany(ctx context.Context, book *ledger.Ledger, pattern *ledger.Issue, first, last int, wall *atomic.Int64, at func(int) time.Time) error {
	size := max(1, min(draft, (last-first)/100))
	var mu sync.Mutex
	next := first
	take := func() (from, to int) {
		mu.Lock()
		defer mu.Unlock()
		from, to = next, min(next+size, last)
		if next = to; from < to {
			wall.Store(at(from).UnixNano())
		}
		return from, to
	}
	errs := make([]error, 16) // as many calls of Append at once share a commit
	var running sync.WaitGroup
	for worker := range errs {
		running.Go(func() {
			for errs[worker] == nil {
				from, to := take()
				if from == to {
					return
				}
				var events []ledger.Body
				for i := from; i < to; i++ {
					events = append(events, another(pattern, i, at(i)))
				}
				_, errs[worker] = book.Append(ctx, events...)
			}
		})
	}
	running.Wait()
	return errors.Join(errs...)
}

// another is an event like pattern for the pod i.
func another(pattern *ledger.Issue, i int, now time.Time) *ledger.Issue {
	event := *pattern
	event.Serial = append(ledger.Serial(nil), pattern.Serial...)
	rand.Read(event.Serial[4:]) // never fails since Go 1.24
	rand.Read(event.Certificate[:])
	rand.Read(event.Key[:])
	namespace, account := accountOf(i)
	event.SPIFFEID = spiffeID(i)
	event.NotBefore, event.NotAfter = ledger.At(now.Add(-time.Minute)), ledger.At(now.Add(lifetime))
	event.Proofs = []ledger.Proof{{Method: ca.MethodKubernetes, Issuer: "cluster-1", Subject: "system:serviceaccount:" + namespace + ":" + account, Time: ledger.At(now)}}
	event.Holder = ledger.Holder{Kind: "pod", ID: uid(i)}
	event.RequestID = fmt.Sprintf("%016x", i)
	return &event
}

// prune drops what it can from a ledger that fill made, as if nearly a day had passed, and returns how many events are left.
func prune(ctx context.Context, dir string) (left uint64, err error) {
	book, err := ledger.Open(dir, ledger.Options{TrustDomain: trustDomain, ProgramVersion: "0.1.0", Retention: time.Second})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, book.Close()) }()
	if _, err := book.Prune(ctx, time.Now().Add(pruneAt)); err != nil {
		return 0, err
	}
	head := book.Head()
	return head.Number - head.First + 1, nil
}
