package agent

import (
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"kedge/issuer/sds"
)

// TestABundleIsAcknowledgedOnceEveryConsumerHasIt, and not before those of an earlier run had time to come back.
func TestABundleIsAcknowledgedOnceEveryConsumerHasIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newConsumers(time.Minute)
		oldest := func(latest, want uint64) {
			t.Helper()
			if got, _, _ := c.oldest(latest); got != want {
				t.Errorf("the oldest of up to %d is %d, not %d", latest, got, want)
			}
		}
		oldest(1, 0) // the agent has just started
		one := c.enter()
		one.holds(1)
		oldest(1, 0)
		if _, _, again := c.oldest(1); again != time.Minute {
			t.Errorf("it is looked at again after %s", again)
		}
		pass(time.Minute)
		oldest(1, 1)
		oldest(2, 1)
		two := c.enter() // it is not known what it has
		oldest(2, 0)
		one.holds(2)
		oldest(2, 0)
		two.holds(2)
		oldest(2, 2)
		oldest(3, 2)

		two.leave() // it may come back with what it has
		two.leave() // a second time
		one.holds(3)
		oldest(3, 2)
		pass(59 * time.Second)
		oldest(3, 2)
		again := c.enter() // it has
		again.holds(3)
		oldest(3, 2) // nobody knows that it is the same
		pass(time.Second)
		oldest(3, 3)
		one.leave()
		again.leave()
		oldest(4, 3)
		pass(time.Minute)
		oldest(4, 4) // nobody is left
		if c.count() != 0 || len(c.gone) != 0 {
			t.Errorf("there are %d, and %d have gone", c.count(), len(c.gone))
		}
	})
}

// TestConsumersThatComeAndGoTakeNoMemory: a client that reconnects all the time is one that has gone.
func TestConsumersThatComeAndGoTakeNoMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newConsumers(time.Hour)
		for range 10_000 {
			c.enter().leave()
		}
		if len(c.gone) != 1 || len(c.live) != 0 {
			t.Errorf("%d are remembered as gone, %d as there", len(c.gone), len(c.live))
		}
	})
}

// TestAStreamHoldsWhatItAcknowledged: not what it refused, and nothing as long as it asks for no trust bundle, or for another trust domain's.
func TestAStreamHoldsWhatItAcknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		early, _ := b.Open(t.Context())
		early.Want(sds.Wants{Bundle: true}) // perhaps the own one's, which is not known yet
		b.start(t)
		pass(time.Minute)
		m, _ := b.materials()
		oldest := func(want uint64) {
			t.Helper()
			if got, _, _ := b.consumers.oldest(b.orderOf(m.Bundles[0])); got != want {
				t.Errorf("the oldest is %d, not %d", got, want)
			}
		}
		oldest(0)
		early.Close()
		pass(time.Minute)
		stream, _ := b.Open(t.Context())
		stream.Want(sds.Wants{SVID: true})
		oldest(1)
		stream.Want(sds.Wants{SVID: true, Bundle: true})
		oldest(1)
		stream.Answered(sds.Answer{Names: []string{sds.NameSVID}, SVID: m.SVID})
		oldest(1)
		stream.Want(sds.Wants{SVID: true, Bundle: true, Own: true})
		oldest(0)
		stream.Answered(sds.Answer{Names: []string{sds.NameBundle}, Bundle: m.Bundles[0], Reason: "it does"})
		oldest(0)
		stream.Answered(sds.Answer{Names: []string{sds.NameBundle}, Bundle: &sds.Bundle{}})
		oldest(0) // one that is not known any more
		stream.Answered(sds.Answer{Names: []string{sds.NameBundle}, Bundle: m.Bundles[0]})
		oldest(1)
		stream.Close()
		late, _ := b.Open(t.Context())
		late.Close()
		late.Want(sds.Wants{Bundle: true, Own: true}) // after its end
		oldest(1)
	})
}

// TestFilesCountOnceProgramsHadTimeToReadThem.
func TestFilesCountOnceProgramsHadTimeToReadThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.w.Files = &Files{Dir: t.TempDir(), Access: private, RereadAfter: 5 * time.Minute}
		ended := make(chan struct{})
		go func() {
			b.keepFiles(t.Context())
			close(ended)
		}()
		t.Cleanup(func() { <-ended })
		b.start(t)
		pass(4 * time.Minute)
		oldest := func(latest, want uint64) {
			t.Helper()
			if got, _, _ := b.consumers.oldest(latest); got != want {
				t.Errorf("the oldest of up to %d is %d, not %d", latest, got, want)
			}
		}
		oldest(1, 0)
		pass(2 * time.Minute)
		oldest(1, 1)
		b.mu.Lock()
		b.takeLocked(b.svid.ID.TrustDomain(), b.svid.Roots, b.bundle.PEM, sds.Number{Incarnation: "a", Sequence: 2}, time.Now())
		b.mu.Unlock()
		b.publish()
		pass(4 * time.Minute)
		oldest(2, 1)
		pass(2 * time.Minute)
		oldest(2, 2)
		first := b.svid.order
		if got, _, _ := b.holders.oldest(first); got != first {
			t.Error("the first SVID is there for long, and counts as unread")
		}
		for len(b.ca.asked()) < 2 { // a renewal brings no other bundle
			pass(time.Minute)
		}
		oldest(2, 2)
		pass(3 * time.Minute)
		if got, _, _ := b.holders.oldest(first + 1); got != first {
			t.Error("the next SVID counts as read too early")
		}
		pass(2 * time.Minute)
		if got, _, _ := b.holders.oldest(first + 1); got != first+1 {
			t.Error("the next SVID counts as unread")
		}
		oldest(2, 2)
	})
}

// TestFilesThatCannotBeWrittenAreAProblemUntilTheyCan: programs have the ones of before, and so the CA is told.
func TestFilesThatCannotBeWrittenAreAProblemUntilTheyCan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		dir := filepath.Join(t.TempDir(), "svid")
		write(t, dir, "a file where the folder shall be")
		b.w.Files = &Files{Dir: dir, Access: private}
		ended := make(chan struct{})
		go func() {
			b.keepFiles(t.Context())
			close(ended)
		}()
		t.Cleanup(func() { <-ended })
		b.start(t)
		pass(10 * time.Minute)
		if got, _, _ := b.consumers.oldest(1); got != 0 || len(b.problems()) != 1 {
			t.Errorf("the oldest bundle is %d, and the problems are %v", got, b.problems())
		}
		if n := b.said("the files are not written"); n < 10 || n > 60 {
			t.Errorf("in ten minutes it is said %d times", n)
		}
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
		pass(longestRetry)
		if got, _, _ := b.consumers.oldest(1); got != 1 || len(b.problems()) != 0 {
			t.Errorf("the oldest bundle is %d, and the problems are %v", got, b.problems())
		}
	})
}
