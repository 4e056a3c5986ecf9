package gate

import (
	"container/heap"
	"container/list"
	"context"
	"errors"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// errCrowded says that a queue is so long that waiting in it makes no sense.
var errCrowded = errors.New("too many are waiting already")

var errStopping = errors.New("the CA is stopping")

const (
	// firstTypical is how long a turn takes, until it is known.
	firstTypical = 100 * time.Microsecond
	// longestTurn is as much of a turn as counts. One that takes longer is not dear: the machine stood still.
	longestTurn = 20 * time.Millisecond
	// outlier is how many times as long as others a turn counts at most. The dearest that a caller can cause takes some ten times as long as a good call.
	outlier = 8
	// dear is how long no turn takes of somebody who means well: to check a good call with a token takes a tenth of that.
	dear = 500 * time.Microsecond
)

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
	free    int // turns that nobody has
	places  int // that nobody has
	waiting int
	most    int       // who may wait
	begun   list.List // of *waiter who come back
	lines   map[netip.Prefix]*line
	queue   queue         // the lines with somebody in them
	ahead   queue         // the others that are remembered: their peers have had more than if all had had their part at every moment
	clock   time.Duration // how long somebody who always waited has had turns by now
	typical time.Duration // how long a turn takes
	way     *lookout      // which some turns take; nil: none
	added   uint64        // how often a line came into the queue

	ended chan struct{} // once nobody gets a turn any more
}

// line is where those of one peer wait.
type line struct {
	peer    netip.Prefix
	waiters list.List     // of *waiter
	due     time.Duration // when the clock has come so far it is the line's turn: it has had what it may have until then
	early   time.Duration // so much before that it may have its next one, because it did not ask for a while
	order   uint64        // of lines that are due together
	index   int           // in turns.queue if somebody waits, otherwise in turns.ahead; -1: the line is forgotten
}

// queue is a heap of lines, the one that is due first first.
type queue []*line

func (q queue) Len() int { return len(q) }

func (q queue) Less(i, j int) bool {
	a, b := q[i].due-q[i].early, q[j].due-q[j].early
	return a < b || a == b && q[i].order < q[j].order
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
	back bool          // it has a place
	in   *list.Element // of the line, or of turns.begun

	counted time.Duration // see turn; valid when it has its turn
}

// turn is what a holder has, and gives back.
type turn struct {
	line    *line // whom it counts for; nil: nobody, since nobody else waited when it began
	began   time.Time
	cpu     time.Duration // of its thread when it began; 0: not looked at
	counted time.Duration // for the line already
}

// took is how long the turn lasted, no longer than longestTurn. While its thread did not run somebody else had the time.
func (t turn) took() time.Duration {
	took := min(time.Since(t.began), longestTurn)
	if t.cpu == 0 {
		return took
	}
	if cpu := threadTime() - t.cpu; cpu >= 0 && cpu < took { // otherwise it began on another thread
		return cpu
	}
	return took
}

// threadTime is how much CPU time this thread has had; 0: nobody knows.
func threadTime() time.Duration {
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &now) != nil {
		return 0
	}
	return time.Duration(now.Nano())
}

func newTurns(at, places, most int) *turns {
	return &turns{free: at, places: places, most: most, typical: firstTypical, lines: map[netip.Prefix]*line{}, ended: make(chan struct{})}
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
	w.in = t.begun.PushBack(w)
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
	if t.waiting >= t.most || l != nil && l.waiters.Len() > max(t.most-t.waiting, fairShare) {
		return nil, errCrowded
	}
	if l == nil {
		l = &line{peer: peer, index: -1}
		t.lines[peer] = l
	}
	if l.waiters.Len() == 0 {
		t.add(l)
	}
	w := &waiter{turn: make(chan struct{}), line: l}
	w.in = l.waiters.PushBack(w)
	t.waiting++
	return w, nil
}

