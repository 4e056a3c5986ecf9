package main

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/test/process"
)

// verb is a command that runs beside the test.
type verb struct {
	command *exec.Cmd
	log     string // file: its standard error
	ended   chan struct{}
}

// launch starts a command, with stdin (nil: none), which it then has alone. It is killed when the test ends.
func launch(t *testing.T, stdin *os.File, args ...string) *verb {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() // the process has its own
	v := &verb{command: exec.Command(process.Binary(), args...), log: log.Name(), ended: make(chan struct{})}
	v.command.Stderr = log
	if stdin != nil {
		v.command.Stdin = stdin
		defer stdin.Close()
	}
	if err := v.command.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = v.command.Wait() // the state says how it ended
		close(v.ended)
	}()
	t.Cleanup(v.kill)
	return v
}

func (v *verb) kill() {
	_ = v.command.Process.Kill() // fails when it has ended
	<-v.ended
}

func (v *verb) signal(t *testing.T, s os.Signal) {
	t.Helper()
	if err := v.command.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// awaitLog waits until the command has said something.
func (v *verb) awaitLog(t *testing.T, text string) {
	t.Helper()
	process.Eventually(t, "the command to say "+text, func() error {
		if said := process.Read(t, v.log); !strings.Contains(said, text) {
			return errors.New(said)
		}
		return nil
	})
}

// wait waits for the end of the command, which has to be with that exit code (-1 is a signal), and returns what it said.
func (v *verb) wait(t *testing.T, code int) string {
	t.Helper()
	select {
	case <-v.ended:
	case <-time.After(process.Patience):
		t.Fatalf("kedge %q did not end within %s", v.command.Args[1:], process.Patience)
	}
	said := process.Read(t, v.log)
	if got := v.command.ProcessState.ExitCode(); got != code {
		t.Fatalf("kedge %q: exit code %d, not %d: %s", v.command.Args[1:], got, code, said)
	}
	return said
}

// TestAVerbThatIsInterruptedFails interrupts each verb while the CA that it asked is silent.
func TestAVerbThatIsInterruptedFails(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"authority", "list"}, {"bundle", "show"}, {"clock", "confirm"}, {"doctor"}, {"ledger", "count"}, {"ledger", "export"}, {"ledger", "list"},
		{"ledger", "show", "1"}, {"ledger", "verify"}, {"log", "level", "info"}, {"svid", "fetch", "--renew", "--out", "nowhere"}, {"svid", "revoke", "01"},
		{"token", "create", "--identity", "ns/default/sa/web"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			t.Parallel()
			dir, err := os.MkdirTemp("", "kedge-") // the path of a socket is short
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			silent, err := net.Listen("unix", filepath.Join(dir, "admin.sock"))
			if err != nil {
				t.Fatal(err)
			}
			defer silent.Close()
			v := launch(t, nil, append(args, "--data", dir)...)
			asked, err := silent.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer asked.Close()
			if _, err := asked.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			v.signal(t, syscall.SIGINT)
			if said := v.wait(t, 1); !strings.HasPrefix(said, "kedge: ") || !strings.Contains(said, "interrupt signal received") {
				t.Errorf("it says %s", said)
			}
		})
	}
}
