package authn

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"kedge/ca"
)

// How often an issuer is asked, where its configuration says nothing.
const (
	fetchLimit         = 10 * time.Second // for one fetch, discovery included
	defaultRefresh     = 5 * time.Minute
	defaultFileRefresh = 30 * time.Second
	defaultRefetch     = 10 * time.Second
	// mostWaiting is how many calls may wait for one issuer's keys at once. Each costs some memory and nothing else.
	mostWaiting = 4096
)

// keySet is the keys of one issuer: those that were fetched last, for as long as newer ones cannot be had.
//
// Only run fetches, so that there is never more than one fetch at a time, and none after run has ended.
type keySet struct {
	source           source
	cache            string // file; "": none
	refresh, refetch time.Duration
	now              func() time.Time
	log              *slog.Logger
	asked            chan struct{} // has a value when flight waits for run
	stopped          chan struct{} // closed when run has ended

	mu       sync.Mutex
	keys     []jose.JSONWebKey
	digest   [sha256.Size]byte // of the JWKS that they come from
	fetched  time.Time         // when they were had; zero: never
	ended    time.Time         // when the last fetch ended; zero: none has
	waiting  int               // calls that wait for the fetch that is asked for or under way
	failed   error             // why the last fetch failed; nil: it did not
	since    time.Time         // when the first of the latest failures was
	unkept   error             // why the keys could not be written to the cache
	flight   chan struct{}     // closed when the fetch that is asked for or under way has ended; nil: there is none
	fetches  uint64
	failures uint64
}

func newKeySet(c IssuerConfig, cache string, now func() time.Time, log *slog.Logger) (*keySet, error) {
	source, err := newSource(c)
	if err != nil {
		return nil, err
	}
	k := &keySet{
		source: source, cache: cache, refresh: c.RefreshInterval, refetch: c.MinRefetch, now: now, log: log.With("token_issuer", c.Name),
		asked: make(chan struct{}, 1), stopped: make(chan struct{}),
	}
	if k.refresh == 0 && c.JWKSFile != "" {
		k.refresh = defaultFileRefresh
	}
	if k.refresh == 0 {
		k.refresh = defaultRefresh
	}
	if k.refetch == 0 {
		k.refetch = defaultRefetch
	}
	if k.refresh < time.Millisecond || k.refetch < time.Millisecond {
		return nil, fmt.Errorf("its refresh interval %s or its shortest time between fetches %s is less than 1ms", k.refresh, k.refetch)
	}
	k.readCache()
	return k, nil
}

// run fetches the keys now, whenever they are asked for, and at every interval, until ctx ends.
func (k *keySet) run(ctx context.Context) {
	defer close(k.stopped)
	for ctx.Err() == nil {
		k.fetch(ctx)
		pause := time.NewTimer(k.pause())
		select {
		case <-ctx.Done():
		case <-k.asked:
		case <-pause.C:
		}
		pause.Stop()
	}
}

// pause is how long to wait before the next fetch that nobody asks for: spread, so that many CAs do not ask at once.
func (k *keySet) pause() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	wait := k.refresh*3/4 + rand.N(k.refresh/2)
	if k.failed != nil {
		wait = min(wait, 2*k.refetch)
	}
	return wait
}

// fetch gets the keys, and keeps the ones that are there when that fails. Those who wait are told in either case.
func (k *keySet) fetch(ctx context.Context) {
	k.mu.Lock()
	if k.flight == nil {
		k.flight = make(chan struct{})
	}
	k.mu.Unlock()

	limited, cancel := context.WithTimeout(ctx, fetchLimit)
	defer cancel()
	raw, err := k.source.read(limited)
	var keys []jose.JSONWebKey
	var passedOver []string
	if err == nil {
		keys, passedOver, err = parseJWKS(raw)
	}
	at := k.now()
	var unkept error
	if err == nil && k.cache != "" {
		unkept = writeCache(k.cache, cached{Issuer: k.source.issuer, Source: k.source.String(), Fetched: at, JWKS: raw})
	}

	k.mu.Lock()
	defer k.mu.Unlock()
	defer func() {
		close(k.flight)
		k.flight = nil
		select {
		case <-k.asked: // answered by this fetch
		default:
		}
	}()
	if err != nil && ctx.Err() != nil {
		return // run ends; it says nothing about the issuer
	}
	k.fetches++
	k.ended = at
	if err != nil {
		k.fail(err, at)
		return
	}
	if k.failed != nil {
		k.log.Info("the issuer's keys can be had again", "keys", len(keys), "failing_since", k.since)
	}
	if unkept != nil && k.unkept == nil {
		k.log.Warn("the issuer's keys could not be kept for the next start", "error", unkept)
	}
	digest := sha256.Sum256(raw)
	if digest != k.digest {
		for _, reason := range passedOver {
			k.log.Warn("a key of the issuer is passed over", "reason", reason)
		}
		k.log.Info("the issuer's keys were had", "keys", len(keys), "from", k.source.String())
	}
	k.keys, k.digest, k.fetched, k.failed, k.since, k.unkept = keys, digest, at, nil, time.Time{}, unkept
}

