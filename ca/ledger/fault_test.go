package ledger

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/test/machine"
)

// childEnv names what the test binary is to do as a child of a test.
const childEnv = "KEDGE_LEDGER_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "append":
		childAppends(os.Args[1])
	case "faults":
		childSurvivesFaults(os.Args[1])
	default:
		os.Exit(m.Run())
	}
}

func TestAFullDiskIsRefusedCleanlyAndHealsByItself(t *testing.T) {
	t.Parallel()
	dir, ok := machine.SmallDisk(t, "size=40m")
	if !ok {
		return
	}
	log := newAwaitLog(healed)
	h := newHouseIn(t, dir, func(o *Options) { o.Logger = slog.New(log) })
	token := &Token{ID: "t", SPIFFEID: "spiffe://cluster.local/vm", Expires: h.clock.at() + 3600, By: "uid=0"}
	h.must(token)

	ballast := machine.FillDisk(t, dir)
	recorded := uint64(4)
	for {
		before := h.Head()
		n, err := h.Append(context.Background(), h.issue())
		if err == nil {
			if recorded++; n != recorded {
				t.Fatalf("event %d after %d", n, recorded-1)
			}
			continue
		}
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "the disk is full") {
			t.Fatalf("the error is %v", err)
		}
		if h.Head() != before {
			t.Error("a refused append moved the head")
		}
		break
	}
	// Everything that reads goes on; nothing is taken.
	if err := h.Fault(); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "free some space") {
		t.Errorf("Fault: %v", err)
	}
	if err := h.Probe(context.Background()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("Probe: %v", err)
	}
	if _, err := h.Event(context.Background(), recorded); err != nil {
		t.Error(err)
	}
	if err := h.Redeemable("t"); err != nil {
		t.Error(err)
	}
	if _, err := h.Holdings(); err != nil {
		t.Error(err)
	}
	if count, err := h.Count(context.Background(), Filter{}); count != recorded || err != nil {
		t.Errorf("%d events, want %d, %v", count, recorded, err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	<-log.seen
	if err := h.Fault(); err != nil {
		t.Errorf("Fault after it healed: %v", err)
	}
	if n := h.must(h.issue()); n != recorded+1 {
		t.Errorf("the first event after the fault is %d, want %d", n, recorded+1)
	}
	h.clean()
	h.reopen()
	h.clean()
}

// A little room would let small commits through and refuse the next large one, back and forth: a full disk counts as full until a large one fits.
func TestALittleRoomDoesNotHealAFullDisk(t *testing.T) {
	t.Parallel()
	dir, ok := machine.SmallDisk(t, "size=40m")
	if !ok {
		return
	}
	ballast := machine.FillDisk(t, dir)
	info, err := os.Stat(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for _, left := range []int64{0, 4096, healRoom - 1<<20} {
		if err := os.Truncate(ballast, info.Size()-left); err != nil {
			t.Fatal(err)
		}
		if err := room(dir, healRoom); !isFull(err) {
			t.Errorf("with %d octets of room: %v", left, err)
		}
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := room(dir, healRoom); err != nil {
		t.Errorf("with room: %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("looking left %v behind (%v)", entries, err)
	}
}

// A disk that hangs holds up nobody beyond the time that they have.
func TestACommitThatHangsHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	release, held := make(chan struct{}), make(chan struct{})
	h := newHouse(t)
	hang := &draft{done: make(chan struct{}), step: func(*batch) error {
		close(held)
		<-release
		return nil
	}}
	hung := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { hung <- h.submit(ctx, hang) }()
	<-held
	waiting, stop := context.WithCancel(context.Background())
	stopped := make(chan error, 1)
	go func() {
		_, err := h.Append(waiting, h.issue())
		stopped <- err
	}()
	stop()
	if err := <-stopped; !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnavailable) {
		t.Errorf("what waited behind it: %v", err)
	}
	cancel()
	if err := <-hung; !errors.Is(err, context.Canceled) || !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "may turn out to be recorded") {
		t.Errorf("what was in it: %v", err)
	}
	close(release)
	<-hang.done
	h.must(h.issue())
	h.clean()
}

// When what comes back from the disk is sound in itself, and older than what was acknowledged, nothing is built on it.
func TestALedgerThatLostEventsStaysFaulted(t *testing.T) {
	t.Parallel()
	dir, ok := machine.SmallDisk(t, "size=40m")
	if !ok {
		return
	}
	log := newAwaitLog("the ledger stays faulted")
	h := newHouseIn(t, dir, func(o *Options) { o.Logger = slog.New(log) })
	path, older := filepath.Join(dir, storeFile), filepath.Join(dir, "older")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(older, text, 0o600); err != nil {
		t.Fatal(err)
	}
	h.must(h.issue())
	ballast := machine.FillDisk(t, dir)
	for {
		if _, err := h.Append(context.Background(), h.issue()); errors.Is(err, ErrUnavailable) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Rename(older, path), os.Remove(ballast)); err != nil {
		t.Fatal(err)
	}
	<-log.seen
	if err := h.Fault(); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "which were durable once, are lost") {
		t.Errorf("Fault: %v", err)
	}
	if _, err := h.Append(context.Background(), h.issue()); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "backup") {
		t.Errorf("Append: %v", err)
	}
}

