package hsm_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/hsm"
	"kedge/test/hsmparts"
)

// eventually asks until there is no error.
func eventually(t *testing.T, ask func() error) {
	t.Helper()
	limit := time.After(time.Minute)
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-limit:
			t.Fatal(err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// TestWhatFailsUnderASignatureIsNeverTakenForItsOwnFault holds the codes of the modules against the table of docs/hsm.md: whatever code a lost session, login or module gives, a new generation is made.
func TestWhatFailsUnderASignatureIsNeverTakenForItsOwnFault(t *testing.T) {
	codes := map[string]map[string]uint{
		"the session was closed":           {"SoftHSM": 0xB3, "NSS": 0xB3, "TPM": 0xB3, "opencryptoki": 0xB3},
		"the login was lost":               {"SoftHSM": 0x82, "NSS": 0x2, "TPM": 0x101, "opencryptoki": 0x60},
		"the login was lost and made anew": {"SoftHSM": 0x82, "NSS": 0, "TPM": 0, "opencryptoki": 0x60}, // 0: the handle of the key is what it was
		"it was finalised":                 {"SoftHSM": 0x190, "NSS": 0xB3, "TPM": 0x190, "opencryptoki": 0x190},
	}
	each(t, func(t *testing.T, p *hsmparts.Part) {
		token := open(t, p, nil)
		generate(t, token, p.Specs[0], "kedge")
		token.Close()
		for fault, spoil := range map[string]func(*hsm.Module) error{
			"the session was closed": (*hsm.Module).CloseSessions, "the login was lost": (*hsm.Module).NewSession, "it was finalised": (*hsm.Module).Finalize,
			"the login was lost and made anew": (*hsm.Module).LoginAgain,
		} {
			ofRequest, code, again, err := hsm.InProcess(p.Options(), "kedge", spoil)
			if err != nil {
				t.Errorf("%s: %v", fault, err)
				continue
			}
			if ofRequest {
				t.Errorf("%s: the code %#x is taken for the request's own fault", fault, code)
			}
			if want := codes[fault][p.Name]; code != want {
				t.Errorf("%s: the code is %#x, and the table says %#x", fault, code, want)
			}
			if fault == "the login was lost and made anew" && again != nil {
				t.Errorf("%s: with the key found again: %v", fault, again)
			}
		}
	})
}

// load signs with several goroutines until it is stopped, and counts. Every signature must come, however late, and be good.
type load struct {
	stop    context.CancelFunc
	running sync.WaitGroup
	signed  [16]atomic.Int64 // by goroutine
	failed  atomic.Pointer[error]
}

func startLoad(t *testing.T, s *hsm.Signer) *load {
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{stop: cancel}
	for i := range l.signed {
		l.running.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				digest := sha256.Sum256(fmt.Append(nil, i, n))
				signature, err := s.SignContext(t.Context(), digest[:], crypto.SHA256)
				if err == nil {
					err = goodAs(s, crypto.SHA256, digest[:], signature)
				}
				if err != nil {
					l.failed.Store(&err)
					return
				}
				l.signed[i].Add(1)
			}
		})
	}
	t.Cleanup(func() { l.end(t) })
	return l
}

// round waits until each goroutine has begun and ended a signature: what went wrong before is none of its next one's.
func (l *load) round(t *testing.T) {
	t.Helper()
	var before [len(l.signed)]int64
	for i := range l.signed {
		before[i] = l.signed[i].Load()
	}
	eventually(t, func() error {
		if err := l.failed.Load(); err != nil {
			t.Fatalf("a signature failed: %v", *err)
		}
		for i := range l.signed {
			if n := l.signed[i].Load() - before[i]; n < 2 {
				return fmt.Errorf("goroutine %d has made %d signatures", i, n)
			}
		}
		return nil
	})
}

// replaced sends the child a signal, and waits until another one is in its place.
func (l *load) replaced(t *testing.T, token *hsm.Token, which syscall.Signal) {
	t.Helper()
	before := token.Restarts()
	kill(t, token, which)
	eventually(t, func() error {
		if token.Restarts() == before {
			return fmt.Errorf("after %s there is no new child", which)
		}
		return nil
	})
}

