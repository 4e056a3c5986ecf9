// Package envoy runs the real Envoy with the bootstraps of docs/envoy.md, and sends requests through pairs of them while a test does what it does to the CA.
//
//	web := envoy.Start(t, envoy.Bootstrap{Self: "web", Peer: "shop", Socket: socket})
//	traffic := envoy.Send(t, web.Outbound)
//	…
//	traffic.Stop(t) // fails the test if a single request failed
package envoy

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"kedge/test/process"
)

// binary is the environment variable that names the program.
const binary = "ENVOY_BIN"

// Envoy is a running one.
type Envoy struct {
	Bootstrap
	Dir     string // of everything that it reads and writes
	command *exec.Cmd
	ended   chan struct{}
}

// Start starts an Envoy, and waits for nothing. It is killed when the test ends.
func Start(t testing.TB, b Bootstrap) *Envoy {
	t.Helper()
	program := os.Getenv(binary)
	if program == "" {
		t.Fatalf("%s names no program of Envoy: run these tests with 'make e2e', which has what they need", binary)
	}
	e := &Envoy{Bootstrap: b, Dir: t.TempDir(), ended: make(chan struct{})}
	config := e.path("envoy.json")
	process.Write(t, config, b.write(t, e.Dir))
	log, err := os.OpenFile(e.path("log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() // the process has its own
	e.command = exec.Command(program, "-c", config, "--concurrency", "1", "--disable-hot-restart", "--log-level", "info")
	e.command.Stdout, e.command.Stderr = log, log
	e.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := e.command.Start(); err != nil {
		t.Fatalf("starting Envoy: %v", err)
	}
	go func() {
		_ = e.command.Wait() // the state says how it ended
		close(e.ended)
	}()
	t.Cleanup(func() {
		e.Stop()
		if t.Failed() {
			text := e.Log()
			t.Logf("the Envoy of %s logged:\n%s", b.Self, text[max(0, len(text)-6000):])
		}
	})
	return e
}

func (e *Envoy) path(name string) string { return filepath.Join(e.Dir, name) }

// Stop kills the program.
func (e *Envoy) Stop() {
	_ = e.command.Process.Kill() // it may have ended
	<-e.ended
}

// Log is what the program logged so far.
func (e *Envoy) Log() string {
	text, err := os.ReadFile(e.path("log"))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Ready waits until the program serves and holds a certificate and the roots of its peers.
func (e *Envoy) Ready(t testing.TB) {
	t.Helper()
	process.Eventually(t, "the Envoy of "+e.Self+" to be ready", func() error {
		select {
		case <-e.ended:
			t.Fatalf("the Envoy of %s ended: %s\n%s", e.Self, e.command.ProcessState, e.Log())
		default:
		}
		if code, body, err := e.admin("/ready"); err != nil || code != 200 {
			return fmt.Errorf("/ready: %d %s %w", code, strings.TrimSpace(body), err)
		}
		if held := e.Holds(t); len(held.Serials) == 0 || len(held.Roots) == 0 {
			return errors.New("it holds no certificate, or no root")
		}
		return nil
	})
}

func (e *Envoy) admin(path string) (code int, body string, err error) {
	return process.Fetch(fmt.Sprintf("http://127.0.0.1:%d%s", e.Admin, path))
}

// Held is what an Envoy's TLS contexts are made of at present, by serial numbers in lower-case hexadecimal.
type Held struct {
	Serials []string // of leaves
	Roots   []string
}

// Holds asks for it. The roots that prove the CA are not told from those of the peers.
func (e *Envoy) Holds(t testing.TB) (held Held) {
	t.Helper()
	_, body, err := e.admin("/certs")
	if err != nil {
		t.Fatal(err)
	}
	type certificate struct {
		Serial string `json:"serial_number"`
	}
	var answer struct {
		Certificates []struct {
			CA    []certificate `json:"ca_cert"`
			Chain []certificate `json:"cert_chain"`
		} `json:"certificates"`
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		t.Fatalf("/certs: %v: %s", err, body)
	}
	for _, context := range answer.Certificates {
		for _, root := range context.CA {
			held.Roots = append(held.Roots, root.Serial)
		}
		if len(context.Chain) > 0 {
			held.Serials = append(held.Serials, context.Chain[0].Serial)
		}
	}
	return held
}

// Stat is the sum of the counters whose names end like this.
func (e *Envoy) Stat(t testing.TB, suffix string) (sum int) {
	t.Helper()
	_, body, err := e.admin("/stats?type=Counters")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(body) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if n, err := strconv.Atoi(value); err == nil && strings.HasSuffix(name, suffix) {
			sum += n
		}
	}
	return sum
}

// Request is a line of an access log.
type Request struct {
	Peer    string  `json:"peer"`   // the URI in the peer's certificate
	Serial  string  `json:"serial"` // of the peer's certificate; only the inbound log has it
	Issuer  string  `json:"issuer"` // of the peer's certificate
	Code    int     `json:"code"`
	Failure *string `json:"failure"` // why there was no connection
}

// Access reads an access log, "inbound" or "outbound".
func (e *Envoy) Access(t testing.TB, log string) (requests []Request) {
	t.Helper()
	for line := range strings.Lines(process.Read(t, e.path(log+".log"))) {
		if !strings.HasSuffix(line, "\n") {
			break // it is being written
		}
		var r Request
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%s.log: %v: %s", log, err, line)
		}
		requests = append(requests, r)
	}
	return requests
}
