// Package process runs the real kedge program for tests: in a folder of its own, on free ports, with everything that its command line, its
// CSR API and its health page say. Nothing of the program is linked into the test but the forms of its answers.
//
//	func TestMain(m *testing.M) { os.Exit(process.Main(m)) }
//
//	k := process.New(t, "")
//	k.Start(t)
//	token := k.Must(t, "token", "create", "--identity", "ns/default/sa/web")
package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/issuer/admin"
	"kedge/test/machine"
)

// Patience is how long something may take that should happen soon. It is long because machines are slow and busy, and costs
// nothing as long as all is well.
const Patience = 60 * time.Second

// binary is the environment variable that names the program.
const binary = "KEDGE_BIN"

// Main runs a package's tests with the program that KEDGE_BIN names, or with one that it builds and removes again.
func Main(m *testing.M) int {
	if os.Getenv(binary) != "" {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "kedge-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "making a folder for the program under test:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "kedge")
	if out, err := exec.Command("go", "build", "-o", path, "kedge/cmd/kedge").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building the program under test: %v\n%s", err, out)
		return 1
	}
	if err := os.Setenv(binary, path); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// Binary is the path of the program under test.
func Binary() string { return os.Getenv(binary) }

// Eventually tries until there is no error, and fails the test with the last one.
func Eventually(t testing.TB, what string, try func() error) {
	t.Helper()
	if err := Poll(Patience, try); err != nil {
		t.Fatalf("waited in vain for %s: %v", what, err)
	}
}

// Poll tries until there is no error, or returns the last one after limit.
func Poll(limit time.Duration, try func() error) error {
	deadline, tick := time.After(limit), time.NewTicker(10*time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-deadline:
			return fmt.Errorf("after %s: %w", limit, err)
		case <-tick.C:
		}
	}
}

// Impossible is machine.Impossible.
func Impossible(t testing.TB, why string, err error) {
	t.Helper()
	machine.Impossible(t, why, err)
}

// Ports is a configuration that takes any free ports.
const Ports = `
csr: {listen: "127.0.0.1:0"}
operations: {listen: "127.0.0.1:0"}
`

// Kedge is a CA under test: a folder with a configuration, and the process while it runs.
type Kedge struct {
	Dir     string   // the configuration's folder
	Config  string   // the configuration's file
	Data    string   // the data folder
	Env     []string // added to the environment of serve
	Through []string // a command that serve is run by, such as strace and its flags

	command *exec.Cmd
	started int           // processes
	log     string        // of the process: its standard error
	ended   chan struct{} // closed when it has
	socket  string
	admin   *admin.Client // of the socket
}

// New makes a CA's folder. The configuration is yaml, or Ports when that is "". The process is killed when the test ends.
func New(t testing.TB, yaml string) *Kedge {
	t.Helper()
	dir := t.TempDir()
	if yaml == "" {
		yaml = Ports
	}
	k := &Kedge{Dir: dir, Config: filepath.Join(dir, "kedge.yaml"), Data: filepath.Join(dir, "kedge-data")}
	Write(t, k.Config, yaml)
	t.Cleanup(func() {
		k.kill()
		if t.Failed() {
			t.Logf("the log of the last process:\n%s", k.Log())
		}
	})
	return k
}

// Write writes a file of mode 0600.
func Write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Launch starts 'kedge serve' and waits for nothing.
func (k *Kedge) Launch(t testing.TB) {
	t.Helper()
	k.started++
	k.log = filepath.Join(k.Dir, fmt.Sprintf("log-%d.json", k.started))
	log, err := os.OpenFile(k.log, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() // the process has its own
	greeting, err := os.OpenFile(k.greetingFile(), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer greeting.Close()
	args := append(append([]string{}, k.Through...), Binary(), "serve", "--config", k.Config)
	command := exec.Command(args[0], args[1:]...)
	command.Dir, command.Env, command.Stdout, command.Stderr = k.Dir, append(os.Environ(), k.Env...), greeting, log
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // what runs it ends with it
	if err := command.Start(); err != nil {
		t.Fatalf("starting %s: %v", args, err)
	}
	ended := make(chan struct{})
	k.command, k.ended = command, ended
	go func() {
		_ = command.Wait() // the state says how it ended
		close(ended)
	}()
}

func (k *Kedge) greetingFile() string { return filepath.Join(k.Dir, "greeting") }

// Start starts 'kedge serve' and waits until it has greeted.
func (k *Kedge) Start(t testing.TB) {
	t.Helper()
	k.Launch(t)
	Eventually(t, "the greeting", func() error {
		if strings.Contains(k.Greeting(t), "\nNext: ") {
			return nil
		}
		if k.Ended() {
			t.Fatalf("kedge serve ended: %s\n%s", k.command.ProcessState, k.Log())
		}
		return errors.New("it has not come")
	})
}

// Greeting is what the process printed to standard output so far.
func (k *Kedge) Greeting(t testing.TB) string { return Read(t, k.greetingFile()) }

// Log is what the last process logged so far.
func (k *Kedge) Log() string {
	text, err := os.ReadFile(k.log)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Read reads a whole file.
func Read(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// PID is the process id of kedge itself.
func (k *Kedge) PID() int { return k.command.Process.Pid }

// Wait waits until the process has ended, and returns its exit code; -1 after a signal.
func (k *Kedge) Wait(t testing.TB) int {
	t.Helper()
	select {
	case <-k.ended:
	case <-time.After(Patience):
		t.Fatalf("kedge serve did not end within %s", Patience)
	}
	return k.command.ProcessState.ExitCode()
}

// Ended says whether the process has ended.
func (k *Kedge) Ended() bool {
	select {
	case <-k.ended:
		return true
	default:
		return false
	}
}

// Terminate sends SIGTERM.
func (k *Kedge) Terminate(t testing.TB) {
	t.Helper()
	if err := k.command.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatalf("stopping kedge serve: %v", err)
	}
}

// Stop ends the process in good order.
func (k *Kedge) Stop(t testing.TB) {
	t.Helper()
	k.Terminate(t)
	if code := k.Wait(t); code != 0 {
		t.Fatalf("kedge serve ended with exit code %d after SIGTERM\n%s", code, k.Log())
	}
}

// Kill ends the process as a crash would: with SIGKILL.
func (k *Kedge) Kill(t testing.TB) {
	t.Helper()
	k.kill()
}

func (k *Kedge) kill() {
	if k.command == nil || k.Ended() { // its id may be somebody else's by now
		return
	}
	_ = syscall.Kill(-k.command.Process.Pid, syscall.SIGKILL) // fails when it is just ending by itself
	<-k.ended
}

// Result is how a command went.
type Result struct {
	Code           int
	Stdout, Stderr string
}

// Run runs a verb with the CA's configuration.
func (k *Kedge) Run(t testing.TB, args ...string) Result {
	t.Helper()
	command := exec.Command(Binary(), append(args, "--config", k.Config)...)
	command.Dir = k.Dir
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	err := command.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("kedge %q: %v", args, err)
	}
	return Result{command.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// Must runs a verb that has to succeed, and returns what it printed to standard output.
func (k *Kedge) Must(t testing.TB, args ...string) string {
	t.Helper()
	r := k.Run(t, args...)
	if r.Code != 0 {
		t.Fatalf("kedge %q: exit code %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// Status is what the running CA says of itself.
func (k *Kedge) Status(t testing.TB) admin.Status {
	t.Helper()
	if path := filepath.Join(k.Data, "admin.sock"); k.socket != path {
		k.socket, k.admin = path, admin.NewClient(path) // one, which keeps its connection
	}
	status, err := k.admin.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return status
}