func (l *load) end(t *testing.T) {
	t.Helper()
	l.stop()
	l.running.Wait()
	if err := l.failed.Load(); err != nil {
		t.Errorf("a signature failed: %v", *err)
	}
}

func TestAChildThatIsKilledOrStoppedIsReplacedAndNoSignatureIsLost(t *testing.T) {
	each(t, func(t *testing.T, p *hsmparts.Part) {
		token := open(t, p, func(o *hsm.Options) { o.Deadline = 2 * time.Second })
		signer, _ := generate(t, token, p.Specs[0], "kedge")
		l := startLoad(t, signer)
		for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGKILL, syscall.SIGSEGV, syscall.SIGSTOP} {
			l.round(t)
			l.replaced(t, token, signal)
		}
		l.round(t)
		l.end(t)
		if err := token.Problem(); err != nil {
			t.Errorf("there still is a problem: %v", err)
		}
	})
}

func TestATPMThatDiesOrStandsStillIsWaitedForAndUsedAgain(t *testing.T) {
	p := hsmparts.NewTPM(t)
	token := open(t, p, func(o *hsm.Options) { o.Deadline = 2 * time.Second })
	signer, _ := generate(t, token, hsm.P256, "kedge")
	signs(t, signer)

	p.TPM.Signal(t, syscall.SIGSTOP)
	digest := sha256.Sum256(nil)
	short, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := signer.SignContext(short, digest[:], crypto.SHA256); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("while the TPM stands still: %v", err)
	}
	p.TPM.Signal(t, syscall.SIGCONT)
	eventually(t, func() error { return sign(signer) })

	p.TPM.Kill()
	if _, err := signer.Sign(nil, digest[:], crypto.SHA256); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("while the TPM is gone: %v", err)
	}
	if token.Problem() == nil {
		t.Error("there is no problem")
	}
	p.TPM.Start(t)
	eventually(t, func() error { return sign(signer) })
	if err := token.Problem(); err != nil {
		t.Errorf("there still is a problem: %v", err)
	}
}

// TestChildrenThatEndSoonFollowEachOtherEverMoreSlowly, since each logs in.
func TestChildrenThatEndSoonFollowEachOtherEverMoreSlowly(t *testing.T) {
	lasted := make([]time.Duration, 12)
	lasted[10] = time.Hour
	waits, pauses := hsm.Pauses(lasted)
	for n := range lasted {
		low, high := 180*time.Millisecond, 220*time.Millisecond
		if n > 0 && n != 10 {
			low, high = min(9*time.Second, pauses[n-1]*18/10), min(11*time.Second, pauses[n-1]*22/10)
			if waits[n] < pauses[n-1] {
				t.Errorf("child %d is replaced after %s, and not after %s", n, waits[n], pauses[n-1])
			}
		}
		if pauses[n] < low || pauses[n] > high {
			t.Errorf("after child %d the pause is %s, and not between %s and %s", n, pauses[n], low, high)
		}
	}
}

// TestChildrenThatAreKilledLockNoTPM: to a TPM a client that dies after its login is no wrong PIN.
func TestChildrenThatAreKilledLockNoTPM(t *testing.T) {
	p := hsmparts.StrictTPM(t)
	token := open(t, p, nil)
	signer, _ := generate(t, token, hsm.P256, "kedge")
	for range hsmparts.TPMLimit + 2 {
		signs(t, signer)
		kill(t, token, syscall.SIGKILL)
	}
	signs(t, signer)
	if n := p.TPM.WrongPINs(t); n != 0 {
		t.Errorf("the TPM has counted %d wrong PINs", n)
	}
}

