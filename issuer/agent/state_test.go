package agent

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"kedge/test/machine"
)

// inMemory makes a folder on a tmpfs; "": this machine has none.
func inMemory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "kedge-agent-test-")
	if err != nil {
		machine.Impossible(t, "there is no tmpfs at /dev/shm", err)
		return ""
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestKeysAreKeptInMemoryOnly(t *testing.T) {
	dir := inMemory(t)
	if dir == "" {
		return
	}
	made := filepath.Join(dir, "a", "b")
	if err := prepareState(made); err != nil {
		t.Error(err)
	}
	if info, err := os.Stat(made); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("it is made with %v (%v)", info.Mode(), err)
	}
	if err := os.Chmod(made, 0o750); err != nil {
		t.Fatal(err)
	}
	if err := prepareState(made); err == nil || !strings.Contains(err.Error(), "chmod 700 "+made) {
		t.Errorf("a folder that others may enter: %v", err)
	}
	disk := filepath.Join(t.TempDir(), "state")
	var system unix.Statfs_t
	if err := unix.Statfs(t.TempDir(), &system); err != nil || system.Type == unix.TMPFS_MAGIC {
		machine.Impossible(t, "the folder for temporary files is in memory itself", err)
		return
	}
	if err := prepareState(disk); err == nil || !strings.Contains(err.Error(), "is not in memory, and keys do not belong on a disk: name a folder on a tmpfs") {
		t.Errorf("a folder on a disk: %v", err)
	}
	if _, err := os.Stat(disk); err == nil {
		t.Error("it was made nevertheless")
	}
}

// TestARestartNeedsNoNewSVID: neither before the renewal is due nor later than that, and the token is not shown again.
func TestARestartNeedsNoNewSVID(t *testing.T) {
	dir := inMemory(t)
	if dir == "" {
		return
	}
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.o.State = dir
		b.start(t)()
		before, _ := b.materials()
		if info, err := os.Stat(b.stateFile()); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the file: %v %v", info, err)
		}
		pass(10 * time.Minute)

		again := newIdentity(b.o, b.w)
		again.ask = b.ca.ask
		if err := again.recall(); err != nil {
			t.Fatal(err)
		}
		b.identity = again
		after, _ := b.materials()
		if svid, _, _, _ := b.presentable(nil); svid != nil {
			t.Error("a consumer may have the SVID before, and the CA is shown this one")
		}
		b.hasArrived(after.SVID)
		if svid, _, _, _ := b.presentable(nil); svid != after.SVID {
			t.Error("the CA has seen the SVID, and is not shown it again")
		}
		once := newIdentity(b.o, b.w)
		if err := once.recall(); err != nil || !once.svid.arrived {
			t.Errorf("that is forgotten at the next start (%v)", err)
		}
		if after.SVID == nil || !after.SVID.Chain[0].Equal(before.SVID.Chain[0]) || after.Bundles[0].PEM != before.Bundles[0].PEM || after.Bundles[0].Sequence != before.Bundles[0].Sequence {
			t.Errorf("what is handed out after the restart is %+v", after)
		}
		b.start(t)
		pass(16 * time.Minute)
		if n := len(b.ca.asked()); n != 1 {
			t.Errorf("the CA was asked %d times", n)
		}
		pass(8 * time.Minute)
		if calls := b.ca.asked(); len(calls) != 2 || calls[1].with.token != "" || calls[1].with.certificate == nil {
			t.Errorf("when the renewal was due the CA was asked: %+v", calls[1:])
		}
	})
}

// TestAWorkloadDoesNotTakeUpTheIdentityOfAnother that had its name before: by flags every workload has the same one.
func TestAWorkloadDoesNotTakeUpTheIdentityOfAnother(t *testing.T) {
	dir := inMemory(t)
	if dir == "" {
		return
	}
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.o.State = dir
		b.start(t)()
		for _, w := range []Workload{{Name: "web", TokenFile: filepath.Join(t.TempDir(), "token")}, {Name: "web", ClientCertificate: b.w.TokenFile}} {
			other := newIdentity(b.o, w)
			if err := other.recall(); err == nil || other.handed() != nil || other.bundle != nil {
				t.Errorf("%+v goes on with %+v (%v)", w, other.handed(), err)
			}
		}
	})
}

// TestAStateFolderIsOneAgentsOnly: two would each overwrite what the other kept.
func TestAStateFolderIsOneAgentsOnly(t *testing.T) {
	dir := inMemory(t)
	if dir == "" {
		return
	}
	o := Options{State: dir, Logger: slog.New(slog.DiscardHandler)}
	one, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(o); err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second agent: %v", err)
	}
	one.Close()
	two, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	two.Close()
}

// TestWhatIsKeptIsUsedOnlyAsFarAsItGoes: of an SVID that has expired the trust bundle is left, and of another CA nothing.
func TestWhatIsKeptIsUsedOnlyAsFarAsItGoes(t *testing.T) {
	dir := inMemory(t)
	if dir == "" {
		return
	}
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.o.State = dir
		b.start(t)()
		pass(2 * time.Hour)
		again := newIdentity(b.o, b.w)
		if err := again.recall(); err != nil {
			t.Error(err)
		}
		if m, _ := again.materials(); m.SVID != nil || len(m.Bundles) != 1 {
			t.Errorf("two hours later there is %+v", m)
		}
		other := *b.o
		other.Server = "another:1"
		again = newIdentity(&other, b.w)
		if err := again.recall(); err == nil || again.handed() != nil || again.bundle != nil {
			t.Errorf("what another CA issued is used: %v", err)
		}
		for _, text := range []string{"", "{}", "nonsense", `{"key":"x","chain":"y"}`} {
			write(t, b.stateFile(), text)
			again = newIdentity(b.o, b.w)
			if err := again.recall(); err == nil || again.handed() != nil {
				t.Errorf("%q: %v", text, err)
			}
		}
	})
}
