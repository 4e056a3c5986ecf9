package gate

import (
	"container/heap"
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"
)

// errCrowded says that a queue is so long that waiting in it makes no sense.
var errCrowded = errors.New("too many are waiting already")

var errStopping = errors.New("the CA is stopping")

// turns lets a number of holders work at once; the others wait. Whose turn is next is a matter of what the peers have had of the holders' time: WF2Q+ with
// equal weights (Bennett and Zhang, Hierarchical packet fair queueing algorithms, 1996), but that who has not asked for a while comes before those who have
// gone on asking. So somebody who asks for little does not wait behind others who ask for much, however many those are; and those who ask for much get as
// much as each other, be it in many cheap turns or in few dear ones.
//
// A holder has a place besides, from its first turn until it leaves: places bound how many are half done.
//
// Who comes back to go on with what has begun goes before those who have not: else a crowd would be half done for as long as it takes to serve all of it, and
// done only then.
type turns struct {
	mu      sync.Mutex
	free    int       // turns that nobody has
	places  int       // that nobody has
	waiting int       // who has not given up
	most    int       // who may wait
	begun   []*waiter // who comes back
	lines   map[netip.Prefix]*line
	queue   queue         // the lines with somebody in them
	clock   time.Duration // how long somebody who always waited has had turns by now
	typical time.Duration // how long a turn takes
	added   uint64        // how often a line came into the queue
	many    int           // so many lines are looked through for those that may be forgotten

	ended chan struct{} // once nobody gets a turn any more
}

// line is where those of one peer wait.
type line struct {
	peer    netip.Prefix
	waiters []*waiter
	due     time.Duration // when the clock has come so far it is the line's turn: it has had what it may have until then
	order   uint64        // of lines that are due together
	index   int           // in the queue; -1: it is not
}

// queue is a heap of lines, the one that is due first first.
type queue []*line

func (q queue) Len() int { return len(q) }

func (q queue) Less(i, j int) bool {
	return q[i].due < q[j].due || q[i].due == q[j].due && q[i].order < q[j].order
}

func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *queue) Push(l any) {
	l.(*line).index = len(*q)
	*q = append(*q, l.(*line))
}

func (q *queue) Pop() any {
	last := len(*q) - 1
	l := (*q)[last]
	(*q)[last], *q, l.index = nil, (*q)[:last], -1
	return l
}

type waiter struct {
	turn chan struct{} // closed when it has it
	line *line
	back bool // it has a place
	gone bool // it gave up

	counted time.Duration // see turn; valid when it has its turn
}

// turn is what a holder has, and gives back.
type turn struct {
	line    *line // whom it counts for; nil: nobody, since nobody else waited when it began
	began   time.Time
	counted time.Duration // for the line already
}

func newTurns(at, places, most int) *turns {
	return &turns{free: at, places: places, most: most, typical: 100 * time.Microsecond, lines: map[netip.Prefix]*line{}, ended: make(chan struct{})}
}

// take waits for a turn and a place, no longer than ctx. It is errCrowded when too many wait, and errStopping after end. Who has a turn gives it back, and
// who has a place leaves it.
func (t *turns) take(ctx context.Context, peer netip.Prefix) (turn, error) {
	w, err := t.enqueue(peer)
	if err != nil {
		return turn{}, err
	}
	return t.wait(ctx, w)
}

// again waits for another turn of somebody who has a place, and had a turn, before those who have none, no longer than ctx.
func (t *turns) again(ctx context.Context, had *turn) (err error) {
	*had, err = t.wait(ctx, t.comeBack(had.line))
	return err
}

// comeBack puts somebody who has a place in line. There is no waiter when it has its turn at once.
func (t *turns) comeBack(l *line) *waiter {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.free > 0 {
		t.free--
		return nil
	}
	w := &waiter{turn: make(chan struct{}), line: l, back: true}
	t.begun = append(t.begun, w)
	t.waiting++
	return w
}

