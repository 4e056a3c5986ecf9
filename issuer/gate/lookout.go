package gate

import (
	"os"
	"time"
)

// glance is how often the network is looked at, at least, while turns follow on one another.
const glance = time.Millisecond

// lookout is a way for a turn from the one who gives it back to the one who is next, by which the network is looked at. Go's scheduler does that when a processor has nothing
// else to do, or every 10 ms: as long as somebody waits for each turn there is always something to do, and a call that comes takes 10 ms to be seen, a new connection with its
// three words 30. Somebody who reads from a pipe goes on only when the scheduler has looked, with all who have come meanwhile.
//
// It is of the turns' lock, and the pipe is opened when it is needed first.
type lookout struct {
	turns  *turns
	closed <-chan struct{} // ends it
	out    *os.File        // of the pipe; nil: there is none yet
	last   time.Time       // that a turn went this way
	under  bool            // one is on its way
}

// send sends a turn on its way, if it is time for that, and possible: without a descriptor for a pipe others are seen late.
func (l *lookout) send(now time.Time) bool {
	if l == nil || l.under || now.Sub(l.last) < glance || l.out == nil && !l.open() {
		return false
	}
	_, err := l.out.Write([]byte{0}) // it fails after the end, when it matters to nobody any more
	l.under, l.last = err == nil, now
	return l.under
}

func (l *lookout) open() bool {
	in, out, err := os.Pipe()
	if err != nil {
		return false
	}
	l.out = out
	go func() {
		<-l.closed
		_ = out.Close() // which ends the reading
	}()
	go l.receive(in)
	return true
}

// receive takes turns from the pipe to those who are next.
func (l *lookout) receive(in *os.File) {
	defer in.Close()
	for one := make([]byte, 1); ; {
		if _, err := in.Read(one); err != nil {
			return
		}
		l.turns.mu.Lock()
		l.under = false
		l.turns.free++
		l.turns.serve()
		l.turns.mu.Unlock()
	}
}
