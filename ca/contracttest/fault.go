package contracttest

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/ca"
	"kedge/test/process"
)

// Fault is how a suite takes away what an implementation depends on, such as a folder, a server or a token, and gives it back as it was.
type Fault struct {
	Away, Back func(t *testing.T)
	Says       string // what an error names meanwhile
	Holds      bool   // a Root holds all that it needs: it goes on, and only its Problem says that something is away
	Hangs      bool   // it answers nothing: calls end with their contexts, and Problem says so only after limits that are longer than a test should take
}

// awayLimit is the deadline of a call while something is away: what waits for it until then has waited long enough.
const awayLimit = time.Second

// take takes it away. It is back when the test calls back, or else when it ends.
func (f Fault) take(t *testing.T) (back func()) {
	t.Helper()
	if f.Says == "" {
		t.Fatal("name what an error has to name")
	}
	f.Away(t)
	back = sync.OnceFunc(func() { f.Back(t) })
	t.Cleanup(back)
	return back
}

// fails makes sure that a call fails before its deadline, and says what is away.
func (f Fault) fails(t *testing.T, what string, call func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), awayLimit)
	defer cancel()
	switch err := call(ctx); {
	case err == nil:
		t.Errorf("%s works though something is away", what)
	case !strings.Contains(err.Error(), f.Says):
		t.Errorf("%s does not say %q: %v", what, f.Says, err)
	case errors.Is(err, fs.ErrNotExist):
		t.Errorf("%s says that a key is not there, and it is only away: %v", what, err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if err := call(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("%s with a cancelled context: %v", what, err)
	}
}

// saysSo waits until a Reporter says what is away, or that all is well.
func (f Fault) saysSo(t *testing.T, of any, away bool) {
	t.Helper()
	reporter, ok := of.(ca.Reporter)
	if !ok || away && f.Hangs {
		return
	}
	process.Eventually(t, fmt.Sprintf("Problem to say %q: %t", f.Says, away), func() error {
		problem := reporter.Problem()
		if away && problem != nil && strings.Contains(problem.Error(), f.Says) || !away && problem == nil {
			return nil
		}
		return fmt.Errorf("it says %w", problem)
	})
}

// without takes it away from something that holds all that it needs: that goes on, and only its Problem says so.
func (f Fault) without(t *testing.T, of any, goesOn func()) {
	t.Helper()
	back := f.take(t)
	goesOn()
	f.saysSo(t, of, true)
	goesOn()
	back()
	f.saysSo(t, of, false)
	goesOn()
}

// rootWithout holds a root to what it promises while something is away, and after that.
func rootWithout(t *testing.T, root ca.Root, f Fault) {
	before, key := roots(t, root), newKey(t)
	works := func() {
		checkChain(t, root, certify(t, root, request(t, key)), key.Public())
		if !sameCertificates(roots(t, root), before) {
			t.Error("its roots are others than before")
		}
	}
	works()
	if f.Holds {
		f.without(t, root, works)
		return
	}
	back := f.take(t)
	f.fails(t, "Certify", func(ctx context.Context) error {
		_, err := root.Certify(ctx, request(t, key))
		return err
	})
	ctx, cancel := context.WithTimeout(t.Context(), awayLimit)
	defer cancel()
	if held, err := root.Roots(ctx); err == nil && !sameCertificates(held, before) || err != nil && !strings.Contains(err.Error(), f.Says) {
		t.Errorf("Roots gives %d certificates, and no error that says %q: %v", len(held), f.Says, err)
	}
	f.saysSo(t, root, true)
	back()
	process.Eventually(t, "Certify to work again", func() error {
		_, err := root.Certify(t.Context(), request(t, key))
		return err
	})
	works()
	f.saysSo(t, root, false)
}

// keysWithout does so with a key store: nothing that it held is lost.
func keysWithout(t *testing.T, store ca.KeyStore, f Fault, spec ca.KeySpec) {
	ref, key := create(t, store, spec)
	given, _ := create(t, store, spec) // to be deleted: what hangs may do so once it goes on
	checkSigns(t, key, key.Public())
	back := f.take(t)
	signed := make(chan error, 1)
	go func() { // it may wait until its key is back
		digest := sha256.Sum256([]byte("a certificate"))
		_, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
		signed <- err
	}()
	f.fails(t, "Open", func(ctx context.Context) error {
		_, err := store.Open(ctx, ref)
		return err
	})
	f.fails(t, "Delete", func(ctx context.Context) error { return store.Delete(ctx, given) })
	f.fails(t, "Create", func(ctx context.Context) error {
		_, _, err := store.Create(ctx, spec)
		return err
	})
	f.saysSo(t, store, true)
	back()
	if err := <-signed; err != nil && !strings.Contains(err.Error(), f.Says) {
		t.Errorf("Sign does not say %q: %v", f.Says, err)
	}
	process.Eventually(t, "Open to find the key again", func() error {
		again, err := store.Open(t.Context(), ref)
		if err == nil && !ca.SameKey(again.Public(), key.Public()) {
			t.Fatal("Open found another key")
		}
		return err
	})
	checkSigns(t, key, key.Public()) // the one that was open all the time
	checkSigns(t, open(t, store, ref), key.Public())
	made, _ := create(t, store, spec)
	for _, ref := range []string{given, made} {
		if err := store.Delete(t.Context(), ref); err != nil {
			t.Errorf("Delete: %v", err)
		}
	}
	f.saysSo(t, store, false)
}