// TestATPMThatLosesItsPowerTooOftenLocksItselfAndIsUnlocked: to a TPM the loss of its power after a login is a wrong PIN, whatever a client does.
func TestATPMThatLosesItsPowerTooOftenLocksItselfAndIsUnlocked(t *testing.T) {
	p := hsmparts.StrictTPM(t)
	token := open(t, p, nil)
	signer, _ := generate(t, token, hsm.P256, "kedge")
	for lost := 1; lost <= hsmparts.TPMLimit; lost++ {
		eventually(t, func() error { return sign(signer) })
		p.TPM.Kill()
		p.TPM.Start(t)
		if n := p.TPM.WrongPINs(t); n != lost {
			t.Fatalf("after %d losses of power the TPM has counted %d wrong PINs", lost, n)
		}
	}
	says := func(want string) {
		t.Helper()
		eventually(t, func() error {
			err := sign(signer)
			if err == nil {
				t.Fatal("a TPM that is locked signs")
			}
			if !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), want) {
				return err
			}
			return nil
		})
	}
	says("or with tpm2_dictionarylockout --clear-lockout), and then write the right PIN into it")
	says("so it is not tried again: unlock the token and then write the right PIN into it")
	p.TPM.Unlock(t)
	rewrite(t, p.URI.PINSource.File, hsmparts.PIN)
	eventually(t, func() error { return sign(signer) })
	if err := token.Problem(); err != nil {
		t.Errorf("there still is a problem: %v", err)
	}
}

func TestATokenWhoseFilesGoAwayAndComeBackIsUsedAgain(t *testing.T) {
	for what, ask := range map[string]func(*hsm.Token, *hsm.Signer) error{
		"a signature": func(_ *hsm.Token, s *hsm.Signer) error { return sign(s) },
		"a search": func(token *hsm.Token, s *hsm.Signer) error {
			_, _, err := token.Find(t.Context(), s.Public())
			return err
		},
		"a list":     func(token *hsm.Token, _ *hsm.Signer) error { _, err := token.Keys(t.Context()); return err },
		"a deletion": func(token *hsm.Token, _ *hsm.Signer) error { return token.Delete(t.Context(), []byte("another")) },
	} {
		t.Run(what, func(t *testing.T) {
			p := hsmparts.SoftHSM(t)
			token := open(t, p, nil)
			signer, _ := generate(t, token, hsm.P256, "kedge")
			back := p.Away(t)
			if err := ask(token, signer); !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("while they are away: %v", err)
			}
			if token.Problem() == nil {
				t.Error("there is no problem")
			}
			back()
			eventually(t, func() error { return ask(token, signer) })
			signs(t, signer)
		})
	}
}

// TestATokenWhoseFilesAreAwayWhenItsModuleStartsIsWaitedFor: modules that keep their files open notice only then. An empty folder is what an unmounted disk leaves behind: no module makes a
// new token in it that refuses the PIN.
func TestATokenWhoseFilesAreAwayWhenItsModuleStartsIsWaitedFor(t *testing.T) {
	for _, name := range []string{"NSS", "opencryptoki"} { // SoftHSM notices at once: see above
		for _, left := range []string{"nothing", "an empty folder"} {
			t.Run(name+", "+left, func(t *testing.T) {
				p := hsmparts.All()[name](t)
				token := open(t, p, nil)
				signer, _ := generate(t, token, p.Specs[0], "kedge")
				back := p.Away(t)
				if left != "nothing" {
					if err := os.Mkdir(p.Files, 0o770); err != nil {
						t.Fatal(err)
					}
				}
				if err := sign(signer); err != nil {
					t.Errorf("while they are away: %v", err)
				}
				kill(t, token, syscall.SIGKILL)
				eventually(t, func() error {
					if err := sign(signer); !errors.Is(err, hsm.ErrUnavailable) || token.Problem() == nil {
						return fmt.Errorf("a child that starts while they are away: %w; the problem is %w", err, token.Problem())
					}
					return nil
				})
				back()
				eventually(t, func() error { return sign(signer) })
				if err := token.Problem(); err != nil {
					t.Errorf("there still is a problem: %v", err)
				}
			})
		}
	}
}

