package vault

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// fake is a server that speaks as Vault does, for what a real one does not do: answers that are wrong, slow or hostile. Everything else is tested against real
// servers, in test/vault.
type fake struct {
	*httptest.Server
	caFile string

	mu      sync.Mutex
	answers map[string]http.HandlerFunc // by method and path
	calls   map[string]int
	other   http.HandlerFunc // answers to every other call
}

const fakeToken = "hvs.aTokenThatNobodyMaySee00000"

func newFake(t *testing.T) *fake {
	t.Helper()
	f := &fake{answers: map[string]http.HandlerFunc{}, calls: map[string]int{}, other: refuse(http.StatusNotFound)}
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		call := r.Method + " " + r.URL.Path[len("/v1/"):]
		f.mu.Lock()
		f.calls[call]++
		answer := f.answers[call]
		if answer == nil {
			answer = f.other
		}
		f.mu.Unlock()
		answer(w, r)
	}))
	f.EnableHTTP2 = true
	f.StartTLS()
	t.Cleanup(f.Close)
	f.caFile = write(t, "ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw})))
	f.on("GET auth/token/lookup-self", data(map[string]any{"ttl": 0, "renewable": false}))
	return f
}

// on sets what the server answers to a call.
func (f *fake) on(call string, answer http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answers[call] = answer
}

// count says how often a call came.
func (f *fake) count(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[call]
}

// data answers with this under "data".
func data(body map[string]any) http.HandlerFunc { return answer(map[string]any{"data": body}) }

func answer(body map[string]any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(body) }
}

// refuse answers with an error of Vault's.
func refuse(status int, reasons ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(map[string]any{"errors": append([]string{}, reasons...)})
	}
}

// write puts a file of mode 0600 into a folder of the test's.
func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// options log in with a token from a file.
func (f *fake) options(t *testing.T) ClientOptions {
	t.Helper()
	return ClientOptions{Address: f.URL, CAFile: f.caFile, Timeout: time.Minute, Login: Login{Token: &Secret{File: write(t, "token", fakeToken+"\n")}}}
}

func (f *fake) client(t *testing.T) *Client {
	t.Helper()
	return openClient(t, f.options(t))
}

func openClient(t *testing.T, o ClientOptions) *Client {
	t.Helper()
	c, err := OpenClient(o)
	if err != nil {
		t.Fatalf("OpenClient: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// alone is a client that nobody keeps logged in, so that only the test's own calls log in.
func alone(t *testing.T, o ClientOptions) *Client {
	t.Helper()
	c, err := newClient(o)
	if err != nil {
		t.Fatalf("newClient: %v", err)
	}
	return c
}

// short is a context that ends soon.
func short(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}
