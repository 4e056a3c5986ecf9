package machine

import (
	"errors"
	"fmt"
	"testing"
)

// told is a test that ends nowhere, and keeps what it was told.
type told struct {
	testing.TB
	failed, logged string
}

func (t *told) Helper()                           {}
func (t *told) Fatalf(format string, args ...any) { t.failed = fmt.Sprintf(format, args...) }
func (t *told) Logf(format string, args ...any)   { t.logged = fmt.Sprintf(format, args...) }

func TestWhatAMachineCannotRunFailsWhereverCIIsSet(t *testing.T) {
	for value, fails := range map[string]bool{"": false, "true": true, "1": true, "woodpecker": true} {
		t.Setenv("CI", value)
		var test told
		Impossible(&test, "strace is not installed", errors.New("not found"))
		if (test.failed != "") != fails || test.failed+test.logged == "" {
			t.Errorf("CI=%q: it fails with %q, and logs %q", value, test.failed, test.logged)
		}
	}
}
