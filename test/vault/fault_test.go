//go:build e2e

package vault_test

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	plugin "kedge/plugins/vault"
	"kedge/test/process"
	"kedge/test/vault"
)

// load is some callers that have a key sign, and an issuing CA certified, over and over.
type load struct {
	signed, certified atomic.Int64
	failed            chan error // the latest ones
	stop              context.CancelFunc
	all               sync.WaitGroup
}

// begin puts load on a key and a root until the test ends.
func begin(t *testing.T, key crypto.Signer, root *plugin.Root) *load {
	ctx, stop := context.WithCancel(t.Context())
	l := &load{failed: make(chan error, 64), stop: stop}
	request := newRequest(t)
	for range 8 {
		l.run(ctx, &l.signed, func() error { return sign(key) })
	}
	l.run(ctx, &l.certified, func() error {
		_, err := root.Certify(ctx, request)
		return err
	})
	t.Cleanup(l.end)
	return l
}

func (l *load) run(ctx context.Context, count *atomic.Int64, call func() error) {
	l.all.Go(func() {
		for ctx.Err() == nil {
			if err := call(); err == nil {
				count.Add(1)
			} else if ctx.Err() == nil {
				select {
				case l.failed <- err:
				default:
				}
			}
		}
	})
}

func (l *load) end() {
	l.stop()
	l.all.Wait()
}

// goesOn waits until both have succeeded again.
func (l *load) goesOn(t *testing.T) {
	t.Helper()
	signed, certified := l.signed.Load(), l.certified.Load()
	process.Eventually(t, "signatures and certificates to be made", func() error {
		if l.signed.Load() < signed+20 || l.certified.Load() < certified+2 {
			return fmt.Errorf("%d signatures and %d certificates since", l.signed.Load()-signed, l.certified.Load()-certified)
		}
		return nil
	})
}

// failsSaying waits for failures of both that say one of these.
func (l *load) failsSaying(t *testing.T, f *fixture, says ...string) {
	t.Helper()
	for len(l.failed) > 0 { // of before
		<-l.failed
	}
	missing := map[string]bool{"signing with the key": true, "certifying the issuing CA": true}
	process.Eventually(t, fmt.Sprintf("failures that say %q", says), func() error {
		for {
			select {
			case err := <-l.failed:
				f.holdsNoSecret(t, err.Error())
				for _, say := range says {
					for who := range missing {
						if strings.Contains(err.Error(), say) && strings.Contains(err.Error(), who) {
							delete(missing, who)
						}
					}
				}
				if len(missing) == 0 {
					return nil
				}
			default:
				return fmt.Errorf("none yet of %v", missing)
			}
		}
	})
}

func problem(t *testing.T, of interface{ Problem() error }, says string) {
	t.Helper()
	process.Eventually(t, fmt.Sprintf("a problem that says %q", says), func() error {
		if err := of.Problem(); err == nil || !strings.Contains(err.Error(), says) {
			return fmt.Errorf("the problem is %w", err)
		}
		return nil
	})
}

func noProblem(t *testing.T, of ...interface{ Problem() error }) {
	t.Helper()
	process.Eventually(t, "no problem to be left", func() error {
		var all []error
		for _, o := range of {
			all = append(all, o.Problem())
		}
		return errors.Join(all...)
	})
}

// impatient is a login under which nothing waits long.
func (f *fixture) impatient(t *testing.T, limit time.Duration) *plugin.Client {
	o := f.options()
	o.Timeout = limit
	return f.open(t, o)
}

func TestASealedVaultUnderLoadIsSaidAndMends(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		root, keys := f.root(t, plugin.RootOptions{Mount: f.mountRoot(t)}), f.keys(t, plugin.KeyStoreOptions{Mount: f.mountTransit(t)})
		ref, key := create(t, keys)
		l := begin(t, key, root)
		l.goesOn(t)
		f.Seal(t)
		l.failsSaying(t, f, "unseal it with")
		problem(t, root, "unseal it with")
		problem(t, keys, "unseal it with")
		_, err := keys.Open(t.Context(), ref)
		f.failsWith(t, err, "opening the key "+ref, "unseal it with")
		if errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a sealed Vault makes a key look as if it were not there: %v", err)
		}
		// One that starts meanwhile waits for nothing, and goes on with the others.
		late := f.login(t)
		problem(t, late, "unseal it with")
		lateKeys := f.keys(t, plugin.KeyStoreOptions{Mount: f.transit, Client: late})
		f.Unseal(t)
		l.goesOn(t)
		noProblem(t, root, keys, late, f.client)
		if _, err := lateKeys.Open(t.Context(), ref); err != nil {
			t.Errorf("opening the key with a login that began while Vault was sealed: %v", err)
		}
	})
}

