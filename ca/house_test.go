package ca_test

import (
	"context"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"kedge/ca"
	"kedge/plugins/file"
)

// live lets a CA run, in a bubble of testing/synctest, until the test ends.
func (f *fixture) live(t *testing.T) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- f.ca.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// TestACAThatIsOftenRestartedPrunesAllTheSame: it does not wait for the first tick.
func TestACAThatIsOftenRestartedPrunesAllTheSame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.mustOpen(t)
		f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)
		f.clock.pass(30 * 24 * time.Hour)
		f.live(t)
		<-time.After(time.Second) // of the bubble, and far from the first tick
		synctest.Wait()
		if head := f.ledger.Head(); head.First == 1 {
			t.Errorf("none of %d events is dropped", head.Number)
		}
	})
}

// hangingKeys is a key store that deletes nothing until it is released, and says when it was asked to.
type hangingKeys struct {
	ca.KeyStore
	asked, release chan struct{}
}

func (h hangingKeys) Delete(ctx context.Context, ref string) error {
	select {
	case h.asked <- struct{}{}:
	default: // that is known
	}
	<-h.release
	return h.KeyStore.Delete(ctx, ref)
}

// TestChoresThatTakeLongHoldUpNoRenewal: here a key store hangs when it is to destroy a key.
func TestChoresThatTakeLongHoldUpNoRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		store, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(f.dir, "keys")})
		if err != nil {
			t.Fatal(err)
		}
		keys := hangingKeys{store, make(chan struct{}, 1), make(chan struct{})}
		f.keys = keys
		f.mustOpen(t)
		f.clock.pass(f.issuing / 2)
		if err := f.ca.RenewIssuing(t.Context()); err != nil { // the first can be removed: nothing is under it
			t.Fatal(err)
		}
		f.live(t)
		<-keys.asked
		f.clock.pass(f.issuing / 2)
		<-time.After(2 * time.Minute) // of the bubble
		synctest.Wait()
		if got := f.states(t); got != "removed retired active" {
			t.Errorf("states %q", got)
		}
		close(keys.release)
	})
}
