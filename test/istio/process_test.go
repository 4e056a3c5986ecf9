package istio

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is how long something may take that should happen soon. It is long, because machines are slow and busy, and costs
// nothing as long as all is well.
const patience = 60 * time.Second

// eventually tries until there is no error, and fails the test with the last one.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	if err := poll(try); err != nil {
		t.Fatalf("waited %s in vain for %s: %v", patience, what, err)
	}
}

func poll(try func() error) error {
	deadline, tick := time.After(patience), time.NewTicker(25*time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-deadline:
			return err
		case <-tick.C:
		}
	}
}

// process is a program under test.
type process struct {
	name    string
	command *exec.Cmd
	logFile string
	ended   chan struct{} // closed when the program has ended
	err     error         // how; to be read after ended
}

// start runs a program until the test ends at the latest. What it prints goes to a file, which is shown when the test fails.
func start(t *testing.T, name, dir string, environment []string, program string, args ...string) *process {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), name+"-*.log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p := &process{name: name, command: exec.Command(program, args...), logFile: log.Name(), ended: make(chan struct{})}
	p.command.Dir, p.command.Env = dir, environment
	p.command.Stdout, p.command.Stderr = log, log
	if err := p.command.Start(); err != nil {
		t.Fatalf("starting %s: %v", name, err)
	}
	go func() {
		p.err = p.command.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("%s logged:\n%s", name, p.log())
		}
	})
	return p
}

// stop asks the program to end, and waits for it.
func (p *process) stop(t *testing.T) {
	t.Helper()
	if err := p.command.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatalf("stopping %s: %v", p.name, err)
	}
	select {
	case <-p.ended:
	case <-time.After(patience):
		t.Fatalf("%s did not end within %s of SIGTERM", p.name, patience)
	}
}

// kill ends the program as a crash would.
func (p *process) kill() {
	_ = p.command.Process.Kill() // fails only when it has ended
	<-p.ended
}

// running is an error once the program has ended.
func (p *process) running() error {
	select {
	case <-p.ended:
		return fmt.Errorf("%s ended by itself (%v)", p.name, p.err)
	default:
		return nil
	}
}

// log returns all that was printed so far.
func (p *process) log() []byte {
	text, err := os.ReadFile(p.logFile)
	if err != nil {
		return []byte(err.Error())
	}
	return text
}

// run runs a program to its end and returns what it printed to standard output.
func run(t *testing.T, program string, args ...string) []byte {
	t.Helper()
	var stderr bytes.Buffer
	command := exec.Command(program, args...)
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", filepath.Base(program), args, err, stderr.Bytes())
	}
	return out
}

// ports that this test run has given out.
var ports struct {
	sync.Mutex
	given map[int]bool
}

// freePort returns a loopback port that nothing listens on. It is below those that the kernel gives to outgoing connections
// (from 32768 on), so that none of them takes it while a program that had it is restarted.
func freePort(t *testing.T) int {
	t.Helper()
	ports.Lock()
	defer ports.Unlock()
	if ports.given == nil {
		ports.given = map[int]bool{}
	}
	for range 1000 {
		port := 20000 + rand.IntN(12000)
		if ports.given[port] {
			continue
		}
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		ports.given[port] = true
		if err := listener.Close(); err != nil {
			t.Fatal(err)
		}
		return port
	}
	t.Fatal("no free port between 20000 and 32000")
	return 0
}

// write puts a file into a folder, atomically, as the kubelet does with tokens.
func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}
