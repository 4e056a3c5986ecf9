package gate

import (
	"sync"
	"time"
)

// linesASecond is how many lines about refused callers are logged in a second.
const linesASecond = 10

// sparing lets so many lines through in each second, and counts the others.
type sparing struct {
	mu         sync.Mutex
	second     int64
	lines      int
	passedOver int
}

// tell says whether a line is to be logged now, and how many were not since the last.
func (s *sparing) tell(now time.Time) (passedOver int, tell bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if second := now.Unix(); second != s.second {
		s.second, s.lines = second, 0
	}
	if s.lines++; s.lines > linesASecond {
		s.passedOver++
		return 0, false
	}
	passedOver, s.passedOver = s.passedOver, 0
	return passedOver, true
}
