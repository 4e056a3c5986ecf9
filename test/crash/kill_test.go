package crash

import (
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/test/process"
)

// servesAtOnce is how long a CA may take from its start until it is ready, on a folder that a killed process left behind. It takes a
// fraction of a second; the limit tells "at once" from "after a repair" on a machine that is busy.
const servesAtOnce = 20 * time.Second

// kills is how often TestKillNineUnderLoad kills a CA: KEDGE_KILLS, or else a few times.
func kills(t *testing.T) int {
	t.Helper()
	text := os.Getenv("KEDGE_KILLS")
	if text == "" {
		return len(moments)
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("KEDGE_KILLS %q is not a number from 1", text)
	}
	return n
}

// moments are in what a CA is killed, in turn; when exactly is random. There is something to archive and to prune only in the first lives on a data folder.
var moments = []string{"pruning", "pruning", "start", "load", "renewal", "load", "start", "load", "load", "load"}

// killsPerFolder is after how many kills a new data folder begins, so that pruning comes again, and the whole ledger can be checked now and then.
const killsPerFolder = 50

// TestKillNineUnderLoad kills a CA of short lives at random moments: while it issues, starts, renews its issuing CA, archives and prunes. After each
// kill every certificate that a client holds is in the ledger, no serial is there twice, there is no gap in the numbers, and the CA serves at once. Now
// and then the whole ledger is verified: holdings equal a recount.
func TestKillNineUnderLoad(t *testing.T) {
	seed, left := rand.Uint64(), kills(t)
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for left > 0 && !t.Failed() {
		n := min(left, killsPerFolder)
		left -= n
		t.Run("", func(t *testing.T) { killFolder(t, random, n) })
	}
}

func killFolder(t *testing.T, random *rand.Rand, n int) {
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	archive := filepath.Join(k.Dir, "archive")
	process.Write(t, k.Config, cluster.Configuration(t, k.Dir)+fmt.Sprintf(`
csr: {listen: "127.0.0.1:0", serverCertificateTTL: 10s}
operations: {listen: "127.0.0.1:0"}
issuingCA: {lifetime: 30s}
profiles: {default: {defaultTTL: 10s, maxTTL: 10s, minTTL: 1s, backdate: 0s}}
ledger: {retention: 1h, archiveDir: %q}
log: {level: warn}
`, archive))
	if err := os.Mkdir(archive, 0o700); err != nil {
		t.Fatal(err)
	}
	book := &process.Book{First: newPast(t, k.Data, 20000)}
	l, old := newLoad(t, cluster), book.First
	soon := func(most time.Duration) <-chan time.Time {
		return time.After(time.Duration(random.Int64N(int64(most))))
	}
	moment, startTook := "", time.Second
	start := func() { // it serves at once
		began := time.Now()
		k.Start(t)
		startTook = time.Since(began)
		issued, err := k.Dial(t, nil).Issue(t.Context(), l.keys[0].CSR, l.tokens[0], 0)
		if err != nil {
			t.Fatalf("after a kill in %s, the first call: %v", moment, err)
		}
		l.leaves = append(l.leaves, issued.Leaf)
	}
	check := func() { // nothing is lost
		k.Ready(t, servesAtOnce)
		k.Follow(t, book, l.take(t))
		if t.Failed() {
			t.Fatalf("that was after a kill in %s", moment)
		}
	}
	for round := range n {
		next := moments[round%len(moments)]
		if next == "pruning" && round >= len(moments) {
			next = "load"
		}
		switch next {
		case "start":
			k.Launch(t)
			<-soon(startTook)
		case "pruning":
			begun := news(t, archive)
			start()
			if round == 0 { // what the first begins the second may find finished
				begun()
			}
			<-soon(200 * time.Millisecond)
		default:
			start()
			check()
			begun := news(t, filepath.Join(k.Data, "keys"))
			l.prove(t, k)
			stop := l.start(t, k)
			if next == "renewal" {
				begun()
				<-soon(30 * time.Millisecond)
			} else {
				l.await(t, 1+random.Int64N(300))
			}
			k.Kill(t)
			stop()
		}
		k.Kill(t)
		moment = next
	}
	start()
	check()
	process.Eventually(t, "the past to be pruned", func() error { // the kills held that up
		if out := k.Must(t, "ledger", "count", "--to", strconv.FormatUint(old, 10)); out != "0\n" {
			return errors.New(out)
		}
		return nil
	})
	report := k.Verify(t)
	archived, err := readArchives(archive)
	if err != nil || archived < report.FirstNumber-1 || report.FirstNumber != old+1 {
		t.Errorf("the ledger begins with event %d, and the archives end with %d (%v)", report.FirstNumber, archived, err)
	}
	if out := k.Must(t, "authority", "list"); strings.Count(out, " active ") != 2 {
		t.Errorf("authority list:\n%s", out)
	}
	for _, dir := range []string{k.Data, filepath.Join(k.Data, "keys"), filepath.Join(k.Data, "root"), filepath.Join(k.Data, "join-token-keys"), archive} {
		for _, pattern := range []string{".*", "*.new"} {
			if left, err := filepath.Glob(filepath.Join(dir, pattern)); err != nil || len(left) > 0 {
				t.Errorf("killed processes left %q behind (%v)", left, err)
			}
		}
	}
	k.Stop(t)
}

// news watches a folder. The function that it returns waits until a file comes into being there.
func news(t *testing.T, dir string) (await func()) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err == nil {
		_, err = unix.InotifyAddWatch(fd, dir, unix.IN_CREATE)
	}
	if err != nil {
		t.Fatalf("watching %s: %v", dir, err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	t.Cleanup(func() { _ = events.Close() })
	return func() {
		err := events.SetReadDeadline(time.Now().Add(process.Patience))
		if err == nil {
			_, err = events.Read(make([]byte, 4096))
		}
		if err != nil {
			t.Fatalf("waiting for a new file in %s: %v", dir, err)
		}
	}
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
