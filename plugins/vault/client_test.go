package vault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	f := newFake(t)
	for name, c := range map[string]struct {
		spoil func(*ClientOptions)
		want  string
	}{
		"no address":          {func(o *ClientOptions) { o.Address = "" }, "is no address"},
		"no scheme":           {func(o *ClientOptions) { o.Address = "vault.example.org:8200" }, "the address"},
		"another scheme":      {func(o *ClientOptions) { o.Address = "ftp://vault.example.org" }, "neither https"},
		"a path":              {func(o *ClientOptions) { o.Address = "https://vault.example.org/v1" }, "is no address"},
		"a password in it":    {func(o *ClientOptions) { o.Address = "https://me:" + fakeToken + "@vault.example.org" }, "is no address"},
		"http elsewhere":      {func(o *ClientOptions) { o.Address = "http://vault.example.org:8200" }, "in clear"},
		"http at a lookalike": {func(o *ClientOptions) { o.Address = "http://127.0.0.1.example.org:8200" }, "in clear"},
		"a negative limit":    {func(o *ClientOptions) { o.Timeout = -time.Second }, "negative"},
		"no CA":               {func(o *ClientOptions) { o.CAFile = "/nowhere/ca.pem" }, "/nowhere/ca.pem"},
		"an empty CA":         {func(o *ClientOptions) { o.CAFile = write(t, "ca.pem", "") }, "no certificate in PEM"},
		"no login":            {func(o *ClientOptions) { o.Login = Login{} }, "0 methods"},
		"two logins":          {func(o *ClientOptions) { o.Login.Kubernetes = &KubernetesLogin{Role: "kedge"} }, "2 methods"},
		"a token of nowhere":  {func(o *ClientOptions) { o.Login = Login{Token: &Secret{}} }, "name either"},
		"a token of both":     {func(o *ClientOptions) { o.Login.Token.Env = "TOKEN" }, "name either"},
		"no role id":          {func(o *ClientOptions) { o.Login = Login{AppRole: &AppRoleLogin{SecretID: Secret{Env: "X"}}} }, "no role id"},
		"no secret id":        {func(o *ClientOptions) { o.Login = Login{AppRole: &AppRoleLogin{RoleID: "x"}} }, "name either"},
		"no Kubernetes role":  {func(o *ClientOptions) { o.Login = Login{Kubernetes: &KubernetesLogin{}} }, "no role"},
		"no client key":       {func(o *ClientOptions) { o.Login = Login{Certificate: &CertificateLogin{CertFile: "x"}} }, "a key file"},
		"a key that is none": {func(o *ClientOptions) {
			o.Login = Login{Certificate: &CertificateLogin{CertFile: f.caFile, KeyFile: write(t, "key", "x")}}
		}, "the key"},
		"a mount with dots": {func(o *ClientOptions) { o.Login = Login{Kubernetes: &KubernetesLogin{Role: "x", Mount: "../sys"}} }, "is no path"},
		"a mount with a ?":  {func(o *ClientOptions) { o.Login = Login{Kubernetes: &KubernetesLogin{Role: "x", Mount: "a?b"}} }, "is no path"},
	} {
		t.Run(name, func(t *testing.T) {
			o := f.options(t)
			c.spoil(&o)
			client, err := OpenClient(o)
			if err == nil {
				client.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), fakeToken) {
				t.Errorf("the error does not say %q, or it says the token: %v", c.want, err)
			}
		})
	}
	client := f.client(t)
	for name, open := range map[string]func() error{
		"no client": func() error { _, err := OpenRoot(RootOptions{}); return err },
		"an issuer with /": func() error {
			_, err := OpenRoot(RootOptions{Client: client, Issuer: "a/b"})
			return err
		},
		"an issuer with dots": func() error {
			_, err := OpenRoot(RootOptions{Client: client, Issuer: ".."})
			return err
		},
		"a mount with dots": func() error {
			_, err := OpenRoot(RootOptions{Client: client, Mount: "a/../b"})
			return err
		},
		"a negative interval": func() error {
			_, err := OpenRoot(RootOptions{Client: client, PollInterval: -1})
			return err
		},
		"keys without client":   func() error { _, err := OpenKeyStore(KeyStoreOptions{}); return err },
		"a prefix with /":       func() error { _, err := OpenKeyStore(KeyStoreOptions{Client: client, Prefix: "a/"}); return err },
		"a negative sign limit": func() error { _, err := OpenKeyStore(KeyStoreOptions{Client: client, SignTimeout: -1}); return err },
	} {
		if open() == nil {
			t.Errorf("%s is not refused", name)
		}
	}
}

