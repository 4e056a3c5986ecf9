// Package vault runs the real servers that plugins/vault is tested against: the core of Vault (./server), and OpenBao. Both keep their storage on disk,
// speak TLS under a CA of their own, and are sealed, stopped and started again as a test wants it.
//
//	s := vault.Start(t, vault.OpenBao)
//	s.Write(t, "sys/mounts/pki", map[string]any{"type": "pki"})
package vault

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"kedge/test/process"
)

// Kind is a server program.
type Kind string

// The servers, and the environment variables that name their programs.
const (
	Vault   Kind = "Vault"
	OpenBao Kind = "OpenBao"
)

var binaries = map[Kind]string{Vault: "VAULT_BIN", OpenBao: "BAO_BIN"}

// Server is a server with its storage, over all its restarts.
type Server struct {
	Kind    Kind
	Address string // https://127.0.0.1:PORT
	CAFile  string // of its certificate
	Root    string // its root token

	dir     string
	key     string // unseals it
	port    int
	client  *http.Client
	command *exec.Cmd
	ended   chan struct{}
}

// Start makes a server that is initialized and unsealed. It is killed when the test ends.
func Start(t testing.TB, kind Kind) *Server {
	t.Helper()
	s := &Server{Kind: kind, dir: t.TempDir(), port: process.FreePort(t)}
	s.Address = fmt.Sprintf("https://127.0.0.1:%d", s.port)
	s.CAFile = filepath.Join(s.dir, "ca.pem")
	pool := s.makeCertificate(t)
	s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}, Timeout: process.Patience}
	process.Write(t, filepath.Join(s.dir, "bao.hcl"), fmt.Sprintf(`
storage "raft" {
  path = %q
  node_id = "one"
  performance_multiplier = 1
}
listener "tcp" {
  address = "127.0.0.1:%d"
  cluster_address = "127.0.0.1:%d"
  tls_cert_file = %q
  tls_key_file = %q
}
api_addr = %q
cluster_addr = "https://127.0.0.1:%[3]d"
`, s.path("data"), s.port, process.FreePort(t), s.path("cert.pem"), s.path("key.pem"), s.Address))
	if err := os.Mkdir(s.path("data"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Stop()
		if t.Failed() {
			text, _ := os.ReadFile(s.path("log"))
			t.Logf("%s logged:\n%s", kind, text[max(0, len(text)-4000):])
		}
	})
	s.launch(t)
	var answer struct {
		Keys  []string `json:"keys"`
		Token string   `json:"root_token"`
	}
	if err := json.Unmarshal(s.must(t, http.MethodPut, "sys/init", map[string]any{"secret_shares": 1, "secret_threshold": 1}), &answer); err != nil || len(answer.Keys) != 1 {
		t.Fatalf("initializing %s: %d keys, %v", kind, len(answer.Keys), err)
	}
	s.key, s.Root = answer.Keys[0], answer.Token
	s.Unseal(t)
	return s
}

func (s *Server) path(name string) string { return filepath.Join(s.dir, name) }

// launch runs the program and waits until it answers.
func (s *Server) launch(t testing.TB) {
	t.Helper()
	program := os.Getenv(binaries[s.Kind])
	if program == "" {
		t.Fatalf("%s names no program of %s: run these tests with 'make e2e', which has what they need", binaries[s.Kind], s.Kind)
	}
	args := []string{"server", "-config", s.path("bao.hcl")}
	if s.Kind == Vault {
		args = []string{"-listen", fmt.Sprintf("127.0.0.1:%d", s.port), "-data", s.path("data"), "-cert", s.path("cert.pem"), "-key", s.path("key.pem")}
	}
	log, err := os.OpenFile(s.path("log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	s.command, s.ended = exec.Command(program, args...), make(chan struct{})
	s.command.Stdout, s.command.Stderr = log, log
	s.command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.command.Start(); err != nil {
		t.Fatalf("starting %s: %v", s.Kind, err)
	}
	command, ended := s.command, s.ended
	go func() {
		_ = command.Wait()
		close(ended)
	}()
	process.Eventually(t, string(s.Kind)+" to answer", func() error {
		select {
		case <-ended:
			text, _ := os.ReadFile(s.path("log"))
			t.Fatalf("%s has ended:\n%s", s.Kind, text)
		default:
		}
		_, _, err := s.do(http.MethodGet, "sys/seal-status", nil)
		return err
	})
}

// Stop kills the program.
func (s *Server) Stop() {
	if s.command == nil {
		return
	}
	_ = s.command.Process.Kill() // it may have ended
	<-s.ended
	s.command = nil
}

// Restart starts the program anew, and unseals it.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	s.Stop()
	s.launch(t)
	s.Unseal(t)
}

// Freeze lets the program do nothing, while its connections stay open.
func (s *Server) Freeze(t testing.TB) { s.signal(t, syscall.SIGSTOP) }

// Thaw ends a Freeze.
func (s *Server) Thaw(t testing.TB) { s.signal(t, syscall.SIGCONT) }

func (s *Server) signal(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if err := s.command.Process.Signal(sig); err != nil {
		t.Fatalf("%s to %s: %v", sig, s.Kind, err)
	}
}

// Seal seals it.
func (s *Server) Seal(t testing.TB) {
	t.Helper()
	s.Write(t, "sys/seal", nil)
}

// Unseal unseals it and waits until it is active.
func (s *Server) Unseal(t testing.TB) {
	t.Helper()
	s.Write(t, "sys/unseal", map[string]any{"key": s.key})
	process.Eventually(t, string(s.Kind)+" to be active", func() error {
		status, text, err := s.do(http.MethodGet, "sys/health", nil)
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("its health is %d %s", status, text)
		}
		return err
	})
}

