package agent

import (
	"math/rand/v2"
	"time"
)

// backoff bounds how often something is tried that fails. It goes by the time that has passed, whatever becomes of the wall clock, and the waits differ by
// chance: agents that fail together do not come back together.
type backoff struct {
	wait time.Duration
	at   time.Time // of the next try
}

// failed puts the next try off: at first for about first, then for twice as long each time, up to longest.
func (b *backoff) failed(first, longest time.Duration) (wait time.Duration) {
	b.wait = min(max(2*b.wait, first), longest)
	wait = b.wait/2 + rand.N(b.wait/2)
	b.at = time.Now().Add(wait)
	return wait
}

// reset lets the next try be at once.
func (b *backoff) reset() { *b = backoff{} }

// left is how long the next try has to wait yet.
func (b *backoff) left() time.Duration { return max(0, time.Until(b.at)) }