// enqueue puts somebody new in line. There is no waiter when it has its turn and its place at once, or an error.
func (t *turns) enqueue(peer netip.Prefix) (*waiter, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.free > 0 && t.places > 0 { // nobody waits: see serve
		t.free--
		t.places--
		return nil, nil
	}
	l := t.lines[peer]
	if t.waiting >= t.most || l != nil && len(l.waiters) > max(t.most-t.waiting, fairShare) {
		return nil, errCrowded
	}
	if l == nil {
		l = &line{peer: peer, index: -1}
		t.lines[peer] = l
	}
	w := &waiter{turn: make(chan struct{}), line: l}
	l.waiters = append(l.waiters, w)
	t.waiting++
	if l.index < 0 {
		t.add(l)
	}
	return w, nil
}

// add puts a line into the queue. What it has not had while nobody was in it is lost, but for as much as brings it before those who go on asking: of
// these each has had at most a turn more or less than others.
func (t *turns) add(l *line) {
	t.added++
	l.due, l.order = max(l.due, t.clock-2*t.typical), t.added
	heap.Push(&t.queue, l)
}

// wait waits until w has its turn; nil has it.
func (t *turns) wait(ctx context.Context, w *waiter) (turn, error) {
	if w == nil {
		return turn{began: time.Now()}, nil
	}
	var err error
	select {
	case <-w.turn:
		return turn{w.line, time.Now(), w.counted}, nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-t.ended:
		err = errStopping
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-w.turn: // it came at the same moment: somebody else needs it
		t.free++
		if !w.back {
			t.places++
		}
		t.charge(w.line, -w.counted)
		t.serve()
	default:
		w.gone = true
		t.waiting--
	}
	return turn{}, err
}

// end sends away who waits, and who would wait. It is called once.
func (t *turns) end() { close(t.ended) }

// give gives a turn back.
func (t *turns) give(had turn) {
	took := time.Since(had.began)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free++
	t.typical += (took - t.typical) / 16
	if n := len(t.queue); n > 0 { // as if each of those who wait had had their part of it
		t.clock += took / time.Duration(n)
	}
	t.charge(had.line, took-had.counted)
	t.serve()
}

// leave gives a place back.
func (t *turns) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.places++
	t.serve()
}

// charge counts what a line, if any, has had.
func (t *turns) charge(l *line, took time.Duration) {
	if l == nil {
		return
	}
	l.due += took
	if l.index >= 0 {
		heap.Fix(&t.queue, l.index)
	}
}

// serve gives free turns to those who are next, until nobody waits who could have one. The turns are locked.
func (t *turns) serve() {
	for t.free > 0 {
		w := t.first()
		if w == nil {
			return
		}
		if w.gone {
			continue
		}
		t.free--
		if !w.back {
			t.places--
		}
		t.waiting--
		w.counted = t.typical // until it is known: there may be several at once
		t.charge(w.line, w.counted)
		close(w.turn)
	}
}

// first takes the one who is next, also one who gave up. There may be none.
func (t *turns) first() (w *waiter) {
	if len(t.begun) > 0 {
		w, t.begun = t.begun[0], t.begun[1:]
		return w
	}
	if t.places == 0 || len(t.queue) == 0 {
		return nil
	}
	l := t.queue[0]
	t.clock = max(t.clock, l.due)
	w, l.waiters = l.waiters[0], l.waiters[1:]
	if len(l.waiters) == 0 {
		heap.Pop(&t.queue)
		t.forget()
	}
	return w
}

// remembered is how many lines are remembered at least.
const remembered = 1024

// forget drops, once lines are many, those with nobody in them whose peers have had no more than others would have had; and all when nobody waits.
func (t *turns) forget() {
	if len(t.queue) > 0 && len(t.lines) < t.many {
		return
	}
	for peer, l := range t.lines {
		if l.index < 0 && (len(t.queue) == 0 || l.due <= t.clock) {
			delete(t.lines, peer)
		}
	}
	t.many = 2*len(t.lines) + remembered
}

// crowd is of how many peers somebody waits.
func (t *turns) crowd() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.queue)
}

// length is how many wait.
func (t *turns) length() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.waiting
}
