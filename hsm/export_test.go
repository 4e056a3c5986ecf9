package hsm

import (
	"log/slog"
	"time"
)

// ChildPID is the process that the module lives in now; 0: there is none.
func (t *Token) ChildPID() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.current == nil {
		return 0
	}
	return t.current.process.Process.Pid
}

// Protocol is what both sides must speak.
const Protocol = protocol

// Look is what a token that nobody asks is asked now and then.
func (t *Token) Look() { t.look() }

// Pauses lets children end that lasted so long each, and tells how long the one after each waits at least, and how long the pause of the next will be.
func Pauses(lasted []time.Duration) (waits, pauses []time.Duration) {
	t := &Token{log: slog.New(slog.DiscardHandler)}
	for _, d := range lasted {
		now := time.Now()
		t.lost(&generation{began: now.Add(-d)}, errDied)
		waits, pauses = append(waits, t.due.Sub(now)), append(pauses, t.pause)
	}
	return waits, pauses
}

// Kinds of frames.
const (
	KindSign     = byte(kindSign)
	KindGenerate = byte(kindGenerate)
	KindDelete   = byte(kindDelete)
	KindDone     = byte(kindDone)
)