func TestASecretIsReadWithCare(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		mode fs.FileMode
		want string // in the error; "": it is fine
	}{
		"one line":             {fakeToken + "\n", 0o600, ""},
		"without its end":      {fakeToken, 0o400, ""},
		"with white space":     {"  " + fakeToken + " \r\n", 0o600, ""},
		"given to the fsGroup": {fakeToken, 0o640, ""},
		"empty":                {"\n", 0o600, "is empty"},
		"two lines":            {fakeToken + "\n" + fakeToken, 0o600, "more than one line"},
		"a header":             {fakeToken + "\r\nX-Other: 1", 0o600, "more than one line"},
		"readable by all":      {fakeToken, 0o644, "chmod 600"},
		"writable by group":    {fakeToken, 0o660, "chmod 600"},
		"huge":                 {strings.Repeat("a", maxSecret+1), 0o600, "octets"},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, "token", c.text)
			if err := os.Chmod(path, c.mode); err != nil {
				t.Fatal(err)
			}
			got, err := Secret{File: path}.read()
			if c.want == "" && (err != nil || got != fakeToken) {
				t.Errorf("%q, %v", got, err)
			}
			if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), fakeToken)) {
				t.Errorf("the error does not say %q and which file, or it says the secret: %v", c.want, err)
			}
		})
	}
	if _, err := (Secret{File: t.TempDir()}).read(); err == nil {
		t.Error("a folder is a secret")
	}
	t.Setenv("KEDGE_TEST_TOKEN", fakeToken+"\n")
	if got, err := (Secret{Env: "KEDGE_TEST_TOKEN"}).read(); err != nil || got != fakeToken {
		t.Errorf("from the environment: %q, %v", got, err)
	}
	if _, err := (Secret{Env: "KEDGE_TEST_NO_TOKEN"}).read(); err == nil || !strings.Contains(err.Error(), "KEDGE_TEST_NO_TOKEN is not set") {
		t.Errorf("a variable that is not set: %v", err)
	}
}

func TestAVariableThatTheLibraryCannotReadIsSaid(t *testing.T) {
	f := newFake(t)
	t.Setenv("VAULT_CACERT", "/nowhere/ca.pem")
	if _, err := OpenClient(f.options(t)); err == nil || !strings.Contains(err.Error(), "unset it") || !strings.Contains(err.Error(), "/nowhere/ca.pem") {
		t.Errorf("error %v", err)
	}
}

// drip answers with an octet now and then, and never comes to an end.
func drip(w http.ResponseWriter, r *http.Request) {
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for r.Context().Err() == nil {
		if _, err := w.Write([]byte(" ")); err != nil {
			return
		}
		_ = http.NewResponseController(w).Flush()
		<-ticker.C
	}
}

func TestAnAnswerThatDripsIsNotWaitedFor(t *testing.T) {
	f := newFake(t)
	c := f.client(t)
	if _, err := c.signedIn(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	f.on("GET slow", drip)
	if err := c.call(t.Context(), 100*time.Millisecond, http.MethodGet, "slow", nil, &struct{}{}); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "did not answer within 100ms") {
		t.Errorf("error %v", err)
	}
	if err := c.read(short(t), "slow", &struct{}{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with the caller's own limit: %v", err)
	}
	f.on("GET slow", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		drip(w, r)
	})
	if err := c.read(short(t), "slow", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an error that drips: %v", err)
	}
	f.on("GET auth/token/lookup-self", drip) // nobody can log in
	late := alone(t, f.options(t))
	if err := late.read(short(t), "slow", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting for a login: %v", err)
	}
}