func TestATokenThatNobodyAsksIsKnownToBeAway(t *testing.T) {
	t.Run("SoftHSM", func(t *testing.T) {
		p := hsmparts.SoftHSM(t)
		token := open(t, p, nil)
		looks := func(token *hsm.Token, away bool) {
			t.Helper()
			if token.Look(); (token.Problem() != nil) != away {
				t.Errorf("away: %v, and the problem is %v", away, token.Problem())
			}
		}
		looks(token, false)
		back := p.Away(t)
		looks(token, true)
		other := open(t, p, nil) // another run of the program
		looks(other, true)
		back()
		looks(token, false)
		looks(other, false)
	})
	t.Run("TPM", func(t *testing.T) {
		p := hsmparts.NewTPM(t)
		token := open(t, p, nil)
		signer, _ := generate(t, token, hsm.P256, "kedge")
		token.Look()
		if n := token.Restarts(); n != 1 || token.Problem() != nil {
			t.Errorf("while it is there: %d children were started, the problem is %v", n, token.Problem())
		}
		p.TPM.Kill()
		token.Look()
		if token.Problem() == nil {
			t.Error("there is no problem")
		}
		p.TPM.Start(t)
		eventually(t, func() error { token.Look(); return token.Problem() })
		signs(t, signer)
	})
}

func TestADaemonThatAModuleNeedsIsWaitedForAndUsedAgain(t *testing.T) {
	p := hsmparts.Opencryptoki(t)
	token := open(t, p, nil)
	signer, _ := generate(t, token, p.Specs[0], "kedge")
	signs(t, signer)
	p.KillSlotDaemon(t)
	kill(t, token, syscall.SIGKILL)
	eventually(t, func() error {
		if err := sign(signer); !errors.Is(err, hsm.ErrUnavailable) || token.Problem() == nil {
			return fmt.Errorf("without its daemon: %w; the problem is %w", err, token.Problem())
		}
		return nil
	})
	p.StartSlotDaemon(t)
	eventually(t, func() error { return sign(signer) })
	l := startLoad(t, signer)
	l.round(t)
	p.KillSlotDaemon(t)
	p.StartSlotDaemon(t)
	l.round(t)
	l.end(t)
	if err := token.Problem(); err != nil {
		t.Errorf("there still is a problem: %v", err)
	}
}

// kill sends the child a signal.
func kill(t *testing.T, token *hsm.Token, which syscall.Signal) {
	t.Helper()
	pid := token.ChildPID()
	if pid == 0 { // to the kernel that is this program and all that it started
		t.Fatal("there is no child")
	}
	if err := syscall.Kill(pid, which); err != nil {
		t.Fatal(err)
	}
}

func TestAWrongPINIsTriedOnceAndNotAgainUntilItsFileChanges(t *testing.T) {
	for name, make := range map[string]func(testing.TB) *hsmparts.Part{"SoftHSM": hsmparts.SoftHSM, "NSS": hsmparts.NSS, "TPM": hsmparts.StrictTPM} {
		t.Run(name, func(t *testing.T) {
			p := make(t)
			first := open(t, p, nil)
			generate(t, first, hsm.P256, "kedge")
			first.Close()
			pin := p.URI.PINSource.File
			wrong := "654321"
			rewrite(t, pin, wrong)
			var log bytes.Buffer
			locked := func(o *hsm.Options) {
				o.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
			}
			token := open(t, p, locked)
			for range 3 {
				if _, err := token.Keys(t.Context()); !errors.Is(err, hsm.ErrWrongPIN) || strings.Contains(err.Error(), wrong) {
					t.Fatalf("with a wrong PIN: %v", err)
				}
			}
			token.Close()
			again := open(t, p, locked) // a restart
			if _, err := again.Keys(t.Context()); !errors.Is(err, hsm.ErrWrongPIN) || !strings.Contains(err.Error(), "write the right PIN into it") {
				t.Errorf("after a restart: %v", err)
			}
			if n := strings.Count(log.String(), "the token refused the PIN ("); n != 1 { // each try says so
				t.Errorf("the PIN was tried %d times:\n%s", n, log.String())
			}
			rewrite(t, pin, hsmparts.PIN)
			if _, err := again.Keys(t.Context()); err != nil {
				t.Errorf("with the right PIN: %v", err)
			}
			if text := log.String(); strings.Contains(text, wrong) || strings.Contains(text, hsmparts.PIN) {
				t.Errorf("a PIN is in the log:\n%s", text)
			}
		})
	}
}

