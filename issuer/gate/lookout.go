package gate

import (
	"fmt"
	"os"
	"time"
)

// glance is how often the network is looked at, at least, while turns follow on one another.
const glance = time.Millisecond

// lookout is a way for a turn from the one who gives it back to the one who is next, by which the network is looked at. Go's scheduler does that when a processor has nothing
// else to do, or every 10 ms: as long as somebody waits for each turn there is always something to do, and a call that comes takes 10 ms to be seen, a new connection with its
// three words 30. Somebody who reads from a pipe goes on only when the scheduler has looked, with all who have come meanwhile.
type lookout struct {
	in, out *os.File

	// Of the lock of the turns.
	last  time.Time // that a turn went this way
	under bool      // one is on its way
}

// look opens the way, until closed is.
func (t *turns) look(closed <-chan struct{}) error {
	in, out, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("opening a pipe: %w", err)
	}
	way := &lookout{in: in, out: out}
	t.mu.Lock()
	t.way = way
	t.mu.Unlock()
	go func() {
		<-closed
		_ = out.Close() // which ends the reading
	}()
	go func() {
		defer in.Close()
		for one := make([]byte, 1); ; {
			if _, err := in.Read(one); err != nil {
				return
			}
			t.mu.Lock()
			way.under = false
			t.free++
			t.serve()
			t.mu.Unlock()
		}
	}()
	return nil
}

// send sends a turn on its way, if it is time for that.
func (l *lookout) send(now time.Time) bool {
	if l == nil || l.under || now.Sub(l.last) < glance {
		return false
	}
	_, err := l.out.Write([]byte{0}) // it fails after the end, when it matters to nobody any more
	l.under, l.last = err == nil, now
	return l.under
}
