package gate

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func peerNamed(text string) netip.Prefix { return netip.MustParsePrefix(text + "/32") }

// served is somebody who has a turn.
type served struct {
	peer netip.Prefix
	turn turn
}

// queued puts one more caller of a peer into the queue, and returns once it is there. It says on out when it has its turn.
func queued(t *testing.T, turns *turns, ctx context.Context, peer netip.Prefix, out chan<- served) <-chan error {
	t.Helper()
	before, ended := turns.length(), make(chan error, 1)
	go func() {
		had, err := turns.take(ctx, peer)
		if err == nil {
			out <- served{peer, had}
		}
		ended <- err
	}()
	for turns.length() == before {
		select {
		case err := <-ended:
			t.Fatalf("it did not wait: %v", err)
		default:
			runtime.Gosched()
		}
	}
	return ended
}

// busy are turns of which the only one is taken, with many places.
func busy(t *testing.T) (turns *turns, out chan served, had turn) {
	t.Helper()
	turns, out = newTurns(1, 10_000, 10_000), make(chan served)
	turns.typical = time.Hour // as most turns take in these tests
	had, err := turns.take(t.Context(), peerNamed("198.51.100.1"))
	if err != nil {
		t.Fatal(err)
	}
	return turns, out, had
}

// settled says what is left of turns with one turn and many places once everybody has given back and left.
func settled(t *testing.T, turns *turns, left int) {
	t.Helper()
	for range left {
		turns.leave()
	}
	if turns.free != 1 || turns.places != 10_000 || turns.waiting != 0 || len(turns.lines) != 0 || len(turns.queue) != 0 || len(turns.ahead) != 0 {
		t.Errorf("after all: %d turns, %d places, %d wait, %d lines, %d in the queue", turns.free, turns.places, turns.waiting, len(turns.lines), len(turns.queue))
	}
}

// atRest waits until so many turns are free: one may be on its way by the network.
func atRest(t *testing.T, turns *turns, want int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; runtime.Gosched() {
		turns.mu.Lock()
		free := turns.free
		turns.mu.Unlock()
		if free == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d turns are free", free, want)
		}
	}
}

// Somebody with a thousand calls in the queue does not keep somebody with two waiting.
func TestPeersTakeTurns(t *testing.T) {
	turns, out, had := busy(t)
	greedy, modest, third := peerNamed("192.0.2.1"), peerNamed("192.0.2.2"), peerNamed("192.0.2.3")
	const many = 1000
	for range many {
		queued(t, turns, t.Context(), greedy, out)
	}
	queued(t, turns, t.Context(), modest, out)
	queued(t, turns, t.Context(), modest, out)
	queued(t, turns, t.Context(), third, out)
	took := map[netip.Prefix]time.Duration{greedy: time.Hour, modest: time.Minute, third: time.Minute}
	var order []netip.Prefix
	turns.give(had, false)
	for range many + 3 {
		next := <-out
		order = append(order, next.peer)
		turns.spent(next.turn, took[next.peer], true)
	}
	if want := []netip.Prefix{greedy, modest, third, modest, greedy, greedy}; !slices.Equal(order[:6], want) {
		t.Errorf("served in the order %v, want %v", order[:6], want)
	}
	settled(t, turns, many+4)
}

// Who asks for what takes long gets as much time as who asks for what does not, not as many turns.
func TestTimeIsShared(t *testing.T) {
	turns, out, had := busy(t)
	dear, cheap := peerNamed("192.0.2.1"), peerNamed("192.0.2.2")
	took := map[netip.Prefix]time.Duration{dear: 10 * time.Hour, cheap: time.Hour}
	for range 40 {
		queued(t, turns, t.Context(), dear, out)
		queued(t, turns, t.Context(), cheap, out)
	}
	turns.give(had, false)
	had, count := turn{}, map[netip.Prefix]int{}
	for range 33 {
		next := <-out
		count[next.peer]++
		turns.spent(next.turn, took[next.peer], true)
	}
	if count[dear] < 3 || count[dear] > 4 {
		t.Errorf("of 33 turns those of 10 h had %d, those of 1 h %d", count[dear], count[cheap])
	}
	for range 80 - 33 {
		turns.give((<-out).turn, false)
	}
	settled(t, turns, 81)
}

