// Package sparing keeps what many can cause out of the log, but for a bounded number of lines.
package sparing

import (
	"sync"
	"time"
)

// linesASecond is how many lines are logged in a second.
const linesASecond = 10

// Lines lets so many lines through in each second, and counts the others. Its method may be called at once from several goroutines.
type Lines struct {
	mu         sync.Mutex
	second     int64
	lines      int
	passedOver int
}

// Tell says whether a line is to be logged now, and how many were not since the last.
func (s *Lines) Tell(now time.Time) (passedOver int, tell bool) {
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