func TestCloseEndsAFaultedLedger(t *testing.T) {
	t.Parallel()
	dir, ok := machine.SmallDisk(t, "size=256k")
	if !ok {
		return
	}
	h := newHouseIn(t, dir)
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for {
				_, err := h.Append(context.Background(), h.issue(), h.issue(), h.issue(), h.issue(), h.issue())
				if errors.Is(err, ErrUnavailable) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	head := h.Head()
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	if _, err := h.Append(context.Background(), h.issue()); !errors.Is(err, ErrClosed) {
		t.Errorf("Append after Close: %v", err)
	}
	h.open()
	if h.Head() != head {
		t.Errorf("the head was %d, and is %d", head.Number, h.Head().Number)
	}
	h.clean()
}

// child starts the test binary anew. Its standard output comes line by line.
func child(t *testing.T, what, dir string, wrap ...string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args := append(wrap, self, dir)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), childEnv+"="+what)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewScanner(out)
}

// childHouse is a house without a test around it.
func childHouse(dir string, logger slog.Handler) *house {
	h := &house{dir: dir, clock: newClock(), ca: founding("issuing", RoleIssuing, StateActive)}
	h.chain = ChainHash(h.ca.Record.Chain)
	o := Options{TrustDomain: domain, Now: h.clock.Now}
	if logger != nil {
		o.Logger = slog.New(logger)
	}
	l, err := Open(dir, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(1)
	}
	h.Ledger = l
	return h
}

// childAppends appends for ever from many goroutines, and prints the numbers and serials that were acknowledged.
func childAppends(dir string) {
	h := childHouse(dir, nil)
	serials.Store(h.Head().Number * 1000)
	var out sync.Mutex
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for {
				issue := h.issue()
				n, err := h.Append(context.Background(), issue)
				if err != nil {
					fmt.Fprintln(os.Stderr, "child:", err)
					os.Exit(1)
				}
				out.Lock()
				fmt.Println(n, issue.Serial)
				out.Unlock()
			}
		})
	}
	group.Wait()
}

func TestWhatWasAcknowledgedSurvivesKill9(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	acknowledged := map[uint64]string{}
	for round := range 5 {
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		cmd, out := child(t, "append", h.dir)
		for range 10 + 37*round {
			if !out.Scan() {
				t.Fatalf("the child ended: %v", out.Err())
			}
			note(t, acknowledged, out.Text())
		}
		if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for out.Scan() { // what it had said before it died
			note(t, acknowledged, out.Text())
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("the child ended with %v", err)
		}
		h.open()
		for n, serial := range acknowledged {
			e, err := h.Event(context.Background(), n)
			if err != nil || e.Body.(*Issue).Serial.String() != serial {
				t.Errorf("round %d: event %d with the serial %s was acknowledged; there is %+v, %v", round, n, serial, e.Body, err)
			}
		}
		h.clean()
	}
}