// However many go on asking for much: somebody who asks for little is next, the first time and later.
func TestWhoAsksForLittleDoesNotWaitForAllTheOthers(t *testing.T) {
	turns, out, had := busy(t)
	const crowd, each = 64, 20
	for i := range crowd * each {
		queued(t, turns, t.Context(), peerNamed(fmt.Sprintf("192.0.2.%d", i%crowd)), out)
	}
	modest := peerNamed("203.0.113.1")
	turns.give(had, false)
	next := <-out
	for round := range each - 2 {
		for range crowd {
			turns.spent(next.turn, time.Hour, true)
			next = <-out
		}
		queued(t, turns, t.Context(), modest, out)
		turns.spent(next.turn, time.Hour, true)
		if next = <-out; next.peer != modest {
			t.Fatalf("in round %d it is %s that is next", round, next.peer)
		}
		turns.spent(next.turn, time.Minute, true)
		next = <-out
	}
	n := 0
	for turns.length() > 0 {
		turns.give(next.turn, false)
		next = <-out
		n++
	}
	turns.give(next.turn, false)
	settled(t, turns, crowd*each+each-2+1)
}

// Also when some of those who go on asking have turns that take much longer than those of the others, so that these are behind what is theirs.
func TestWhoAsksForLittleDoesNotWaitForThoseWhoAreBehind(t *testing.T) {
	turns, out, had := busy(t)
	turns.typical = time.Minute
	const crowd, each = 64, 100
	for i := range crowd * each {
		queued(t, turns, t.Context(), peerNamed(fmt.Sprintf("192.0.2.%d", i%crowd)), out)
	}
	turns.give(had, false)
	next, comers := <-out, 0
	for n := range crowd * each / 2 {
		took := time.Minute
		if n%200 == 0 {
			took = time.Hour
		}
		if n > 2*crowd && n%50 == 49 {
			comers++
			modest := peerNamed(fmt.Sprintf("203.0.113.%d", comers))
			queued(t, turns, t.Context(), modest, out)
			turns.spent(next.turn, took, true)
			if next = <-out; next.peer != modest {
				t.Fatalf("after %d turns it is %s that is next", n, next.peer)
			}
			took = time.Minute
		}
		turns.spent(next.turn, took, true)
		next = <-out
	}
	n := crowd*each/2 + comers
	for turns.length() > 0 {
		turns.give(next.turn, false)
		next = <-out
		n++
	}
	turns.give(next.turn, false)
	settled(t, turns, n+2)
}

// Nor do ever new peers keep those waiting who have had something before.
func TestNewcomersKeepNobodyWaiting(t *testing.T) {
	turns, out, had := busy(t)
	old := peerNamed("192.0.2.1")
	queued(t, turns, t.Context(), old, out)
	queued(t, turns, t.Context(), old, out)
	newcomers := 0
	come := func() {
		newcomers++
		queued(t, turns, t.Context(), peerNamed(fmt.Sprintf("198.51.%d.%d", newcomers/256, newcomers%256)), out)
	}
	for range 10 {
		come()
	}
	turns.give(had, false)
	next := <-out
	if next.peer != old {
		t.Fatalf("%s is first", next.peer)
	}
	waited := 0
	for ; waited < 100; waited++ {
		come()
		turns.spent(next.turn, time.Hour, true)
		if next = <-out; next.peer == old {
			break
		}
	}
	if waited > 90 {
		t.Errorf("its second turn came after %d newcomers", waited)
	}
	for turns.length() > 0 {
		turns.give(next.turn, false)
		next = <-out
	}
	turns.give(next.turn, false)
	settled(t, turns, newcomers+3)
}

