package hsm_test

import (
	"os"
	"testing"

	"kedge/hsm"
)

// TestMain lets the test program be the child that a module lives in, or one that misbehaves.
func TestMain(m *testing.M) {
	if how := os.Getenv(fakeChild); how != "" && hsm.IsChild(os.Args) {
		os.Exit(misbehave(how))
	}
	if hsm.IsChild(os.Args) {
		os.Exit(hsm.ChildMain())
	}
	os.Exit(m.Run())
}
