package crash

import (
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"kedge/test/process"
)

// servesAtOnce is how long a CA may take from its start until it is ready, on a folder that a killed process left behind. It takes a
// fraction of a second; the limit tells "at once" from "after a repair" on a machine that is busy.
const servesAtOnce = 20 * time.Second

// TestKillNineUnderLoad: every certificate that a client holds is in the ledger, no serial twice, no gap in the numbers, holdings equal
// a recount, restart serves at once.
func TestKillNineUnderLoad(t *testing.T) {
	rounds := 6
	if text := os.Getenv("KEDGE_KILL_ROUNDS"); text != "" {
		var err error
		if rounds, err = strconv.Atoi(text); err != nil || rounds < 1 {
			t.Fatalf("KEDGE_KILL_ROUNDS %q is not a number from 1", text)
		}
	}
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "log: {level: warn}\n")
	l := newLoad(t, cluster)
	for round := range rounds {
		k.Start(t)
		k.Ready(t, servesAtOnce)
		if round == 1 {
			l.prove(t, k)
		}
		stop := l.start(t, k)
		l.await(t, 1+rand.Int64N(300)) // the moment at which the process ends is anywhere in its work
		k.Kill(t)
		stop()
	}
	k.Start(t)
	k.Ready(t, servesAtOnce)
	if _, err := k.Dial(t, nil).Issue(t.Context(), l.keys[0].CSR, l.tokens[0], 0); err != nil {
		t.Errorf("after the last restart: %v", err)
	}
	l.check(t, k)
	t.Logf("%d kills; %d certificates were received", rounds, len(l.leaves))
}

// TestKillNineDuringTheFirstStart ends the process at each step that makes something durable, while a data folder comes into being. The next start
// finishes what was begun: there is one root, and nothing to repair by hand.
func TestKillNineDuringTheFirstStart(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		process.Impossible(t, "strace is not installed", err)
		return
	}
	cluster := process.NewCluster(t)
	var killed int
	for step := 1; ; step++ {
		k := newCA(t, cluster, "")
		const calls = "fsync,fdatasync,rename,renameat,renameat2,link,linkat"
		k.Env = []string{"GOMAXPROCS=1"} // strace counts by thread
		k.Through = []string{strace, "--follow-forks", "--output=/dev/null", "--trace=" + calls, fmt.Sprintf("--inject=%s:signal=KILL:when=%d", calls, step)}
		k.Launch(t)
		greeted := false
		process.Eventually(t, "the end of the process, or its greeting", func() error {
			greeted = strings.Contains(k.Greeting(t), "\nNext: ")
			if greeted || k.Ended() {
				return nil
			}
			return errors.New("neither has come")
		})
		k.Kill(t)
		if !greeted {
			killed++
		}
		k.Through = nil
		k.Start(t)
		issued, err := k.Dial(t, nil).Issue(t.Context(), process.NewKey(t).CSR, cluster.Token(t, "default", "web"), 0)
		if err != nil {
			t.Fatalf("killed at step %d: %v", step, err)
		}
		k.CheckLedger(t, []*x509.Certificate{issued.Leaf})
		if out := k.Must(t, "authority", "list"); strings.Count(out, " root ") != 1 || strings.Count(out, " active ") != 2 {
			t.Errorf("killed at step %d:\n%s", step, out)
		}
		k.Stop(t)
		if greeted {
			break
		}
	}
	if killed < 5 {
		t.Errorf("the process was killed only %d times on its way: are its steps still found?", killed)
	}
	t.Logf("killed at %d steps", killed)
}
