package gate

import (
	"context"
	"errors"
	"net/netip"
	"sync"
)

// errCrowded says that a queue is so long that waiting in it makes no sense.
var errCrowded = errors.New("too many are waiting already")

var errStopping = errors.New("the CA is stopping")

// turns lets a number of holders work at once; the others wait, and the peers among them take turns. Who comes back to go on with what has begun goes
// before those who have not: else a crowd would be half done for as long as it takes to serve all of it, and done only then.
type turns struct {
	mu      sync.Mutex
	free    int       // turns that nobody has
	waiting int       // who has not given up
	most    int       // who may wait
	begun   []*waiter // who comes back
	lines   map[netip.Prefix]*line
	next    *line // whose turn is next, in a ring of the lines with somebody in them; nil: there is none

	ended chan struct{} // once nobody gets a turn any more
}

// line is where those of one peer wait.
type line struct {
	peer           netip.Prefix
	waiters        []*waiter
	before, behind *line // in the ring
}

type waiter struct {
	turn chan struct{} // closed when it has it
	gone bool          // it gave up
}

func newTurns(at, most int) *turns {
	return &turns{free: at, most: most, lines: map[netip.Prefix]*line{}, ended: make(chan struct{})}
}

// take waits for a turn, no longer than ctx. It is errCrowded when too many wait, and errStopping after end. Who has a turn gives it back.
func (t *turns) take(ctx context.Context, peer netip.Prefix) error {
	w, err := t.enqueue(peer)
	if w == nil {
		return err
	}
	return t.wait(ctx, w)
}

// again waits for another turn of somebody who had one, before those who had none, no longer than ctx.
func (t *turns) again(ctx context.Context) error {
	t.mu.Lock()
	if t.free > 0 {
		t.free--
		t.mu.Unlock()
		return nil
	}
	w := &waiter{turn: make(chan struct{})}
	t.begun = append(t.begun, w)
	t.waiting++
	t.mu.Unlock()
	return t.wait(ctx, w)
}

// enqueue puts somebody new in line. There is no waiter when it has its turn at once, or an error.
func (t *turns) enqueue(peer netip.Prefix) (*waiter, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.free > 0 {
		t.free--
		return nil, nil
	}
	l := t.lines[peer]
	if t.waiting >= t.most || l != nil && len(l.waiters) > max(t.most-t.waiting, fairShare) {
		return nil, errCrowded
	}
	if l == nil {
		l = t.add(peer)
	}
	w := &waiter{turn: make(chan struct{})}
	l.waiters = append(l.waiters, w)
	t.waiting++
	return w, nil
}

// wait waits until w has its turn.
func (t *turns) wait(ctx context.Context, w *waiter) (err error) {
	select {
	case <-w.turn:
		return nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-t.ended:
		err = errStopping
	}
	t.mu.Lock()
	select {
	case <-w.turn: // it came at the same moment: somebody else needs it
		t.mu.Unlock()
		t.give()
	default:
		w.gone = true
		t.waiting--
		t.mu.Unlock()
	}
	return err
}

// end sends away who waits, and who would wait. It is called once.
func (t *turns) end() { close(t.ended) }

// give gives a turn back: to who came back, or the first in line of the peer whose turn it is.
func (t *turns) give() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		w := t.first()
		if w == nil {
			t.free++
			return
		}
		if !w.gone {
			t.waiting--
			close(w.turn)
			return
		}
	}
}

// first takes the one who is next, also one who gave up. There may be none. The turns are locked.
func (t *turns) first() (w *waiter) {
	if len(t.begun) > 0 {
		w, t.begun = t.begun[0], t.begun[1:]
		return w
	}
	l := t.next
	if l == nil {
		return nil
	}
	w, l.waiters = l.waiters[0], l.waiters[1:]
	t.next = l.behind
	if len(l.waiters) == 0 {
		t.remove(l)
	}
	return w
}

// add puts a new line at the end of the ring.
func (t *turns) add(peer netip.Prefix) *line {
	l := &line{peer: peer}
	t.lines[peer] = l
	if t.next == nil {
		l.before, l.behind, t.next = l, l, l
		return l
	}
	l.before, l.behind = t.next.before, t.next
	l.before.behind, l.behind.before = l, l
	return l
}

func (t *turns) remove(l *line) {
	delete(t.lines, l.peer)
	if l.behind == l {
		t.next = nil
		return
	}
	l.before.behind, l.behind.before = l.behind, l.before
}

// length is how many wait.
func (t *turns) length() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.waiting
}