func TestAVaultThatIsStoppedUnderLoadMends(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		root, keys := f.root(t, plugin.RootOptions{Mount: f.mountRoot(t)}), f.keys(t, plugin.KeyStoreOptions{Mount: f.mountTransit(t)})
		_, key := create(t, keys)
		l := begin(t, key, root)
		l.goesOn(t)
		for range 2 {
			f.Stop()
			l.failsSaying(t, f, "it cannot be reached")
			problem(t, root, "it cannot be reached")
			f.Restart(t)
			l.goesOn(t)
			noProblem(t, root, keys, f.client)
		}
	})
}

func TestAFrozenVaultHangsNobody(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		client := f.impatient(t, 2*time.Second)
		root := f.root(t, plugin.RootOptions{Mount: f.mountRoot(t), Client: client})
		keys := f.keys(t, plugin.KeyStoreOptions{Mount: f.mountTransit(t), Client: client, SignTimeout: time.Second})
		ref, _ := create(t, f.keys(t, plugin.KeyStoreOptions{Mount: f.transit}))
		var key crypto.Signer
		process.Eventually(t, "the key to be opened", func() (err error) {
			key, err = keys.Open(t.Context(), ref)
			return err
		})
		l := begin(t, key, root)
		l.goesOn(t)
		f.Freeze(t)
		l.failsSaying(t, f, "it did not answer within 1s", "it did not answer within 2s")
		problem(t, keys, "it did not answer within 2s")
		f.Thaw(t)
		l.goesOn(t)
		noProblem(t, root, keys, client)
	})
}

func TestALostPermissionIsNamed(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		root, keys := f.root(t, plugin.RootOptions{Mount: f.mountRoot(t)}), f.keys(t, plugin.KeyStoreOptions{Mount: f.mountTransit(t)})
		ref, key := create(t, keys)
		for _, check := range []error{root.Check(t.Context()), keys.Check(t.Context())} {
			if check != nil {
				t.Errorf("Check with all permissions: %v", check)
			}
		}
		f.writePolicy(t, "elsewhere", "elsewhere")
		f.failsWith(t, sign(key), "403", `"update" on "`+f.transit+"/sign/"+nameOf(ref)+`"`)
		f.failsWith(t, certify(t, root), "403", `"read" on "`+f.pki+`/issuer/default"`)
		f.failsWith(t, keys.Check(t.Context()), "403")
		_, err := keys.Open(t.Context(), ref)
		f.failsWith(t, err, "403")
		if err := keys.Delete(t.Context(), ref); err == nil {
			t.Error("Delete without the permission says that the key is gone")
		}
		problem(t, root, "403")
		problem(t, keys, "403")
		f.Write(t, "sys/policies/acl/kedge", map[string]any{"policy": fmt.Sprintf("path %q { capabilities = [\"read\"] }", f.pki+"/issuer/default")})
		process.Eventually(t, "Check to name what is missing", func() error {
			if err := root.Check(t.Context()); err == nil || !strings.Contains(err.Error(), `lack "update" on "`+f.pki+`/issuer/default/sign-intermediate"`) {
				return fmt.Errorf("it says %w", err)
			}
			return nil
		})
		f.writePolicy(t, f.pki, f.transit)
		noProblem(t, root, keys, f.client)
		if err := errors.Join(sign(key), certify(t, root)); err != nil {
			t.Errorf("after the policy came back: %v", err)
		}
	})
}