// TestAConnectionOnWhichNothingComesIsSaid, as from a load balancer whose server is away.
func TestAConnectionOnWhichNothingComesIsSaid(t *testing.T) {
	f := newFake(t)
	for says, treat := range map[string]func(net.Conn){
		"it cannot be reached. See that it runs": func(conn net.Conn) { _ = conn.Close() },
		"it did not answer within 100ms":         func(net.Conn) {},
	} {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		accepted := make(chan net.Conn, 1)
		go func() {
			defer close(accepted)
			if conn, err := listener.Accept(); err == nil {
				treat(conn)
				accepted <- conn
			}
		}()
		o := f.options(t)
		o.Address, o.Timeout = "https://"+listener.Addr().String(), 100*time.Millisecond
		c := alone(t, o)
		connection, err := c.o.connect("")
		if err != nil {
			t.Fatal(err)
		}
		if err := c.explain(connection.send(t.Context(), http.MethodGet, "path", nil, nil), time.Hour, http.MethodGet, "path"); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("error %v, which does not say %q", err, says)
		}
		_ = listener.Close() // what waits for a connection ends
		if conn := <-accepted; conn != nil {
			_ = conn.Close() // perhaps a second time
		}
	}
}

func TestAnAnswerThatIsTooLargeIsRefused(t *testing.T) {
	f := newFake(t)
	c := f.client(t)
	for _, status := range []int{http.StatusOK, http.StatusInternalServerError} {
		f.on("GET large", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			chunk := bytes.Repeat([]byte(" "), 1<<16)
			for range maxAnswer/len(chunk) + 1 {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		})
		if err := c.read(t.Context(), "large", &struct{}{}); !errors.Is(err, errTooLarge) {
			t.Errorf("with the status %d: %v", status, err)
		}
	}
	fits := `{"data":{"x":"` + strings.Repeat("x", maxAnswer-100) + `"}}`
	f.on("GET large", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(fits)) })
	if err := c.read(t.Context(), "large", &struct{}{}); err != nil {
		t.Errorf("an answer that is as large as it may be: %v", err)
	}
}

// TestAHostileServerPutsNoSecretIntoAnError: it repeats what it was sent.
func TestAHostileServerPutsNoSecretIntoAnError(t *testing.T) {
	const secretID = "a-secret-id-that-nobody-may-see"
	f := newFake(t)
	repeat := func(w http.ResponseWriter, r *http.Request) {
		var body bytes.Buffer
		_, _ = body.ReadFrom(r.Body)
		refuse(http.StatusInternalServerError, "you sent "+r.Header.Get("X-Vault-Token")+" and "+body.String(), strings.Repeat("x\n", 10_000))(w, r)
	}
	f.on("GET echo", repeat)
	f.on("PUT auth/approle/login", repeat)
	var log bytes.Buffer
	o := f.options(t)
	o.Logger = slog.New(slog.NewTextHandler(&log, nil))
	c := alone(t, o)
	err := c.read(t.Context(), "echo", nil)
	o.Login = Login{AppRole: &AppRoleLogin{RoleID: "role", SecretID: Secret{File: write(t, "secret-id", secretID)}}}
	login := alone(t, o).read(t.Context(), "echo", nil)
	for _, err := range []error{err, login} {
		if err == nil || !strings.Contains(err.Error(), "you sent") || !strings.Contains(err.Error(), "(a secret)") {
			t.Fatalf("the server's answer is not in the error: %v", err)
		}
		if len(err.Error()) > 2000 || strings.Contains(err.Error(), "\n") {
			t.Errorf("the error is %d octets long, or of several lines", len(err.Error()))
		}
	}
	if all := fmt.Sprint(err, login, log.String()); strings.Contains(all, fakeToken) || strings.Contains(all, secretID) {
		t.Errorf("a secret stands in an error or in the log: %s", all)
	}
}