// TestAWrongPINFromTheEnvironmentIsNotTriedAgainUntilSomebodySaysThatItIsRight: a variable does not tell whether it has changed.
func TestAWrongPINFromTheEnvironmentIsNotTriedAgainUntilSomebodySaysThatItIsRight(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	var log bytes.Buffer
	var said error
	try := func(pin string) {
		t.Helper()
		t.Setenv("KEDGE_TEST_PIN", pin)
		token := open(t, p, func(o *hsm.Options) {
			o.URI.PINSource, o.Logger = hsm.PINSource{Variable: "KEDGE_TEST_PIN"}, slog.New(slog.NewTextHandler(&log, nil))
		})
		_, said = token.Keys(t.Context())
		token.Close()
	}
	kept := func() []string {
		t.Helper()
		files, err := filepath.Glob(filepath.Join(p.Options().StateDir, "pin-*.json"))
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	try("654321")
	files := kept()
	if len(files) != 1 {
		t.Fatalf("%q are kept", files)
	}
	for _, pin := range []string{"654321", hsmparts.PIN} { // other runs of the program
		try(pin)
		if !errors.Is(said, hsm.ErrWrongPIN) || !strings.Contains(said.Error(), "set the right PIN and delete "+files[0]) {
			t.Errorf("after a restart: %v", said)
		}
	}
	if n := strings.Count(log.String(), "the token refused the PIN ("); n != 1 { // each try says so
		t.Errorf("the PIN was tried %d times:\n%s", n, log.String())
	}
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	if try(hsmparts.PIN); said != nil {
		t.Errorf("with the right PIN: %v", said)
	}
	text, err := os.ReadFile(files[0])
	if err != nil || strings.Contains(log.String()+string(text), "654321") || strings.Contains(log.String()+string(text), hsmparts.PIN) {
		t.Errorf("a PIN is in the log or in what is kept, or nothing is kept: %v\n%s\n%s", err, log.String(), text)
	}
}

func TestAWrongPINIsNotTriedAgainUnderAnotherNameOfTheToken(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	token := open(t, p, nil)
	info, err := token.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	token.Close()
	rewrite(t, p.URI.PINSource.File, "654321")
	var log bytes.Buffer
	logged := func(o *hsm.Options) {
		o.Logger = slog.New(slog.NewTextHandler(&log, nil))
	}
	for _, name := range []func(o *hsm.Options){logged, func(o *hsm.Options) {
		logged(o)
		o.URI.Token, o.URI.Serial = "", info.Serial
	}} {
		token := open(t, p, name)
		if _, err := token.Keys(t.Context()); !errors.Is(err, hsm.ErrWrongPIN) {
			t.Errorf("with a wrong PIN: %v", err)
		}
		token.Close()
	}
	if n := strings.Count(log.String(), "the token refused the PIN ("); n != 1 { // each try says so
		t.Errorf("the PIN was tried %d times:\n%s", n, log.String())
	}
}

// TestAPINThatTwoChildrenDiedOfIsNotTriedAgain: nobody knows whether the token counted it as a wrong one. One child may have died of something else, and a PIN that the
// token took before is none.
func TestAPINThatTwoChildrenDiedOfIsNotTriedAgain(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	unknown := open(t, p, func(o *hsm.Options) { o.StateDir = "" })
	info, err := unknown.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	said, err := json.Marshal(info)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(fakeInfo, string(said))
	dies := func() {
		t.Helper()
		t.Setenv(fakeChild, "dead in its login")
		token := open(t, p, nil)
		if _, err := token.Keys(t.Context()); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "the child that the module lives in ended") {
			t.Errorf("a child that dies in its login: %v", err)
		}
		token.Close()
		t.Setenv(fakeChild, "")
	}
	dies()
	dies()                   // it was tried again, after a restart
	after := open(t, p, nil) // another
	if _, err := after.Keys(t.Context()); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "did not come back from its first two logins") ||
		!strings.Contains(err.Error(), "write the right PIN into it") {
		t.Errorf("after a restart: %v", err)
	}
	rewrite(t, p.URI.PINSource.File, hsmparts.PIN)
	if _, err := after.Keys(t.Context()); err != nil {
		t.Errorf("with the PIN's file written anew: %v", err)
	}
	after.Close()
	dies()
	dies()
	again := open(t, p, nil)
	if _, err := again.Keys(t.Context()); err != nil {
		t.Errorf("with a PIN that the token took before: %v", err)
	}
}

