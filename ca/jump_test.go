package ca_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
)

// crowd are callers that ask without a pause while a test does something to their CA.
type crowd struct {
	f      *fixture
	fresh  bool // their tokens are: issued by somebody else's clock, which is right, when they ask
	mu     sync.Mutex
	change *sync.Cond
	issued int
	denied int   // as unavailable
	odd    error // any other answer, or a certificate that does not verify
	stop   context.CancelFunc
	asking sync.WaitGroup
}

// crowd sets callers to work. end ends them, and fails the test if one was told anything but that the CA is unavailable.
func (f *fixture) crowd(t *testing.T, fresh bool) (c *crowd) {
	t.Helper()
	c = &crowd{f: f, fresh: fresh}
	c.change = sync.NewCond(&c.mu)
	ctx, stop := context.WithCancel(t.Context())
	c.stop = stop
	for range 4 {
		csr := newCSR(t, newKey(t), nil)
		c.asking.Go(func() {
			for ctx.Err() == nil {
				caller := f.caller("/ns/default/sa/web")
				if fresh {
					caller.IssuedAt = f.clock.clock().Wall()
				}
				_, err := f.ca.Issue(ctx, caller, ca.Request{CSR: csr, Delivery: ledger.DeliveryResponse, RequestID: "test"})
				c.mu.Lock()
				switch {
				case err == nil:
					c.issued++
				case errors.Is(err, ca.ErrUnavailable):
					c.denied++
				case ctx.Err() == nil:
					c.odd = err
				}
				c.change.Broadcast()
				c.mu.Unlock()
			}
		})
	}
	t.Cleanup(c.end(t))
	return c
}

func (c *crowd) end(t *testing.T) func() {
	return sync.OnceFunc(func() {
		c.stop()
		c.asking.Wait()
		if c.odd != nil {
			t.Errorf("a caller was told: %v", c.odd)
		}
	})
}

// await waits until of each so many more were counted.
func (c *crowd) await(issued, denied int) {
	defer time.AfterFunc(time.Minute, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.odd = fmt.Errorf("nothing for a minute; %d were issued, %d refused", c.issued, c.denied)
		c.change.Broadcast()
	}).Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for issued, denied = issued+c.issued, denied+c.denied; c.odd == nil && (c.issued < issued || c.denied < denied); {
		c.change.Wait()
	}
}

// intact makes sure that nothing was taken back on the clock's word: no event was dropped, no issuing CA removed.
func (f *fixture) intact(t *testing.T) {
	t.Helper()
	f.ca.Housekeep(t.Context())
	if head := f.ledger.Head(); head.First != 1 {
		t.Errorf("the ledger begins with event %d", head.First)
	}
	if got := f.states(t); strings.Contains(got, "removed") {
		t.Errorf("states %q", got)
	}
}

// sound makes sure that the ledger is.
func (f *fixture) sound(t *testing.T) {
	t.Helper()
	report, err := f.ledger.Verify(t.Context())
	if err != nil || len(report.Problems) > 0 {
		t.Errorf("the ledger: %v %v", report.Problems, err)
	}
}

// TestAClockThatJumpsAheadByAYearUnderLoad: callers are refused as unavailable until there is a new issuing CA, and then served. Nothing is pruned
// or removed before a token that was issued since bears the clock out.
func TestAClockThatJumpsAheadByAYearUnderLoad(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	callers := f.crowd(t, false)
	callers.await(20, 0)
	f.clock.jump(365 * 24 * time.Hour)
	callers.await(0, 20)
	f.intact(t) // this renews, too
	callers.await(20, 0)
	if err := f.verify(t, f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)); err != nil {
		t.Errorf("what is issued after the jump: %v", err)
	}
	f.intact(t)
	if problems := f.ca.Problems(); len(problems) != 1 || !strings.Contains(problems[0].Error(), "nothing is pruned or removed") {
		t.Errorf("problems %v", problems)
	}
	callers.end(t)()

	f.crowd(t, true).await(20, 0)
	if problems := f.ca.Problems(); len(problems) > 0 {
		t.Errorf("after fresh tokens: problems %v", problems)
	}
	f.ca.Housekeep(t.Context())
	if got := f.states(t); f.ledger.Head().First == 1 || got != "removed active" {
		t.Errorf("after fresh tokens the ledger begins with event %d, states %q", f.ledger.Head().First, got)
	}
	f.sound(t)
}

// TestAClockThatJumpsBackUnderLoad: within the issuing CA's life nobody notices; before it, callers are refused as unavailable until there is a new one. Nothing
// is lost, and times in the ledger do not go back.
func TestAClockThatJumpsBackUnderLoad(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	f.clock.pass(f.issuing) // the root's life begins long before
	f.ca.Housekeep(t.Context())
	callers := f.crowd(t, true)
	callers.await(20, 0)
	f.clock.jump(-30 * time.Minute)
	callers.await(20, 0)
	if callers.denied > 0 {
		t.Errorf("%d callers were refused", callers.denied)
	}
	f.clock.jump(-f.issuing / 2)
	callers.await(0, 20)
	before := f.ledger.Head()
	f.ca.Housekeep(t.Context())
	callers.await(20, 0)
	if err := f.verify(t, f.mustIssue(t, f.caller("/ns/default/sa/web"), 0)); err != nil {
		t.Errorf("what is issued after the jump: %v", err)
	}
	f.clock.jump(f.issuing/2 + 30*time.Minute)
	callers.await(20, 0)
	callers.end(t)()
	if head := f.ledger.Head(); head.First > before.First || head.Time < before.Time {
		t.Errorf("the ledger went from %+v to %+v", before, head)
	}
	f.sound(t)
}
