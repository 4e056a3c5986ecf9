package gate

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
)

func peerNamed(text string) netip.Prefix { return netip.MustParsePrefix(text + "/32") }

// line puts one more caller of a peer into the queue, and returns once it is there. It says on served when it has its turn.
func queue(t *testing.T, turns *turns, ctx context.Context, peer netip.Prefix, served chan<- netip.Prefix) <-chan error {
	t.Helper()
	before, ended := turns.length(), make(chan error, 1)
	go func() {
		err := turns.take(ctx, peer)
		if err == nil {
			served <- peer
		}
		ended <- err
	}()
	for turns.length() == before {
		select {
		case err := <-ended:
			t.Fatalf("it did not wait: %v", err)
		default:
		}
	}
	return ended
}

// Somebody with a thousand calls in the queue does not keep somebody with one waiting.
func TestPeersTakeTurns(t *testing.T) {
	turns, served := newTurns(1, 10_000), make(chan netip.Prefix)
	greedy, modest, third := peerNamed("192.0.2.1"), peerNamed("192.0.2.2"), peerNamed("192.0.2.3")
	if err := turns.take(t.Context(), greedy); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		queue(t, turns, t.Context(), greedy, served)
	}
	queue(t, turns, t.Context(), modest, served)
	queue(t, turns, t.Context(), modest, served)
	queue(t, turns, t.Context(), third, served)
	var order []netip.Prefix
	for range 6 {
		turns.give()
		order = append(order, <-served)
	}
	if want := []netip.Prefix{greedy, modest, third, greedy, modest, greedy}; !slices.Equal(order, want) {
		t.Errorf("served in the order %v, want %v", order, want)
	}
	for range 1000 - 3 {
		turns.give()
		<-served
	}
	turns.give()
	if turns.free != 1 || turns.waiting != 0 || len(turns.lines) != 0 || turns.next != nil {
		t.Errorf("after all: %+v", turns)
	}
}

// What has begun is finished before more is begun, so that a crowd is served one after the other and not all of it at its end.
func TestWhoComesBackGoesFirst(t *testing.T) {
	turns, served := newTurns(1, 100), make(chan netip.Prefix)
	stranger, back := peerNamed("192.0.2.1"), peerNamed("192.0.2.2")
	if err := turns.take(t.Context(), back); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		queue(t, turns, t.Context(), stranger, served)
	}
	gaveUp, cancel := context.WithCancel(t.Context())
	cancel()
	if err := turns.again(gaveUp); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	before := turns.length()
	go func() {
		if turns.again(t.Context()) == nil {
			served <- back
		}
	}()
	for turns.length() == before {
		runtime.Gosched()
	}
	turns.give()
	if first := <-served; first != back {
		t.Errorf("%s went first", first)
	}
	for range 10 {
		turns.give()
		if next := <-served; next != stranger {
			t.Errorf("%s had another turn", next)
		}
	}
	turns.give()
	if turns.free != 1 || turns.waiting != 0 {
		t.Errorf("after all: %+v", turns)
	}
}

// Whoever gives up takes nobody's turn, and none is lost, at whatever moment.
func TestNoTurnIsLostWhenCallersGiveUp(t *testing.T) {
	const slots, callers = 3, 64
	turns := newTurns(slots, callers*callers)
	var at, most atomic.Int64
	var all sync.WaitGroup
	for i := range callers {
		peer := peerNamed(netip.AddrFrom4([4]byte{192, 0, 2, byte(i % 7)}).String())
		all.Go(func() {
			for n := range 200 {
				ctx, cancel := context.WithCancel(t.Context())
				if n%3 == 0 {
					go cancel()
				}
				take := func() error { return turns.take(ctx, peer) }
				if n%5 == 0 {
					take = func() error { return turns.again(ctx) }
				}
				if take() == nil {
					now := at.Add(1)
					for seen := most.Load(); now > seen && !most.CompareAndSwap(seen, now); seen = most.Load() {
					}
					at.Add(-1)
					turns.give()
				}
				cancel()
			}
		})
	}
	all.Wait()
	if most.Load() > slots {
		t.Errorf("%d at once, where %d may be", most.Load(), slots)
	}
	for range slots {
		if err := turns.take(t.Context(), peerNamed("192.0.2.1")); err != nil {
			t.Fatal(err)
		}
	}
	if turns.free != 0 || turns.waiting != 0 {
		t.Errorf("%d turns are free, %d wait", turns.free, turns.waiting)
	}
}

// Refusing is the last resort, and meets the peer that has most: somebody new always finds room.
func TestAFullQueueRefusesThePeerThatFillsIt(t *testing.T) {
	turns, served := newTurns(1, 100), make(chan netip.Prefix, 1000)
	greedy, modest := peerNamed("192.0.2.1"), peerNamed("192.0.2.2")
	if err := turns.take(t.Context(), greedy); err != nil {
		t.Fatal(err)
	}
	for range 51 { // half of all
		queue(t, turns, t.Context(), greedy, served)
	}
	if err := turns.take(t.Context(), greedy); !errors.Is(err, errCrowded) {
		t.Errorf("one more than its share: %v", err)
	}
	for range 10 {
		queue(t, turns, t.Context(), modest, served)
	}
}

func TestWhoWaitsIsSentAwayWhenTheCAStops(t *testing.T) {
	turns, served := newTurns(1, 100), make(chan netip.Prefix, 1)
	peer := peerNamed("192.0.2.1")
	if err := turns.take(t.Context(), peer); err != nil {
		t.Fatal(err)
	}
	waiting := queue(t, turns, t.Context(), peer, served)
	turns.end()
	if err := <-waiting; !errors.Is(err, errStopping) {
		t.Errorf("error %v", err)
	}
	if err := turns.take(t.Context(), peer); !errors.Is(err, errStopping) {
		t.Errorf("a later one: %v", err)
	}
	turns.give()
}