func TestALoginThatCannotBeRememberedIsALoginAndIsRememberedLater(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	var log bytes.Buffer
	target := filepath.Join(p.Dir, "not there yet")
	state := filepath.Join(p.Dir, "state")
	if err := os.Symlink(target, state); err != nil {
		t.Fatal(err)
	}
	token := open(t, p, func(o *hsm.Options) { o.StateDir, o.Logger = state, slog.New(slog.NewTextHandler(&log, nil)) })
	signer, _ := generate(t, token, hsm.P256, "kedge")
	for range 2 {
		kill(t, token, syscall.SIGKILL)
		signs(t, signer)
		if err := os.MkdirAll(target, 0o700); err != nil { // for the second
			t.Fatal(err)
		}
	}
	token.Close()
	if !strings.Contains(log.String(), "how a login ended cannot be remembered") {
		t.Errorf("the log does not say so:\n%s", log.String())
	}
	if kept, err := filepath.Glob(filepath.Join(target, "pin-*.json")); err != nil || len(kept) != 1 {
		t.Errorf("later %q are kept, %v", kept, err)
	}
}

// TestWhatIsRememberedBelongsToWhomItsFolderBelongs, since an admin's 'kedge key' may run as root, and the CA does not.
func TestWhatIsRememberedBelongsToWhomItsFolderBelongs(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	data, owner := t.TempDir(), os.Getuid()
	if owner == 0 {
		owner = 65534
		if err := os.Chown(data, owner, owner); err != nil {
			t.Fatal(err)
		}
	}
	token := open(t, p, func(o *hsm.Options) { o.StateDir = filepath.Join(data, "hsm") })
	if _, err := token.Info(t.Context()); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(data, "hsm", "pin-*.json"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%q are kept, %v", files, err)
	}
	for _, path := range []string{filepath.Dir(files[0]), files[0]} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if is := int(info.Sys().(*syscall.Stat_t).Uid); is != owner {
			t.Errorf("%s belongs to %d and not to %d", path, is, owner)
		}
	}
}

// rewrite puts another file in the place of one.
func rewrite(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestAPINThatCannotBeReadIsAnErrorAndNeverAnEmptyPIN(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	pin := p.URI.PINSource.File
	for want, spoil := range map[string]func() error{
		"it is empty":           func() error { return os.WriteFile(pin, []byte("\n"), 0o600) },
		"no such file":          func() error { return os.Remove(pin) },
		"is not a plain file":   func() error { return errors.Join(os.Remove(pin), os.Mkdir(pin, 0o700)) },
		"more than one line":    func() error { return os.WriteFile(pin, []byte("123456\n123456\n"), 0o600) },
		"has more than 1024 oc": func() error { return os.WriteFile(pin, bytes.Repeat([]byte("1"), 2000), 0o600) },
	} {
		if err := os.RemoveAll(pin); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(pin, []byte(hsmparts.PIN), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		token := open(t, p, nil)
		if _, err := token.Keys(t.Context()); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
	}
}

func TestThePINMayComeFromTheEnvironmentAndStaysOutOfTheChilds(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	t.Setenv("KEDGE_TEST_PIN", hsmparts.PIN)
	t.Setenv("KEDGE_TEST_TOKEN", "another secret")
	token := open(t, p, func(o *hsm.Options) {
		o.URI.PINSource, o.Hide = hsm.PINSource{Variable: "KEDGE_TEST_PIN"}, []string{"KEDGE_TEST_TOKEN"}
	})
	if _, err := token.Keys(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"environ", "cmdline"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", token.ChildPID(), file))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(text, []byte(hsmparts.PIN)) || bytes.Contains(text, []byte("another secret")) {
			t.Errorf("a secret is in the child's %s", file)
		}
	}
	unset := open(t, p, func(o *hsm.Options) { o.URI.PINSource = hsm.PINSource{Variable: "KEDGE_TEST_NO_PIN"} })
	if _, err := unset.Keys(t.Context()); err == nil || !strings.Contains(err.Error(), "KEDGE_TEST_NO_PIN is not set") {
		t.Errorf("a variable that is not set: %v", err)
	}
}

func TestTheChildKeepsOutOfDumpsAndEndsWithItsParent(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	token := open(t, p, nil)
	if _, err := token.Keys(t.Context()); err != nil {
		t.Fatal(err)
	}
	pid := token.ChildPID()
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(limits)) {
		if fields := strings.Fields(line); strings.HasPrefix(line, "Max core file size") && fields[4] != "0" {
			t.Errorf("core dumps: %s", line)
		}
	}
	if dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || dumpable != 0 {
		t.Errorf("the parent, which calls the same function, is dumpable: %d, %v", dumpable, err)
	}
	if err := token.Close(); err != nil {
		t.Error(err)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the child is there after the end: %v", err)
	}
}