func TestAMountThatIsGoneIsNoMissingKey(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		root, keys := f.root(t, plugin.RootOptions{Mount: f.mountRoot(t)}), f.keys(t, plugin.KeyStoreOptions{Mount: f.mountTransit(t)})
		ref, key := create(t, keys)
		f.Delete(t, "sys/mounts/"+f.transit)
		f.Delete(t, "sys/mounts/"+f.pki)
		f.failsWith(t, sign(key), "nothing is mounted there")
		f.failsWith(t, certify(t, root), "nothing is mounted there")
		_, err := keys.Open(t.Context(), ref)
		f.failsWith(t, err, "nothing is mounted there")
		deletion := keys.Delete(t.Context(), ref)
		f.failsWith(t, deletion, "nothing is mounted there")
		if errors.Is(err, fs.ErrNotExist) || errors.Is(deletion, fs.ErrNotExist) {
			t.Errorf("a mount that is gone looks like a key that is: %v, %v", err, deletion)
		}
		problem(t, root, "nothing is mounted there")
		problem(t, keys, "nothing is mounted there")
		f.mountPKI(t, f.pki)
		f.generateRoot(t, f.pki, "another root", 1)
		f.Write(t, "sys/mounts/"+f.transit, map[string]any{"type": "transit"})
		noProblem(t, root)
		if err := certify(t, root); err != nil {
			t.Errorf("after the mount came back: %v", err)
		}
		problem(t, keys, "holds no key "+nameOf(ref)) // the engine is new, and empty
		if _, err := keys.Open(t.Context(), ref); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("opening a key that is gone: %v", err)
		}
		f.failsWith(t, sign(key), "holds no key "+nameOf(ref))
		if err := keys.Delete(t.Context(), ref); err != nil {
			t.Errorf("deleting a key that is gone: %v", err)
		}
		noProblem(t, keys)
	})
}

func TestARotationInVaultIsSaidAndSigningGoesOn(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		keys := f.keys(t, plugin.KeyStoreOptions{Mount: f.mountTransit(t)})
		ref, key := create(t, keys)
		f.Write(t, f.transit+"/keys/"+nameOf(ref)+"/rotate", nil)
		problem(t, keys, "was rotated in Vault, to the version 2")
		process.Eventually(t, "a line in the log", func() error {
			if !strings.Contains(f.log.String(), "was rotated in Vault, to the version 2") {
				return errors.New("there is none")
			}
			return nil
		})
		if err := sign(key); err != nil {
			t.Errorf("signing after a rotation: %v", err)
		}
		opened, err := keys.Open(t.Context(), ref)
		if err != nil || !opened.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(key.Public()) {
			t.Errorf("opening after a rotation gives another key, or none: %v", err)
		}
		if err := keys.Delete(t.Context(), ref); err != nil {
			t.Errorf("Delete: %v", err)
		}
		noProblem(t, keys)
	})
}

func TestARaisedMinimumVersionIsSaidAndMends(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		keys := f.keys(t, plugin.KeyStoreOptions{Mount: f.mountTransit(t)})
		ref, key := create(t, keys)
		config := f.transit + "/keys/" + nameOf(ref) + "/config"
		f.Write(t, f.transit+"/keys/"+nameOf(ref)+"/rotate", nil)
		for _, raise := range []struct{ minimum, reset map[string]any }{
			{map[string]any{"min_encryption_version": 2}, map[string]any{"min_encryption_version": 1}},
			{map[string]any{"min_encryption_version": 2, "min_decryption_version": 2}, map[string]any{"min_encryption_version": 0, "min_decryption_version": 1}},
		} {
			f.Write(t, config, raise.minimum)
			for name := range raise.minimum {
				if len(raise.minimum) == 2 && name == "min_encryption_version" { // the other is said first
					continue
				}
				says := "the " + name + " of the key " + nameOf(ref) + " was raised to 2"
				f.failsWith(t, sign(key), says, "set it back with 'vault write "+config)
				_, err := keys.Open(t.Context(), ref)
				f.failsWith(t, err, says)
				problem(t, keys, says)
			}
			f.Write(t, config, raise.reset)
			if err := sign(key); err != nil {
				t.Errorf("signing after the minimum was set back: %v", err)
			}
		}
	})
}

func TestKeysCannotBeReadOutOfVault(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		keys := f.keys(t, plugin.KeyStoreOptions{Mount: f.mountTransit(t)})
		ref, key := create(t, keys)
		for _, path := range []string{"/export/signing-key/" + nameOf(ref), "/backup/" + nameOf(ref)} {
			if text, refused := f.Refuses(t, "GET", f.transit+path); !refused {
				t.Errorf("%s gives out the key: %.40s", path, text)
			}
		}
		f.Write(t, f.transit+"/keys/"+nameOf(ref)+"/config", map[string]any{"exportable": true})
		problem(t, keys, "may be read out of Vault")
		_, err := keys.Open(t.Context(), ref)
		f.failsWith(t, err, "may be read out of Vault", "delete it")
		if err := sign(key); err != nil {
			t.Errorf("a mesh stands still because somebody made its key exportable: %v", err)
		}
	})
}