// fail notes a failure, and says so in the log once; mu is held.
func (k *keySet) fail(err error, at time.Time) {
	k.failures++
	if k.failed == nil {
		k.since = at
		if len(k.keys) > 0 {
			k.log.Warn("the issuer's keys cannot be had; the last ones go on serving", "error", err, "keys", len(k.keys), "fetched", k.fetched)
		} else {
			k.log.Warn("the issuer's keys cannot be had; until then none of its tokens is accepted", "error", err)
		}
	}
	k.failed = err
}

// find returns the keys that may have signed a token with this key id and algorithm; at least one. For an unknown id the keys are fetched
// anew, but no sooner than refetch after the last time: all callers wait aside for the one fetch under way, and a flood causes no others.
func (k *keySet) find(ctx context.Context, id, algorithm string, aside func() func(context.Context) error) ([]jose.JSONWebKey, error) {
	k.mu.Lock()
	found := k.match(id, algorithm)
	k.mu.Unlock()
	if len(found) == 0 {
		if err := k.await(ctx, aside); err != nil {
			return nil, ca.Unavailable(err)
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		found = k.match(id, algorithm)
	}
	switch {
	case len(found) > 0 && (id != "" || len(found) == 1):
		return found, nil
	case len(found) > 0:
		return nil, ca.Unauthenticated(fmt.Errorf("it names no key id, and %d of the issuer's keys fit %s", len(found), algorithm))
	case k.failed != nil:
		return nil, ca.Unavailable(fmt.Errorf("its key (id %.64q, %s) is not known, and the issuer's keys cannot be had now: %w", id, algorithm, k.failed))
	case len(k.keys) == 0:
		return nil, ca.Unavailable(errors.New("the issuer's keys have never been had"))
	}
	return nil, ca.Unauthenticated(fmt.Errorf("its key (id %.64q, %s) is not among the issuer's %d keys of %s",
		id, algorithm, len(k.keys), k.fetched.UTC().Format(time.RFC3339)))
}

// match finds keys in what is there; mu is held.
func (k *keySet) match(id, algorithm string) (found []jose.JSONWebKey) {
	for _, key := range k.keys {
		if (id == "" || key.KeyID == id) && (key.Algorithm == "" || key.Algorithm == algorithm) && fits(key.Key, algorithm) {
			found = append(found, key)
		}
	}
	return found
}

// await asks for a fetch if one is due, and waits for the one that is asked for or under way, without its turn. When none is due it returns at once.
func (k *keySet) await(ctx context.Context, aside func() func(context.Context) error) error {
	flight, err := k.board()
	if flight == nil {
		return err
	}
	defer func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.waiting--
	}()
	back := func(context.Context) error { return nil }
	if aside != nil {
		back = aside()
	}
	select {
	case <-flight:
		return back(ctx)
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("waiting for the issuer's keys: %w", ctx.Err()), back(ctx))
	case <-k.stopped:
		return errors.Join(errors.New("the issuer's keys are no longer fetched: this process is stopping"), back(ctx))
	}
}

// board returns the fetch to wait for, nil when none is due. Whoever boards one is counted as waiting.
func (k *keySet) board() (flight chan struct{}, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.flight == nil {
		now := k.now()
		if !k.ended.IsZero() && now.Sub(k.ended) < k.refetch && !now.Before(k.ended) { // a clock that was set back stops no fetch
			return nil, nil
		}
	}
	if k.waiting >= mostWaiting {
		return nil, fmt.Errorf("%d calls wait for the issuer's keys already", k.waiting)
	}
	if k.flight == nil {
		k.flight = make(chan struct{})
		k.asked <- struct{}{} // never blocks: it has a value only while there is a flight
	}
	k.waiting++
	return k.flight, nil
}

// problem says what is wrong with the keys; "" for nothing.
func (k *keySet) problem() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	since := k.since.UTC().Format(time.RFC3339)
	switch {
	case k.failed != nil && len(k.keys) == 0:
		return fmt.Sprintf("its keys cannot be had since %s, and never were, so that none of its tokens is accepted: %v", since, k.failed)
	case k.failed != nil:
		return fmt.Sprintf("its keys cannot be had since %s; those of %s go on serving: %v", since, k.fetched.UTC().Format(time.RFC3339), k.failed)
	case k.unkept != nil:
		return fmt.Sprintf("its keys could not be kept for the next start: %v", k.unkept)
	}
	return ""
}

func (k *keySet) status() IssuerStatus {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := IssuerStatus{Keys: len(k.keys), Fetched: k.fetched, FailingSince: k.since, Fetches: k.fetches, Failures: k.failures}
	if k.failed != nil {
		s.Failure = k.failed.Error()
	}
	return s
}
