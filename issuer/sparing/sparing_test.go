package sparing

import (
	"testing"
	"time"
)

// A flood of refusals makes a bounded number of log lines, and the next line says how many there were.
func TestAFloodOfRefusalsLogsFewLines(t *testing.T) {
	var s Lines
	now, told := time.Unix(1000, 0), 0
	for range 1000 {
		if _, tell := s.Tell(now); tell {
			told++
		}
	}
	if told != linesASecond {
		t.Errorf("%d lines in one second", told)
	}
	if passedOver, tell := s.Tell(now.Add(time.Second)); !tell || passedOver != 1000-linesASecond {
		t.Errorf("the next second: %t, %d passed over", tell, passedOver)
	}
	if passedOver, tell := s.Tell(now.Add(time.Second)); !tell || passedOver != 0 {
		t.Errorf("and again: %t, %d passed over", tell, passedOver)
	}
}