// Also when those who ask for little are many, as long as they have less than their part.
func TestManyWhoAskForLittleDoNotWaitForAllTheOthers(t *testing.T) {
	for _, many := range []struct{ greedy, each, modest, every int }{{64, 2, 1, 1000}, {64, 2, 100, 20}, {64, 2, 100, 4}, {64, 1, 1, 1000}, {64, 1, 100, 4}} {
		turns, _, had := busy(t)
		came, waiting := map[*waiter]int{}, map[*waiter]bool{} // after so many greedy turns
		ask := func(i int) *waiter {
			w, err := turns.enqueue(netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, byte(i / 256), byte(i)}), 32))
			if err != nil || w == nil {
				t.Fatal(w, err)
			}
			waiting[w] = true
			return w
		}
		for i := range many.each * many.greedy {
			ask(i % many.greedy)
		}
		greedy, sum, asked := 0, 0, 0
		turns.give(had, false)
		for n := range 6000 {
			if n > 2*many.greedy && n%many.every == 0 { // once they have begun to differ
				came[ask(1000+asked%many.modest)] = greedy
				asked++
			}
			for w := range waiting {
				select {
				case <-w.turn:
				default:
					continue
				}
				delete(waiting, w)
				turns.leave()
				turns.spent(turn{line: w.line, counted: w.counted}, time.Duration(1+n*n%13)*10*time.Minute, true)
				if before, modest := came[w]; modest {
					sum += greedy - before
				} else {
					greedy++
					for i := range many.greedy { // it asks again
						if w.line.peer.Contains(netip.AddrFrom4([4]byte{203, 0, 0, byte(i)})) {
							ask(i)
						}
					}
				}
				break
			}
		}
		if average := float64(sum) / float64(asked); average > 4 {
			t.Errorf("beside %d who always ask, %d at once, each of %d who have a part of 1/%d together waits for %.1f of their turns", many.greedy, many.each, many.modest, many.every, average)
		}
		if n := len(turns.ahead); n > 8*many.greedy {
			t.Errorf("%d lines are remembered beside %d in which somebody waits", n, len(turns.queue))
		}
	}
}

// A machine that stood still makes nobody wait for as long again.
func TestATurnInWhichTheMachineStoodStillIsNotDear(t *testing.T) {
	turns := newTurns(1, 100, 100)
	if _, err := turns.enqueue(peerNamed("198.51.100.1")); err != nil {
		t.Fatal(err)
	}
	var waiters []*waiter
	for i := range 3 {
		w, err := turns.enqueue(peerNamed(fmt.Sprintf("192.0.2.%d", i)))
		if err != nil {
			t.Fatal(err)
		}
		waiters = append(waiters, w)
	}
	turns.give(turn{began: time.Now().Add(-time.Hour)}, false)
	<-waiters[0].turn
	turns.give(turn{line: waiters[0].line, began: time.Now().Add(-time.Hour), counted: waiters[0].counted}, false)
	if due, most := waiters[0].line.due, 3*longestTurn; due > most || turns.clock > most || turns.typical > longestTurn/4 {
		t.Errorf("after an hour it is due at %s, the clock is at %s, and a turn typically takes %s", due, turns.clock, turns.typical)
	}
}

// Nor does a peer whose turn was interrupted pay for what others had meanwhile.
func TestATurnThatWasInterruptedIsNotPaidForInFull(t *testing.T) {
	turns, out, had := busy(t)
	const crowd, each = 64, 20
	for i := range crowd * each {
		queued(t, turns, t.Context(), peerNamed(fmt.Sprintf("192.0.2.%d", i%crowd)), out)
	}
	modest := peerNamed("203.0.113.1")
	queued(t, turns, t.Context(), modest, out)
	queued(t, turns, t.Context(), modest, out)
	turns.give(had, false)
	waited, asked := 0, false
	var next served
	for {
		if next = <-out; next.peer == modest && asked {
			break
		}
		took := time.Hour
		if next.peer == modest {
			asked, took = true, 1000*time.Hour
		} else if asked {
			waited++
		}
		turns.spent(next.turn, took, true)
	}
	if most := (outlier + 1) * (crowd + 1); waited > most {
		t.Errorf("it waited for %d turns, and not for %d at most", waited, most)
	}
	for turns.length() > 0 {
		turns.give(next.turn, false)
		next = <-out
	}
	turns.give(next.turn, false)
	settled(t, turns, crowd*each+3)
}

