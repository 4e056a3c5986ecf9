//go:build e2e

package vault_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	plugin "kedge/plugins/vault"
	"kedge/test/process"
)

// place is how a configuration names a login, and the files that it is in.
func place(l plugin.Login) (yaml string, files []string) {
	switch {
	case l.AppRole != nil:
		return fmt.Sprintf("{method: approle, roleID: %q, secretID: %q}", l.AppRole.RoleID, l.AppRole.SecretID.File), []string{l.AppRole.SecretID.File}
	case l.Kubernetes != nil:
		return fmt.Sprintf("{method: kubernetes, role: %q, tokenFile: %q}", l.Kubernetes.Role, l.Kubernetes.TokenFile), []string{l.Kubernetes.TokenFile}
	case l.Certificate != nil:
		return fmt.Sprintf("{method: cert, role: %q, certificateFile: %q, keyFile: %q}", l.Certificate.Role, l.Certificate.CertFile, l.Certificate.KeyFile), []string{l.Certificate.KeyFile}
	}
	return fmt.Sprintf("{method: token, token: %q}", l.Token.File), []string{l.Token.File}
}

// secrets are what nobody may read anywhere.
type secrets []string

// of adds what a text is made of: the lines of a file, and the parts of a JWT behind its header.
func (s *secrets) of(text string) {
	for _, line := range strings.Split(text, "\n") {
		if parts := strings.Split(line, "."); strings.HasPrefix(line, "eyJ") && len(parts) == 3 {
			*s = append(*s, parts[1:]...)
		} else if line != "" && !strings.HasPrefix(line, "-----") {
			*s = append(*s, line)
		}
	}
}

func (s secrets) in(t *testing.T, where, text string) {
	t.Helper()
	for _, secret := range s {
		if strings.Contains(text, secret) {
			t.Errorf("a secret stands in %s: %.6s…", where, secret)
		}
	}
}

// TestNothingThatIsPrintedHoldsASecret: a CA that logs all that it can gets good and bad tokens, and logs in to the server by each method, also with what is refused.
func TestNothingThatIsPrintedHoldsASecret(t *testing.T) {
	atOnce(t, "", func(t *testing.T, f *fixture) {
		f.mountTransit(t)
		for _, m := range f.methods(t) {
			for _, where := range []string{"a file", "the environment"} {
				login, files := place(m.login)
				var environment []string
				if where == "the environment" {
					if m.login.Token == nil && m.login.AppRole == nil {
						continue // only these two may be there
					}
					login = strings.Replace(login, fmt.Sprintf("%q", files[0]), "env:KEDGE_TEST_SECRET", 1)
					environment = []string{"KEDGE_TEST_SECRET=" + strings.TrimSpace(read(t, files[0]))}
				}
				t.Run(m.name+" in "+where, func(t *testing.T) { f.printsNoSecret(t, m, login, files, environment) })
			}
		}
	})
}

func (f *fixture) printsNoSecret(t *testing.T, m method, login string, files, environment []string) {
	k, cluster, key := process.New(t, ""), process.NewCluster(t), process.NewKey(t)
	const passphrase = "correct horse battery staple"
	process.Write(t, filepath.Join(k.Dir, "passphrase"), passphrase+"\n")
	process.Write(t, k.Config, process.Ports+cluster.Configuration(t, k.Dir)+
		fmt.Sprintf("root: {file: {passphraseFile: passphrase}}\nissuingCA: {keyStore: vault, vault: {mount: %q}}\nvault: {address: %q, caFile: %q, login: %s}\nlog: {level: debug}\n",
			f.transit, f.Address, f.CAFile, login))
	k.Env = environment
	hidden := secrets{passphrase, f.Root}
	know := func() {
		for _, file := range files {
			hidden.of(read(t, file))
		}
	}
	know()
	k.Start(t)
	caller := k.Dial(t, nil)
	ask := func(token string) error {
		hidden.of(token)
		_, err := caller.Issue(t.Context(), key.CSR, token, 0)
		return err
	}
	good := cluster.Token(t, "default", "web")
	spoiled := good[:len(good)-20] + strings.Repeat("A", 20)
	for token, code := range map[string]codes.Code{good: codes.OK, spoiled: codes.Unauthenticated, process.NewCluster(t).Token(t, "default", "web"): codes.Unauthenticated,
		"no-token-but-somebodys-password": codes.Unauthenticated} {
		if err := ask(token); status.Code(err) != code {
			t.Errorf("the answer to a token is %v, not %s", err, code)
		}
	}
	join := filepath.Join(k.Dir, "join")
	k.Must(t, "token", "create", "--identity", "ns/default/sa/web", "--out", join)
	hidden.of(read(t, join))
	k.Must(t, "svid", "fetch", "--token-file", join, "--out", filepath.Join(k.Dir, "svid"))
	if err := ask(strings.TrimSpace(read(t, join)) + "x"); status.Code(err) != codes.Unauthenticated {
		t.Errorf("the answer to a join token that is not good is %v", err)
	}
	if len(environment) == 0 { // what is refused is in the log with its reason
		if m.readsAgain {
			f.Write(t, "auth/token/revoke", map[string]any{"token": strings.TrimSpace(read(t, files[0]))})
		} else {
			f.Write(t, "sys/leases/revoke-prefix/"+m.prefix, nil)
		}
		m.spoil(t)
		know()
		process.Eventually(t, "a login that is refused", func() error {
			if err := ask(good); err == nil {
				return fmt.Errorf("a token that is revoked counts")
			}
			if !strings.Contains(k.Log(), "the login to Vault does not work and is tried again") {
				return fmt.Errorf("the log does not say so")
			}
			return nil
		})
		f.printed(t, k, hidden)
		m.mend(t)
		know()
		process.Eventually(t, "a login that works", func() error { return ask(good) })
	}
	f.printed(t, k, hidden)
	k.Stop(t)
	f.printed(t, k, hidden)
}

// printed makes sure that a CA has printed no secret, and prints none.
func (f *fixture) printed(t *testing.T, k *process.Kedge, hidden secrets) {
	t.Helper()
	all := map[string]string{"the log": k.Log(), "the greeting": k.Greeting(t)}
	if !k.Ended() {
		for _, path := range []string{"/readyz", "/metrics"} {
			_, all[path] = k.Get(t, path)
		}
		all["the ledger"] = k.Must(t, "ledger", "export")
	}
	for _, args := range [][]string{{"doctor"}, {"config", "print"}, {"config", "check"}} {
		r := k.Run(t, args...)
		all[strings.Join(args, " ")] = r.Stdout + r.Stderr
	}
	if !strings.Contains(all["the log"], `"level":"DEBUG"`) {
		t.Error("the log has no line of the level debug")
	}
	for where, text := range all {
		hidden.in(t, where, text)
		f.holdsNoSecret(t, text)
	}
}
