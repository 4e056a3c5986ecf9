package process

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Demo runs the script of 'make demo' with a kind of root. It has to show an SVID from end to end, and this besides, and to leave nothing behind.
func Demo(t testing.TB, script, root string, shows ...string) {
	t.Helper()
	program, err := filepath.Abs(Binary())
	if err != nil {
		t.Fatal(err)
	}
	temp := t.TempDir()
	command := exec.Command(script, program, root)
	command.Env = append(os.Environ(), "TMPDIR="+temp)
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, promised := range append(shows, "spiffe://cluster.local/ns/default/sa/web", ": OK\n", "the chain holds, and the holdings equal a recount", "join-token") {
		if !strings.Contains(string(out), promised) {
			t.Errorf("the demo does not show %q:\n%s", promised, out)
		}
	}
	left, err := os.ReadDir(temp)
	if err != nil || len(left) > 0 {
		t.Errorf("the demo left %v behind (%v)", left, err)
	}
}
