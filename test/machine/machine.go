// Package machine says what becomes of a test that this machine cannot run. It imports nothing of Kedge, so that every test can ask it.
package machine

import (
	"os"
	"testing"
)

// Impossible fails a test that this machine cannot run, when that is CI: there nothing goes untested. Elsewhere it says so in the
// test's log, and the test returns.
func Impossible(t testing.TB, why string, err error) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("%s: %v", why, err)
	}
	t.Logf("NOT TESTED on this machine: %s: %v", why, err)
}
