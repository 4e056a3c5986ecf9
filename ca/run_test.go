package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kedge/ca"
	"kedge/plugins/file"
)

// weakRoot is a file root that does not answer while it is down. It notes when it was asked for a certificate.
type weakRoot struct {
	*file.Root

	mu    sync.Mutex
	down  error
	asked []time.Time
}

func newWeakRoot(t *testing.T, f *fixture) *weakRoot {
	t.Helper()
	root, err := file.OpenRoot(file.RootOptions{Dir: filepath.Join(f.dir, "root"), TrustDomain: td.Name(), Now: f.clock.clock().Wall})
	if err != nil {
		t.Fatal(err)
	}
	return &weakRoot{Root: root}
}

func (w *weakRoot) set(down error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down, w.asked = down, nil
}

func (w *weakRoot) Certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = append(w.asked, time.Now())
	if w.down != nil {
		return nil, w.down
	}
	return w.Root.Certify(ctx, request)
}

func (w *weakRoot) Roots(ctx context.Context) ([]*x509.Certificate, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.down != nil {
		return nil, w.down
	}
	return w.Root.Roots(ctx)
}

// pauses are the times between the questions for a certificate.
func (w *weakRoot) pauses() []time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []time.Duration
	for i := 1; i < len(w.asked); i++ {
		all = append(all, w.asked[i].Sub(w.asked[i-1]))
	}
	return all
}

// bubble runs a CA in a bubble of testing/synctest, in which hours take no time, and time passes only while nothing else is to be done.
func bubble(t *testing.T, test func(t *testing.T, f *fixture, root *weakRoot)) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.clock.running = time.Now()
		f.issuing, f.profile.DefaultTTL, f.profile.MaxTTL = 6*time.Hour, time.Hour, time.Hour
		root := newWeakRoot(t, f)
		f.root = root
		f.mustOpen(t)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- f.ca.Run(ctx) }()
		t.Cleanup(func() {
			stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
		test(t, f, root)
	})
}

// pass lets the bubble's time go by, and what is due then be done.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func TestRunRenewsTheIssuingCAByItself(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, _ *weakRoot) {
		for _, want := range []string{"active", "removed active", "removed removed active"} { // nothing was issued, so that nothing keeps them
			if got := f.states(t); got != want {
				t.Errorf("states %q, want %q", got, want)
			}
			f.mustIssue(t, f.caller("/ns/default/sa/web"), 5*time.Minute)
			pass(f.issuing / 2)
		}
		if problems := f.ca.Problems(); len(problems) > 0 {
			t.Errorf("problems %v", problems)
		}
	})
}

func TestARenewalThatFailsIsTriedAgainEverLater(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, root *weakRoot) {
		for _, outage := range []string{"the first", "the second"} { // which begins anew with short pauses
			root.set(errors.New("the vault is sealed"))
			pass(f.issuing/2 + time.Hour)
			var seconds []int
			for _, pause := range root.pauses() {
				seconds = append(seconds, int(pause/time.Second))
			}
			want := []int{5, 10, 20, 40, 80, 160, 300, 300, 300}
			if len(seconds) < len(want) || !slices.Equal(seconds[:len(want)], want) || slices.Max(seconds) > 300 {
				t.Errorf("%s outage: it was tried again after %d seconds", outage, seconds)
			}
			f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
			if problems := f.ca.Problems(); len(problems) != 2 { // the root does not answer, and the renewal fails
				t.Errorf("%s outage: problems %v", outage, problems)
			}
			active := f.active(t)
			root.set(nil)
			pass(5 * time.Minute)
			if problems := f.ca.Problems(); len(problems) > 0 || f.active(t) == active {
				t.Errorf("%s outage ended, and there are the problems %v and the same issuing CA", outage, problems)
			}
			if got := len(root.pauses()); got > 0 {
				t.Errorf("after %s outage the root was asked %d times more than once", outage, got)
			}
		}
	})
}

func TestRunHealsWhatAClockThatWasAheadLeft(t *testing.T) {
	bubble(t, func(t *testing.T, f *fixture, _ *weakRoot) {
		for _, jump := range []time.Duration{30 * 24 * time.Hour, -30 * 24 * time.Hour, f.issuing, -f.issuing / 2, -f.issuing / 2} {
			f.clock.jump(jump)
			pass(2 * time.Minute)
			f.mustIssue(t, f.caller("/ns/default/sa/web"), 5*time.Minute)
			if err := f.ca.Ready(t.Context()); err != nil {
				t.Errorf("two minutes after a jump of %s: %v", jump, err)
			}
		}
	})
}

// stickyKeys is a key store that deletes nothing while it is stuck.
type stickyKeys struct {
	ca.KeyStore
	stuck *error
}

func (s stickyKeys) Delete(ctx context.Context, ref string) error {
	if *s.stuck != nil {
		return *s.stuck
	}
	return s.KeyStore.Delete(ctx, ref)
}

// keyFiles are the names of the issuing CAs' keys on disk.
func (f *fixture) keyFiles(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(f.dir, "keys", "*.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestTheKeyOfARemovedIssuingCAIsDestroyedAlsoAfterACrash(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	first := f.keyFiles(t)
	f.clock.pass(f.issuing / 2)
	if err := f.ca.RenewIssuing(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.ca.RemoveRetired(t.Context()) // and no further: the process ends here
	if got := f.states(t); got != "removed active" || len(f.keyFiles(t)) != 2 {
		t.Fatalf("states %q, keys %v", got, f.keyFiles(t))
	}
	f.reopen(t)
	f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
	f.ca.Housekeep(t.Context())
	if keys := f.keyFiles(t); len(keys) != 1 || slices.Contains(keys, first[0]) {
		t.Errorf("the keys are %v, and %v is of the one that was removed", keys, first)
	}
	f.reopen(t) // what is gone is no problem
	f.ca.Housekeep(t.Context())
	if problems := f.ca.Problems(); len(problems) > 0 {
		t.Errorf("problems %v", problems)
	}
}

func TestAKeyThatCannotBeDestroyedIsAProblemUntilItIs(t *testing.T) {
	f := newFixture(t)
	store, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(f.dir, "keys")})
	if err != nil {
		t.Fatal(err)
	}
	stuck := error(&fs.PathError{Op: "remove", Path: "key", Err: errors.New("read-only file system")})
	f.keys = stickyKeys{store, &stuck}
	f.mustOpen(t)
	f.clock.pass(f.issuing / 2)
	f.ca.Housekeep(t.Context())
	if problems := f.ca.Problems(); len(problems) != 1 || !strings.Contains(problems[0].Error(), "keys of removed issuing CAs") ||
		!strings.Contains(problems[0].Error(), "read-only file system") {
		t.Errorf("problems %v", problems)
	}
	stuck = nil
	f.ca.Housekeep(t.Context())
	if problems := f.ca.Problems(); len(problems) > 0 || len(f.keyFiles(t)) != 1 {
		t.Errorf("problems %v, keys %v", problems, f.keyFiles(t))
	}
}