// Peers that are done with are forgotten also while others wait all the time.
func TestPeersAreForgotten(t *testing.T) {
	turns, out, had := busy(t)
	always := peerNamed("192.0.2.1")
	queued(t, turns, t.Context(), always, out)
	next := served{always, had}
	for i := range 1000 {
		queued(t, turns, t.Context(), always, out)
		queued(t, turns, t.Context(), peerNamed(fmt.Sprintf("203.0.%d.%d", i/256, i%256)), out)
		for range 2 {
			turns.spent(next.turn, time.Hour, true)
			turns.leave()
			next = <-out
		}
	}
	if n := len(turns.lines); n > 20 || n != len(turns.queue)+len(turns.ahead) {
		t.Errorf("%d lines are remembered", n)
	}
	for turns.length() > 0 {
		turns.give(next.turn, false)
		turns.leave()
		next = <-out
	}
	turns.give(next.turn, false)
	settled(t, turns, 1)
}

// There are no more half done than there are places, also while a turn is free.
func TestWhoHasNoPlaceWaits(t *testing.T) {
	turns, out := newTurns(2, 1, 100), make(chan served)
	peer := peerNamed("192.0.2.1")
	first, err := turns.take(t.Context(), peer)
	if err != nil {
		t.Fatal(err)
	}
	turns.give(first, false)
	queued(t, turns, t.Context(), peer, out)
	if err := turns.again(t.Context(), &first); err != nil { // it has its place
		t.Fatal(err)
	}
	turns.give(first, false)
	turns.leave()
	turns.give((<-out).turn, false)
	turns.leave()
	if turns.free != 2 || turns.places != 1 {
		t.Errorf("after all: %d turns, %d places", turns.free, turns.places)
	}
}

// What has begun is finished before more is begun, so that a crowd is served one after the other and not all of it at its end.
func TestWhoComesBackGoesFirst(t *testing.T) {
	turns, out, had := busy(t)
	stranger, back := peerNamed("192.0.2.1"), peerNamed("192.0.2.2")
	for range 10 {
		queued(t, turns, t.Context(), stranger, out)
	}
	gaveUp, cancel := context.WithCancel(t.Context())
	cancel()
	if err := turns.again(gaveUp, &turn{}); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	before := turns.length()
	go func() {
		var again turn
		if turns.again(t.Context(), &again) == nil {
			out <- served{back, again}
		}
	}()
	for turns.length() == before {
		runtime.Gosched()
	}
	turns.give(had, false)
	next := <-out
	if next.peer != back {
		t.Errorf("%s went first", next.peer)
	}
	for range 10 {
		turns.give(next.turn, false)
		if next = <-out; next.peer != stranger {
			t.Errorf("%s had another turn", next.peer)
		}
	}
	turns.give(next.turn, false)
	settled(t, turns, 11)
}

// Whoever gives up takes nobody's turn, and none is lost, nor a place, at whatever moment.
func TestNoTurnIsLostWhenCallersGiveUp(t *testing.T) {
	const slots, places, callers = 3, 5, 64
	turns := newTurns(slots, places, callers*callers)
	var at, most, inside, mostInside atomic.Int64
	up := func(n, most *atomic.Int64) {
		now := n.Add(1)
		for seen := most.Load(); now > seen && !most.CompareAndSwap(seen, now); seen = most.Load() {
		}
	}
	var all sync.WaitGroup
	for i := range callers {
		peer := peerNamed(netip.AddrFrom4([4]byte{192, 0, 2, byte(i % 7)}).String())
		all.Go(func() {
			for n := range 200 {
				ctx, cancel := context.WithCancel(t.Context())
				if n%3 == 0 {
					go cancel()
				}
				if had, err := turns.take(ctx, peer); err == nil {
					up(&inside, &mostInside)
					up(&at, &most)
					at.Add(-1)
					turns.give(had, false)
					if turns.again(ctx, &had) == nil {
						up(&at, &most)
						at.Add(-1)
						turns.give(had, false)
					}
					inside.Add(-1)
					turns.leave()
				}
				cancel()
			}
		})
	}
	all.Wait()
	if most.Load() > slots || mostInside.Load() > places {
		t.Errorf("%d turns at once, where %d may be; %d places, of %d", most.Load(), slots, mostInside.Load(), places)
	}
	if turns.free != slots || turns.places != places || turns.waiting != 0 {
		t.Errorf("%d turns are free, %d places, %d wait", turns.free, turns.places, turns.waiting)
	}
}