func TestAChangedRootIsSeen(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		root := f.root(t, plugin.RootOptions{Mount: f.mountRoot(t)})
		before, err := root.Roots(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		made := f.Write(t, f.pki+"/root/rotate/internal", map[string]any{"common_name": "the next root", "key_type": "ec", "key_bits": 256, "ttl": "9000h", "max_path_length": 1})
		if again, err := root.Roots(t.Context()); err != nil || !again[0].Equal(before[0]) {
			t.Errorf("a root that is not the default yet is taken for it: %v", err)
		}
		f.Write(t, f.pki+"/config/issuers", map[string]any{"default": made["issuer_id"]})
		select {
		case <-root.Changed():
		case <-time.After(process.Patience):
			t.Fatal("the change was not seen")
		}
		after, err := root.Roots(t.Context())
		if err != nil || after[0].Equal(before[0]) || after[0].Subject.CommonName != "the next root" {
			t.Errorf("after the change the root is %v, %v", after, err)
		}
		chain, err := root.Certify(t.Context(), newRequest(t))
		if err != nil || chain[0].CheckSignatureFrom(after[0]) != nil {
			t.Errorf("an issuing CA under the new root: %v", err)
		}
		// An issuer that is named stays the same, whatever the mount's default is.
		id, _ := made["issuer_id"].(string)
		f.Write(t, "sys/policies/acl/kedge", map[string]any{"policy": fmt.Sprintf(`path "%[1]s/issuer/%[2]s" { capabilities = ["read"] }
			path "%[1]s/issuer/%[2]s/sign-intermediate" { capabilities = ["update"] }`, f.pki, id)})
		named := f.root(t, plugin.RootOptions{Mount: f.pki, Issuer: id})
		process.Eventually(t, "an issuer by its id to certify", func() error { return certify(t, named) })
		f.Delete(t, f.pki+"/issuer/"+id)
		if err := certify(t, named); err == nil {
			t.Error("an issuer that is deleted certifies")
		} else {
			f.holdsNoSecret(t, err.Error())
		}
	})
}

func TestARootThatCannotCertifyIsSaid(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		mount := f.mountRoot(t)
		f.generateRoot(t, mount, "a root for leaves only", 0)
		issuers := f.Read(t, mount+"/config/issuers")
		made := f.Write(t, mount+"/root/rotate/internal", map[string]any{"common_name": "a root for leaves only", "key_type": "ec", "key_bits": 256, "ttl": "9000h", "max_path_length": 0})
		f.Write(t, mount+"/config/issuers", map[string]any{"default": made["issuer_id"]})
		root := f.root(t, plugin.RootOptions{Mount: mount})
		f.failsWith(t, certify(t, root), "path length constraint 0")
		problem(t, root, "path length constraint 0")
		f.Write(t, mount+"/config/issuers", map[string]any{"default": issuers["default"]})
		noProblem(t, root)
		f.Write(t, fmt.Sprintf("%s/issuer/%s", mount, issuers["default"]), map[string]any{"usage": "read-only", "leaf_not_after_behavior": "err"})
		f.failsWith(t, certify(t, root), "may not issue certificates")

		// An intermediate whose root is not in the mount.
		intermediate := f.mountIntermediate(t)
		orphan := f.pki + "-orphan"
		f.mountPKI(t, orphan)
		csr := f.Write(t, orphan+"/intermediate/generate/internal", map[string]any{"common_name": "orphan", "key_type": "ec", "key_bits": 256})["csr"]
		signed := f.Write(t, intermediate+"-above/root/sign-intermediate", map[string]any{"csr": csr, "common_name": "orphan", "ttl": "8000h", "max_path_length": 1})
		f.Write(t, orphan+"/intermediate/set-signed", map[string]any{"certificate": signed["certificate"]})
		f.writePolicy(t, orphan, f.transit)
		f.failsWith(t, certify(t, f.root(t, plugin.RootOptions{Mount: orphan})), "does not lead to a self-signed root", "vault write "+orphan+"/issuers/import/cert")
	})
}

func TestATLSCertificateThatIsNotTrustedIsSaid(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		o := f.options()
		o.CAFile = filepath.Join(t.TempDir(), "ca.pem")
		other, _ := vault.Certificate(t, caTemplate("another CA"), nil, nil)
		process.Write(t, o.CAFile, vault.PEM("CERTIFICATE", other.Raw))
		client := f.open(t, o)
		problem(t, client, "its certificate is not trusted under "+o.CAFile)
		process.Write(t, o.CAFile, read(t, f.CAFile))
		noProblem(t, client)

		o = f.options()
		o.ServerName = "vault.example.org"
		problem(t, f.open(t, o), "name the server as its certificate does")
	})
}