// fakeChild is the variable with which the test program is a child that misbehaves.
const fakeChild = "KEDGE_TEST_FAKE_CHILD"

// fakeFile is the variable with the file of a child that misbehaves.
const fakeFile = "KEDGE_TEST_FAKE_FILE"

// fakeInfo is the variable with what a child that misbehaves says of its token, in JSON.
const fakeInfo = "KEDGE_TEST_FAKE_INFO"

// misbehave is a child that does not keep to what was agreed, in one of several ways.
func misbehave(how string) int {
	socket := os.NewFile(3, "parent")
	read := func() (kind byte, id uint64, generation uint64) {
		var length [4]byte
		if _, err := socket.Read(length[:]); err != nil {
			os.Exit(0)
		}
		body := make([]byte, binary.BigEndian.Uint32(length[:]))
		if _, err := socket.Read(body); err != nil {
			os.Exit(0)
		}
		return body[0], binary.BigEndian.Uint64(body[1:]), binary.BigEndian.Uint64(body[9:])
	}
	about := "" // the digest that answers are about
	write := func(kind byte, id, generation uint64, payload string) {
		b := binary.BigEndian.AppendUint32(nil, uint32(18+len(about)+len(payload)))
		b = append(b, kind)
		b = binary.BigEndian.AppendUint64(b, id)
		b = binary.BigEndian.AppendUint64(b, generation)
		_, _ = socket.Write(append(append(append(b, byte(len(about))), about...), payload...))
	}
	if how == "grandchild" { // until the test opens the other end
		_, _ = os.ReadFile(os.Getenv(fakeFile))
		return 0
	}
	kind, id, generation := read()
	switch how {
	case "a program is left behind":
		left := exec.Command("/proc/self/exe", os.Args[1:]...)
		left.Env, left.Stderr = append(os.Environ(), fakeChild+"=grandchild"), os.Stderr
		if err := left.Start(); err != nil {
			return 1
		}
		return 0
	case "mute":
		_ = os.WriteFile(os.Getenv(fakeFile), nil, 0o600)
	case "mute once logged in":
		write(kind, id, generation, hsm.Protocol)
		for range 2 { // start and login
			_, id, generation = read()
			write(hsm.KindDone, id, generation, "{}")
		}
		read()
		_ = os.WriteFile(os.Getenv(fakeFile), nil, 0o600)
	case "garbage":
		_, _ = socket.Write(bytes.Repeat([]byte{0, 0, 0, 20, 99}, 100))
	case "a long frame":
		_, _ = socket.Write([]byte{0xff, 0xff, 0xff, 0xff})
	case "another version":
		write(kind, id, generation, "kedge hsm 0")
	case "another generation":
		write(kind, id, generation+1, hsm.Protocol)
	case "another digest":
		about = "another"
		write(kind, id, generation, hsm.Protocol)
	case "no answer": // as /bin/true would
		return 0
	case "no JSON":
		write(kind, id, generation, hsm.Protocol)
		_, id, generation = read()
		write(hsm.KindDone, id, generation, "nothing that can be read")
	case "dead in its login":
		write(kind, id, generation, hsm.Protocol)
		_, id, generation = read()
		write(hsm.KindDone, id, generation, os.Getenv(fakeInfo))
		read()
		return 0
	}
	for {
		read()
	}
}