// Whoever gives up leaves nothing behind, so that it does not count against its peer.
func TestWhoGivesUpIsGone(t *testing.T) {
	turns, out, had := busy(t)
	ctx, cancel := context.WithCancel(t.Context())
	var ended []<-chan error
	for i := range 100 {
		ended = append(ended, queued(t, turns, ctx, peerNamed(fmt.Sprintf("192.0.2.%d", i%10)), out))
	}
	if n := turns.crowd(); n != 10 {
		t.Errorf("a crowd of %d", n)
	}
	cancel()
	for _, e := range ended {
		if err := <-e; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	if n := turns.crowd(); n != 0 {
		t.Errorf("a crowd of %d has given up", n)
	}
	turns.give(had, false)
	settled(t, turns, 1)
}

// Refusing is the last resort, and meets the peer that has most: somebody new always finds room.
func TestAFullQueueRefusesThePeerThatFillsIt(t *testing.T) {
	turns, out := newTurns(1, 1, 100), make(chan served, 1000)
	greedy, modest := peerNamed("192.0.2.1"), peerNamed("192.0.2.2")
	if _, err := turns.take(t.Context(), greedy); err != nil {
		t.Fatal(err)
	}
	for range 51 { // half of all
		queued(t, turns, t.Context(), greedy, out)
	}
	if _, err := turns.take(t.Context(), greedy); !errors.Is(err, errCrowded) {
		t.Errorf("one more than its share: %v", err)
	}
	for range 10 {
		queued(t, turns, t.Context(), modest, out)
	}
}

func TestWhoWaitsIsSentAwayWhenTheCAStops(t *testing.T) {
	turns, out, had := busy(t)
	peer := peerNamed("192.0.2.1")
	waiting := queued(t, turns, t.Context(), peer, out)
	turns.end()
	if err := <-waiting; !errors.Is(err, errStopping) {
		t.Errorf("error %v", err)
	}
	if _, err := turns.take(t.Context(), peer); !errors.Is(err, errStopping) {
		t.Errorf("a later one: %v", err)
	}
	turns.give(had, false)
	settled(t, turns, 1)
}

// A turn that goes by way of the network is not lost: not when somebody waits for it, nor when who waited gives up meanwhile, nor after the end.
func TestATurnThatGoesByTheNetworkComesBack(t *testing.T) {
	turns, out, had := busy(t)
	closed := make(chan struct{})
	turns.way = &lookout{turns: turns, closed: closed}
	peer, sent, left := peerNamed("192.0.2.1"), 0, 1
	next := served{peer, had}
	for i := range 300 {
		ctx, cancel := context.WithCancel(t.Context())
		waiting := queued(t, turns, ctx, peer, out)
		if i == 200 {
			close(closed)
		}
		before := turns.way.last
		turns.spent(next.turn, time.Duration(i)*time.Hour, true)
		if turns.way.last != before {
			sent++
		}
		if i%3 == 0 {
			cancel() // perhaps before it has the turn
		}
		select {
		case next = <-out:
		case err := <-waiting:
			if !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
			atRest(t, turns, 1)
			again, err := turns.take(t.Context(), peer)
			if err != nil {
				t.Fatal(err)
			}
			next = served{peer, again}
		}
		left++
		cancel()
	}
	if sent < 200 {
		t.Errorf("%d turns went by the network", sent)
	}
	turns.give(next.turn, false)
	atRest(t, turns, 1)
	settled(t, turns, left)
}