// add puts a line into the queue. What it has not had while nobody was in it is lost, but that its first turn comes before those of lines that go on asking: of these
// each has had at most a turn more or less than others.
func (t *turns) add(l *line) {
	if l.index >= 0 {
		heap.Remove(&t.ahead, l.index)
	}
	t.added++
	l.early, l.order = min(max(t.clock-l.due, 0), t.credit()), t.added
	l.due = max(l.due, t.clock)
	heap.Push(&t.queue, l)
}

func (t *turns) credit() time.Duration { return 2 * t.typical }

// wait waits until w has its turn; nil has it.
func (t *turns) wait(ctx context.Context, w *waiter) (turn, error) {
	if w == nil {
		return turn{began: time.Now()}, nil
	}
	var err error
	select {
	case <-w.turn:
		// Go runs who was woken by the one before at once, and one after the other so that whoever has come over the network meanwhile waits for tens of
		// milliseconds. From the end of its queue this goroutine lets them go first.
		runtime.Gosched()
		return turn{w.line, time.Now(), threadTime(), w.counted}, nil
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
		t.drop(w)
	}
	return turn{}, err
}

// end sends away who waits, and who would wait. It is called once.
func (t *turns) end() { close(t.ended) }

// give gives a turn back. look is whether the network should be looked at before the next: that costs as much as a good call.
func (t *turns) give(had turn, look bool) {
	took := had.took()
	t.spent(had, took, look || took >= dear)
}

// spent gives a turn back that took so long. Of one that was interrupted it is not known how much others had meanwhile, and a peer that paid for all of it would wait for as long
// as all others together need for as much.
func (t *turns) spent(had turn, took time.Duration, look bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	took = min(took, outlier*t.typical)
	if !look || t.waiting == 0 || !t.way.send(had.began.Add(took)) {
		t.free++
	}
	t.typical += (took - t.typical) / 16
	t.charge(had.line, took-had.counted)
	t.pass(took)
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
	switch {
	case l.index < 0:
	case l.waiters.Len() > 0:
		heap.Fix(&t.queue, l.index)
	default:
		heap.Fix(&t.ahead, l.index)
	}
}

// pass lets the clock go on at half the pace of those who wait, so that ever new peers, who begin at the clock, do not make it stand still. When there are none the clock goes
// with whose turn it is: see first. Were it ahead of all who always wait, as it was at their full pace after a few dear turns, somebody new would be behind all of them.
func (t *turns) pass(took time.Duration) {
	if n := len(t.queue); n > 0 {
		t.clock += took / time.Duration(2*n)
	}
	for len(t.ahead) > 0 && t.ahead[0].due <= t.clock-t.credit() { // it would begin anew all the same
		delete(t.lines, heap.Pop(&t.ahead).(*line).peer)
	}
}

// serve gives free turns to those who are next, until nobody waits who could have one. The turns are locked.
func (t *turns) serve() {
	for t.free > 0 {
		w := t.first()
		if w == nil {
			return
		}
		if !w.back {
			t.places--
			w.line.early = 0
		}
		t.drop(w)
		t.free--
		w.counted = t.typical // until it is known: there may be several at once
		t.charge(w.line, w.counted)
		close(w.turn)
	}
}

// first is the one who is next. There may be none.
func (t *turns) first() *waiter {
	if next := t.begun.Front(); next != nil {
		return next.Value.(*waiter)
	}
	if t.places == 0 || len(t.queue) == 0 {
		return nil
	}
	l := t.queue[0]
	t.clock = max(t.clock, l.due)
	return l.waiters.Front().Value.(*waiter)
}

// drop takes somebody out of its line, who waits no longer. When nobody waits any more what the peers have had is forgotten.
func (t *turns) drop(w *waiter) {
	t.waiting--
	if w.back {
		t.begun.Remove(w.in)
		return
	}
	l := w.line
	if l.waiters.Remove(w.in); l.waiters.Len() > 0 {
		return
	}
	heap.Remove(&t.queue, l.index)
	l.due, l.early = l.due-l.early, 0
	heap.Push(&t.ahead, l)
	if len(t.queue) > 0 {
		return
	}
	for _, l := range t.ahead {
		l.index = -1
	}
	t.ahead, t.lines = nil, map[netip.Prefix]*line{} // a new one: there may have been very many
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