func TestAChildThatMisbehavesIsTrustedInNothing(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	for how, want := range map[string]string{
		"garbage": "unknown kind 99", "a long frame": "longer than", "another version": "they are not the same program", "another generation": "answered for generation",
		"another digest": "answered about another digest",
		"no answer":      "the child that the module lives in", "no JSON": "cannot be read",
	} {
		t.Setenv(fakeChild, how)
		token := open(t, p, nil)
		if _, err := token.Keys(t.Context()); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", how, err)
		}
		token.Close()
	}
}

func TestAProgramThatAModuleLeavesBehindKeepsNobodyWaiting(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	held, err := os.OpenFile(fifo, os.O_RDWR, 0) // opens at once; the program that is left behind reads until it is closed
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	t.Setenv(fakeFile, fifo)
	t.Setenv(fakeChild, "a program is left behind")
	token := open(t, p, nil)
	answer := make(chan error, 1)
	go func() {
		_, err := token.Keys(t.Context())
		answer <- err
	}()
	select {
	case err := <-answer:
		if !errors.Is(err, hsm.ErrUnavailable) {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("whoever asks waits for a program that the module left behind")
	}
}

func TestCloseEndsAStartThatHangs(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	file := filepath.Join(t.TempDir(), "started")
	t.Setenv(fakeFile, file)
	t.Setenv(fakeChild, "mute")
	token := open(t, p, nil)
	answer := make(chan error, 1)
	go func() {
		_, err := token.Keys(t.Context())
		answer <- err
	}()
	eventually(t, func() error { _, err := os.Stat(file); return err })
	if err := token.Close(); err != nil {
		t.Error(err)
	}
	if err := <-answer; !errors.Is(err, hsm.ErrClosed) { // else it waited until the start took too long
		t.Error(err)
	}
}

func TestASignatureWaitsForAKeyThatIsLookedForNoLongerThanItsContext(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	token := open(t, p, nil)
	signer, _ := generate(t, token, p.Specs[0], "kedge")
	file := filepath.Join(t.TempDir(), "asked")
	t.Setenv(fakeFile, file)
	t.Setenv(fakeChild, "mute once logged in")
	kill(t, token, syscall.SIGKILL)
	before := token.Restarts()
	ctx, cancel := context.WithCancel(t.Context())
	answer := make(chan error, 1)
	digest := sha256.Sum256(nil)
	go func() {
		_, err := signer.SignContext(ctx, digest[:], crypto.SHA256)
		answer <- err
	}()
	eventually(t, func() error { _, err := os.Stat(file); return err })
	cancel()
	if err := <-answer; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if n := token.Restarts() - before; n != 1 {
		t.Errorf("it waited for the key until the child was replaced: %d starts", n)
	}
}

// TestASearchWithoutALoginIsNoAnswer: modules answer with no keys and no error.
func TestASearchWithoutALoginIsNoAnswer(t *testing.T) {
	each(t, func(t *testing.T, p *hsmparts.Part) {
		token := open(t, p, nil)
		generate(t, token, p.Specs[0], "kedge")
		token.Close()
		for what, err := range hsm.WithoutLogin(p.Options(), "kedge") {
			if err == nil || errors.Is(err, hsm.ErrNotFound) {
				t.Errorf("%s: %v", what, err)
			}
		}
	})
}

func TestAModuleThatIsNoneIsToldFromATokenThatIsAway(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	for path, want := range map[string]string{"/nowhere/module.so": "cannot be loaded", p.URI.PINSource.File: "cannot be loaded"} {
		token := open(t, p, func(o *hsm.Options) { o.URI.ModulePath = path })
		if _, err := token.Keys(t.Context()); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	for want, spoil := range map[string]func(*hsm.Options){
		"module-path is missing": func(o *hsm.Options) { o.URI.ModulePath = "" },
		"names no token":         func(o *hsm.Options) { o.URI.Token = "" },
	} {
		o := p.Options()
		spoil(&o)
		if _, err := hsm.Open(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
	}
}