// Write makes a call with the root token, which must succeed, and returns what the answer has under "data".
func (s *Server) Write(t testing.TB, path string, body any) map[string]any {
	t.Helper()
	return data(t, s.must(t, http.MethodPut, path, body))
}

// Read is like Write.
func (s *Server) Read(t testing.TB, path string) map[string]any {
	t.Helper()
	return data(t, s.must(t, http.MethodGet, path, nil))
}

// Delete is like Write.
func (s *Server) Delete(t testing.TB, path string) {
	t.Helper()
	s.must(t, http.MethodDelete, path, nil)
}

// Refuses says whether a call with the root token fails, and returns the answer.
func (s *Server) Refuses(t testing.TB, method, path string) (string, bool) {
	t.Helper()
	status, text, err := s.do(method, path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return string(text), status >= 400
}

func data(t testing.TB, text []byte) map[string]any {
	t.Helper()
	if len(text) == 0 {
		return nil
	}
	var answer struct {
		Data map[string]any `json:"data"`
		Auth map[string]any `json:"auth"`
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if answer.Auth != nil {
		return answer.Auth
	}
	return answer.Data
}

func (s *Server) must(t testing.TB, method, path string, body any) []byte {
	t.Helper()
	status, text, err := s.do(method, path, body)
	if err != nil || status >= 400 {
		t.Fatalf("%s %s of %s: %d %s %v", method, path, s.Kind, status, text, err)
	}
	return text
}

func (s *Server) do(method, path string, body any) (status int, text []byte, err error) {
	var encoded []byte
	if body != nil {
		if encoded, err = json.Marshal(body); err != nil {
			return 0, nil, err
		}
	}
	request, err := http.NewRequest(method, s.Address+"/v1/"+path, bytes.NewReader(encoded))
	if err != nil {
		return 0, nil, err
	}
	request.Header.Set("X-Vault-Token", s.Root)
	response, err := s.client.Do(request)
	if err != nil {
		return 0, nil, err
	}
	text, err = io.ReadAll(response.Body)
	return response.StatusCode, text, errors.Join(err, response.Body.Close())
}

// makeCertificate makes a CA and the server's certificate under it.
func (s *Server) makeCertificate(t testing.TB) *x509.CertPool {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "the CA of " + string(s.Kind)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	issuer, issuerKey := Certificate(t, template, nil, nil)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: string(s.Kind)}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, NotBefore: template.NotBefore, NotAfter: template.NotAfter}
	cert, key := Certificate(t, leaf, issuer, issuerKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	process.Write(t, s.CAFile, PEM("CERTIFICATE", issuer.Raw))
	process.Write(t, s.path("cert.pem"), PEM("CERTIFICATE", cert.Raw))
	process.Write(t, s.path("key.pem"), PEM("PRIVATE KEY", der))
	pool := x509.NewCertPool()
	pool.AddCert(issuer)
	return pool
}

// Certificate makes a P-256 key and has its certificate signed by issuer, or by itself when that is nil.
func Certificate(t testing.TB, template, issuer *x509.Certificate, issuerKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if issuer == nil {
		issuer, issuerKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), issuerKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// PEM encodes one block.
func PEM(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}