func TestASecretIDThatIsRefusedIsNotTriedOverAndOver(t *testing.T) {
	const login = "PUT auth/approle/login"
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		calls  int
	}{
		"refused":                    {refuse(http.StatusBadRequest, "invalid secret id"), 1},
		"refused with 500":           {refuse(http.StatusInternalServerError, "invalid secret id"), 1},
		"locked":                     {refuse(http.StatusForbidden, "permission denied"), 1},
		"not refused, but sealed":    {refuse(http.StatusServiceUnavailable, "Vault is sealed"), 4},
		"not refused, but no method": {refuse(http.StatusNotFound, "no handler for route \"auth/approle/login\". route entry not found."), 4},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.on(login, c.answer)
			o := f.options(t)
			o.Login = Login{AppRole: &AppRoleLogin{RoleID: "role", SecretID: Secret{File: write(t, "secret-id", "one-secret-id")}}}
			client := alone(t, o)
			try := func() error {
				client.mu.Lock()
				client.retry = time.Time{} // the wait after a failure is over
				client.mu.Unlock()
				return client.read(t.Context(), "something", nil)
			}
			for range 4 {
				if err := try(); err == nil || !strings.Contains(err.Error(), "logging in to Vault") {
					t.Fatalf("error %v", err)
				}
			}
			if got := f.count(login); got != c.calls {
				t.Errorf("%d logins instead of %d", got, c.calls)
			}
			// The same secret in a file that is written anew is tried at once, as is another.
			f.on(login, answer(map[string]any{"auth": map[string]any{"client_token": fakeToken, "lease_duration": 3600}}))
			path := o.Login.AppRole.SecretID.File
			if err := os.Chtimes(path, time.Time{}, time.Now().Add(time.Minute)); err != nil {
				t.Fatal(err)
			}
			if err := try(); !isAbsent(err) {
				t.Errorf("after the file was touched: %v", err)
			}
		})
	}
}

func TestCallersThatCannotLogInShareTheFailure(t *testing.T) {
	f := newFake(t)
	f.on("GET auth/token/lookup-self", refuse(http.StatusServiceUnavailable, "Vault is sealed"))
	c := alone(t, f.options(t))
	for range 50 {
		if err := c.read(t.Context(), "something", nil); err == nil || !strings.Contains(err.Error(), "Vault is sealed") {
			t.Fatalf("error %v", err)
		}
		c.mu.Lock()
		c.retry = time.Now().Add(time.Hour)
		c.mu.Unlock()
	}
	if got := f.count("GET auth/token/lookup-self"); got != 1 {
		t.Errorf("%d attempts to log in", got)
	}
}

// TestADeniedCallLogsInAnewOnlyWhenThatMayHelp: the token is no longer taken, or it is so old that its role may have got more since.
func TestADeniedCallLogsInAnewOnlyWhenThatMayHelp(t *testing.T) {
	const login, lookUp, call = "PUT auth/kubernetes/login", "GET auth/token/lookup-self", "GET something"
	for name, c := range map[string]struct {
		age    time.Duration // of the first token
		taken  bool          // it is still good
		logins int           // over three denied calls, the first included
	}{
		"the token is good":                     {0, true, 1},
		"the token is good, and old":            {time.Hour, true, 2},
		"nobody says whether the token is good": {0, false, 2}, // the second may not look itself up either
		"nobody says so, and the token was old": {time.Hour, false, 2},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.on(login, answer(map[string]any{"auth": map[string]any{"client_token": fakeToken, "lease_duration": 3600}}))
			f.on(call, refuse(http.StatusForbidden, "permission denied"))
			f.on(lookUp, refuse(http.StatusForbidden, "permission denied"))
			if c.taken {
				f.on(lookUp, data(map[string]any{"ttl": 3600}))
			}
			o := f.options(t)
			o.Login = Login{Kubernetes: &KubernetesLogin{Role: "kedge", TokenFile: write(t, "token", "jwt")}}
			client := alone(t, o)
			if _, err := client.signedIn(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			client.session.since = client.session.since.Add(-c.age)
			for range 3 {
				if err := client.read(t.Context(), "something", nil); !isDenied(err) || !strings.Contains(err.Error(), `"read" on "something"`) {
					t.Fatalf("error %v", err)
				}
				if client.session.anew {
					client.session.since = time.Now() // however slow this machine is
				}
			}
			if got := f.count(login); got != c.logins {
				t.Errorf("%d logins instead of %d", got, c.logins)
			}
		})
	}
}
