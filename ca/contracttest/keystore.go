package contracttest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"testing"

	"kedge/ca"
)

// AllKeySpecs are the kinds of keys that a store without limits makes.
var AllKeySpecs = []ca.KeySpec{ca.P256, ca.P384, ca.RSA2048, ca.RSA3072, ca.RSA4096}

// KeyStore tests that what make returns keeps the promises of ca.KeyStore. make gives an empty store; reopen gives the same
// one as it is after the process was started anew, or is nil for a store that keeps nothing; faults are what can happen to what it depends on, by name, or nil when that is nothing outside
// of the process. specs are the kinds of keys that the store can make, at least one; every other kind must be refused.
func KeyStore(t *testing.T, make func(t *testing.T) ca.KeyStore, reopen func(t *testing.T, store ca.KeyStore) ca.KeyStore, faults map[string]func(store ca.KeyStore) Fault, specs ...ca.KeySpec) {
	if len(specs) == 0 {
		t.Fatal("name the kinds of keys that the store can make")
	}
	t.Run("every kind of key is what was asked for, signs, and is found again", func(t *testing.T) {
		store := make(t)
		for _, spec := range specs {
			t.Run(string(spec), func(t *testing.T) {
				ref, key := create(t, store, spec)
				if got := ca.SpecOf(key.Public()); got != spec {
					t.Errorf("Create made a %s key", got)
				}
				checkSigns(t, key, key.Public())
				checkSigns(t, open(t, store, ref), key.Public())
			})
		}
	})
	t.Run("an unknown kind of key is refused", func(t *testing.T) {
		store := make(t)
		refused := []ca.KeySpec{"", "P-224", "RSA-1024", "p-256", "Ed25519"}
		for _, spec := range AllKeySpecs {
			if !slices.Contains(specs, spec) {
				refused = append(refused, spec)
			}
		}
		for _, spec := range refused {
			if ref, _, err := store.Create(t.Context(), spec); err == nil {
				t.Errorf("Create made a key %q of the kind %q", ref, spec)
			}
		}
	})
	if reopen != nil {
		t.Run("keys are there after a restart", func(t *testing.T) {
			store := make(t)
			kept, key := create(t, store, specs[0])
			gone, _ := create(t, store, specs[0])
			if err := store.Delete(t.Context(), gone); err != nil {
				t.Fatalf("Delete: %v", err)
			}
			store = reopen(t, store)
			checkSigns(t, open(t, store, kept), key.Public())
			if _, err := store.Open(t.Context(), gone); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("opening a key that was deleted before the restart: %v", err)
			}
		})
	}
	t.Run("a deleted key is gone, and deleting it again is fine", func(t *testing.T) {
		store := make(t)
		ref, _ := create(t, store, specs[0])
		other, key := create(t, store, specs[0])
		for range 2 {
			if err := store.Delete(t.Context(), ref); err != nil {
				t.Fatalf("Delete: %v", err)
			}
			if _, err := store.Open(t.Context(), ref); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Open of a deleted key: %v, which does not wrap fs.ErrNotExist", err)
			}
		}
		checkSigns(t, open(t, store, other), key.Public())
	})
	t.Run("a key's name is its own, is printable, and is no secret", func(t *testing.T) {
		store := make(t)
		first, key := create(t, store, specs[0])
		second, _ := create(t, store, specs[0])
		if first == second {
			t.Errorf("two keys have the name %q", first)
		}
		if first == "" || len(first) > 512 || strings.ContainsFunc(first, func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Errorf("the name %q is not a short printable line: it stands in the ledger and in logs", first)
		}
		if der, err := x509.MarshalPKCS8PrivateKey(key); err == nil { // a key in this process
			defer clear(der)
			text := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
			if strings.Contains(first, strings.Split(text, "\n")[2]) {
				t.Error("the name holds the key")
			}
		}
	})
	t.Run("hostile names are refused", func(t *testing.T) {
		store := make(t)
		ref, key := create(t, store, specs[0])
		for _, hostile := range []string{"", ".", "..", "/", "../" + ref, "x/../" + ref, "./" + ref, "/etc/passwd", ref + "\x00", "\x00", ref + "/",
			ref + "\n", " " + ref, "~/key", "*", "..\\" + ref, strings.Repeat("a", 1<<16)} {
			if _, err := store.Open(t.Context(), hostile); err == nil {
				t.Errorf("Open(%.80q) gave a key", hostile)
			}
			if err := store.Delete(t.Context(), hostile); err == nil {
				t.Errorf("Delete(%.80q) did not refuse", hostile)
			}
		}
		checkSigns(t, open(t, store, ref), key.Public())
	})
	t.Run("it serves several callers at once", func(t *testing.T) {
		store := make(t)
		shared, key := create(t, store, specs[0])
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				own, made, err := store.Create(t.Context(), specs[0])
				if err != nil {
					t.Errorf("Create: %v", err)
					return
				}
				for ref, pub := range map[string]crypto.PublicKey{own: made.Public(), shared: key.Public()} {
					opened, err := store.Open(t.Context(), ref)
					if err != nil {
						t.Errorf("Open: %v", err)
						continue
					}
					checkSigns(t, opened, pub)
				}
				if err := store.Delete(t.Context(), own); err != nil {
					t.Errorf("Delete: %v", err)
				}
			})
		}
		all.Wait()
		checkSigns(t, open(t, store, shared), key.Public())
	})
	for name, fault := range faults {
		t.Run("with "+name+" it says so, and loses nothing", func(t *testing.T) {
			store := make(t)
			keysWithout(t, store, fault(store), specs[0])
		})
	}
	t.Run("a cancelled context ends it with that error", func(t *testing.T) {
		store := make(t)
		ref, key := create(t, store, specs[0])
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := store.Create(ctx, specs[0]); !errors.Is(err, context.Canceled) {
			t.Errorf("Create with a cancelled context: %v", err)
		}
		if _, err := store.Open(ctx, ref); !errors.Is(err, context.Canceled) {
			t.Errorf("Open with a cancelled context: %v", err)
		}
		if err := store.Delete(ctx, ref); !errors.Is(err, context.Canceled) {
			t.Errorf("Delete with a cancelled context: %v", err)
		}
		checkSigns(t, open(t, store, ref), key.Public())
	})
}

func create(t *testing.T, store ca.KeyStore, spec ca.KeySpec) (string, crypto.Signer) {
	t.Helper()
	ref, key, err := store.Create(t.Context(), spec)
	if err != nil {
		t.Fatalf("Create(%s): %v", spec, err)
	}
	return ref, key
}

func open(t *testing.T, store ca.KeyStore, ref string) crypto.Signer {
	t.Helper()
	key, err := store.Open(t.Context(), ref)
	if err != nil {
		t.Fatalf("Open(%q): %v", ref, err)
	}
	return key
}

// checkSigns makes sure that key signs so that pub verifies it. It may be called from any goroutine.
func checkSigns(t *testing.T, key crypto.Signer, pub crypto.PublicKey) {
	t.Helper()
	if !ca.SameKey(key.Public(), pub) {
		t.Error("the key is another one")
	}
	digest := sha256.Sum256([]byte("a certificate"))
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Errorf("Sign: %v", err)
		return
	}
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if !ecdsa.VerifyASN1(pub, digest[:], signature) {
			t.Error("the signature is wrong")
		}
	case *rsa.PublicKey:
		if err := rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], signature); err != nil {
			t.Errorf("the signature is wrong: %v", err)
		}
	default:
		t.Errorf("the public key is a %T", pub)
	}
}
