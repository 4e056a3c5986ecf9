package hsm_test

import (
	"os"
	"testing"

	"kedge/hsm"
)

// TestMain lets the test program be the child that a module lives in, or one that misbehaves.
func TestMain(m *testing.M) {
	if how := os.Getenv(fakeChild); how != "" && hsm.IsChild(os.Args) && !inside(how) {
		os.Exit(misbehave(how))
	}
	if hsm.IsChild(os.Args) {
		os.Exit(hsm.ChildMain())
	}
	os.Setenv("GORACE", "atexit_sleep_ms=0") // for the children: under the race detector each would take a second to end
	os.Exit(m.Run())
}