// note takes a line down, if the child lived to write all of it.
func note(t *testing.T, acknowledged map[uint64]string, line string) {
	t.Helper()
	var n uint64
	var serial string
	if _, err := fmt.Sscan(line, &n, &serial); err != nil || len(serial) != 40 {
		return
	}
	if _, twice := acknowledged[n]; twice {
		t.Errorf("number %d was given twice", n)
	}
	acknowledged[n] = serial
}

// childSurvivesFaults appends while strace lets some fdatasync fail, until something was refused and more was acknowledged
// since. It prints both, and goes on after each fault once the ledger healed. (strace counts the calls of each thread, and the
// goroutine that writes may change threads: which call fails, and how many, is not the same every time.)
func childSurvivesFaults(dir string) {
	log := newAwaitLog(healed)
	h := childHouse(dir, log)
	for acknowledged, refused := 0, 0; acknowledged < 10 || refused == 0; {
		revoke := &Revoke{Serial: h.issue().Serial, NotAfter: h.clock.at() + 3600, By: "test"}
		n, err := h.Append(context.Background(), revoke)
		switch {
		case err == nil:
			acknowledged++
			fmt.Println("acknowledged", n, revoke.Serial)
		case errors.Is(err, ErrUnavailable) && errors.Is(err, syscall.EIO):
			refused++
			fmt.Println("refused", 0, revoke.Serial)
			if _, err := h.Event(context.Background(), 1); err != nil {
				fmt.Println("unreadable", 0, err)
			}
			select {
			case <-log.seen:
			case <-time.After(time.Minute):
				fmt.Println("faulted", 0, h.Fault())
				os.Exit(1)
			}
			// Memory follows the disk.
			count, countErr := h.Count(context.Background(), Filter{Types: []Type{TypeRevoke}, Serial: revoke.Serial})
			revoked, _ := h.Revoked(revoke.Serial)
			if countErr != nil || revoked != (count == 1) {
				fmt.Println("inconsistent", 0, countErr)
			}
		default:
			fmt.Println("unexpected", 0, err)
		}
	}
	report, err := h.Verify(context.Background())
	if err = errors.Join(err, h.Close()); err != nil || len(report.Problems) > 0 {
		fmt.Println("unsound", 0, err, report.Problems)
	}
}

func TestAFailedFsyncIsNeverTakenForDurable(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		machine.Impossible(t, "strace is not installed", err)
		return
	}
	for _, when := range []string{"5", "6", "7..8"} { // odd: of the data pages, even: of the meta page; several: while it heals, too
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			if err := h.Close(); err != nil {
				t.Fatal(err)
			}
			cmd, out := child(t, "faults", h.dir, strace, "-f", "-qq", "-o", filepath.Join(t.TempDir(), "trace"),
				"-e", "trace=fdatasync", "-e", "signal=none", "-e", "inject=fdatasync:error=EIO:when="+when)
			acknowledged := map[uint64]string{}
			refused := 0
			for out.Scan() {
				var what, rest string
				var n uint64
				if _, err := fmt.Sscan(out.Text(), &what, &n, &rest); err != nil {
					t.Fatalf("%q: %v", out.Text(), err)
				}
				switch what {
				case "acknowledged":
					acknowledged[n] = rest
				case "refused":
					refused++
				default:
					t.Error(out.Text())
				}
			}
			if err := cmd.Wait(); err != nil {
				t.Fatal(err)
			}
			if refused == 0 || len(acknowledged) < 10 {
				t.Errorf("%d appends were refused, and %d acknowledged", refused, len(acknowledged))
			}
			h.open()
			for n, serial := range acknowledged {
				e, err := h.Event(context.Background(), n)
				if err != nil || e.Body.(*Revoke).Serial.String() != serial {
					t.Errorf("event %d with the serial %s was acknowledged; there is %+v, %v", n, serial, e.Body, err)
				}
			}
			h.clean()
		})
	}
}
