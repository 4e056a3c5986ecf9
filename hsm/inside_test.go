package hsm_test

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/miekg/pkcs11"
	"golang.org/x/sys/unix"

	"kedge/hsm"
	"kedge/test/hsmparts"
)

// The children of this file are real ones with a real module, in which something goes wrong that no one outside can do to them.

// fakeModule is the variable with the module that a child spoils.
const fakeModule = "KEDGE_TEST_FAKE_MODULE"

// spoilt is what a child does to its own module while that works, by the signal that tells it to. PKCS#11 knows programs, not threads: what one of them does it does to all.
var spoilt = map[syscall.Signal]func(module *pkcs11.Ctx, slot uint) error{
	syscall.SIGUSR1: (*pkcs11.Ctx).CloseAllSessions,
	syscall.SIGUSR2: func(module *pkcs11.Ctx, slot uint) error {
		session, err := module.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
		if err != nil {
			return err
		}
		return module.Logout(session)
	},
	syscall.SIGHUP: func(module *pkcs11.Ctx, _ uint) error { return module.Finalize() },
}

// spoil waits for the signals.
func spoil() {
	told := make(chan os.Signal, 1)
	for which := range spoilt {
		signal.Notify(told, which)
	}
	for which := range told {
		module := pkcs11.New(os.Getenv(fakeModule))
		slots, err := module.GetSlotList(true)
		for _, slot := range slots {
			if info, infoErr := module.GetTokenInfo(slot); err == nil && infoErr == nil && strings.TrimRight(info.Label, " \x00") == "tok" {
				err = spoilt[which.(syscall.Signal)](module, slot)
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, which, err)
		}
	}
}

// tell has a child write down what the kernel says of it, when a signal comes.
func tell() {
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGUSR1)
	for range told {
		dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		_ = os.WriteFile(os.Getenv(fakeFile)+".new", fmt.Appendf(nil, "dumpable %d, error %v", dumpable, err), 0o600)
		_ = os.Rename(os.Getenv(fakeFile)+".new", os.Getenv(fakeFile))
	}
}

// Frames as they are on the way: see hsm/frame.go.
const frameHeader = 18

// answer is a frame from the child, and what it answers.
type answer struct {
	asked   byte
	kind    byte
	payload []byte
}

// betrayals are what can become of an answer on its way.
var betrayals = map[string]func(a answer){
	"a bit of each signature is wrong": func(a answer) {
		if a.asked == hsm.KindSign && a.kind == hsm.KindDone {
			a.payload[len(a.payload)-1] ^= 1
		}
	},
	"a bit of one signature is wrong": func(a answer) {
		if a.asked == hsm.KindSign && a.kind == hsm.KindDone && os.Remove(os.Getenv(fakeFile)) == nil {
			a.payload[len(a.payload)-1] ^= 1
		}
	},
	"the child dies once it has made a key":    dies(hsm.KindGenerate),
	"the child dies once it has deleted a key": dies(hsm.KindDelete),
}

// dies ends the child when it has done what was asked and nobody knows yet, but for the next one.
func dies(asked byte) func(answer) {
	return func(a answer) {
		if a.asked == asked && a.kind == hsm.KindDone && os.Remove(os.Getenv(fakeFile)) == nil {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
}

// betray puts itself between the parent and the child of this process.
func betray(how func(answer)) error {
	const socket = 3
	parent, err := unix.FcntlInt(socket, unix.F_DUPFD_CLOEXEC, 10)
	if err != nil {
		return err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Dup2(pair[1], socket); err != nil {
		return err
	}
	outside, inside := os.NewFile(uintptr(parent), "parent"), os.NewFile(uintptr(pair[0]), "child")
	asked := make(chan map[uint64]byte, 1)
	asked <- map[uint64]byte{}
	pass := func(from, to *os.File, see func(body []byte)) error {
		for {
			length := make([]byte, 4)
			if _, err := io.ReadFull(from, length); err != nil {
				return err
			}
			body := make([]byte, binary.BigEndian.Uint32(length))
			if _, err := io.ReadFull(from, body); err != nil {
				return err
			}
			see(body)
			if _, err := to.Write(append(length, body...)); err != nil {
				return err
			}
		}
	}
	go func() {
		_ = pass(outside, inside, func(body []byte) {
			all := <-asked
			all[binary.BigEndian.Uint64(body[1:])] = body[0]
			asked <- all
		})
		_ = unix.Shutdown(pair[0], unix.SHUT_WR) // as the parent did
	}()
	go func() {
		_ = pass(inside, outside, func(body []byte) {
			all := <-asked
			what := all[binary.BigEndian.Uint64(body[1:])]
			asked <- all
			how(answer{asked: what, kind: body[0], payload: body[frameHeader+int(body[17]):]})
		})
	}()
	return unix.Close(pair[1])
}

// inside starts what goes wrong in a real child; how is none of it: false.
func inside(how string) bool {
	switch {
	case how == "spoils its module":
		go spoil()
	case how == "tells of itself":
		go tell()
	case betrayals[how] != nil:
		if err := betray(betrayals[how]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	default:
		return false
	}
	return true
}

// once lets something go wrong one time.
func once(t *testing.T) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "once")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(fakeFile, file)
}

func TestSessionsALoginAndAModuleThatAreLostUnderLoadCostNoSignature(t *testing.T) {
	each(t, func(t *testing.T, p *hsmparts.Part) {
		t.Setenv(fakeChild, "spoils its module")
		t.Setenv(fakeModule, p.URI.ModulePath)
		token := open(t, p, nil)
		signer, _ := generate(t, token, p.Specs[0], "kedge")
		l := startLoad(t, signer)
		for _, which := range []syscall.Signal{syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGHUP} {
			l.round(t)
			l.replaced(t, token, which)
			l.round(t)
		}
		l.end(t)
		if err := token.Problem(); err != nil {
			t.Errorf("there still is a problem: %v", err)
		}
	})
}

func TestASignatureThatDoesNotVerifyIsNeverGivenAway(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	digest := sha256.Sum256(nil)
	for spec, opts := range map[hsm.Spec]crypto.SignerOpts{
		hsm.P256: crypto.SHA256, hsm.RSA2048: &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256},
	} {
		token := open(t, p, nil)
		signer, _ := generate(t, token, spec, string(spec))
		t.Setenv(fakeChild, "a bit of one signature is wrong")
		once(t)
		replace(t, token)
		before := token.Restarts()
		if signature, err := signer.SignContext(t.Context(), digest[:], opts); err != nil || goodAs(signer, opts, digest[:], signature) != nil {
			t.Errorf("%s: one bad signature: %x, %v", spec, signature, err)
		}
		if n := token.Restarts() - before; n != 1 {
			t.Errorf("%s: %d children were started in the place of one whose signature is bad", spec, n)
		}
		t.Setenv(fakeChild, "a bit of each signature is wrong")
		replace(t, token)
		if signature, err := signer.SignContext(t.Context(), digest[:], opts); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "does not verify") || signature != nil {
			t.Errorf("%s: bad signatures: %x, %v", spec, signature, err)
		}
		t.Setenv(fakeChild, "")
		token.Close()
	}
}

// replace kills the child, and waits until another one is in its place.
func replace(t *testing.T, token *hsm.Token) {
	t.Helper()
	pid := token.ChildPID()
	kill(t, token, syscall.SIGKILL)
	eventually(t, func() error {
		if _, err := token.Info(t.Context()); err != nil || token.ChildPID() == pid {
			return fmt.Errorf("the child %d is not replaced: %w", pid, err)
		}
		return nil
	})
}

func TestAKeyWhoseMakingOrDeletionWasNotAnsweredIsMadeOrDeletedOnce(t *testing.T) {
	each(t, func(t *testing.T, p *hsmparts.Part) {
		for _, how := range []string{"the child dies once it has made a key", "the child dies once it has deleted a key"} {
			once(t)
			t.Setenv(fakeChild, how)
			token := open(t, p, nil)
			signer, key := generate(t, token, p.Specs[0], "kedge")
			signs(t, signer)
			if keys, err := token.Keys(t.Context()); err != nil || len(keys) != 1 {
				t.Errorf("%s: %d keys were made, %v", how, len(keys), err)
			}
			if err := token.Delete(t.Context(), key.ID); err != nil {
				t.Errorf("%s: %v", how, err)
			}
			if keys, err := token.Keys(t.Context()); err != nil || len(keys) != 0 {
				t.Errorf("%s: %d keys are left, %v", how, len(keys), err)
			}
			if n := token.Restarts(); n != 2 {
				t.Errorf("%s: %d children were started", how, n)
			}
			token.Close()
		}
	})
}

func TestAKeyThatIsHalfThereIsSaidAndDeletedWhole(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	token := open(t, p, nil)
	signer, key := generate(t, token, hsm.P256, "kedge")
	token.Close()
	p.Destroy(t, "privkey", key.ID.String())
	token = open(t, p, nil)
	if _, _, err := token.Find(t.Context(), signer.Public()); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("its private half is gone: %v", err)
	}
	if _, _, err := token.Generate(t.Context(), hsm.P256, "kedge", key.ID); !errors.Is(err, hsm.ErrExists) || !strings.Contains(err.Error(), "whose private key is gone") {
		t.Errorf("another one beside what is left: %v", err)
	}
	if err := token.Delete(t.Context(), key.ID); err != nil {
		t.Error(err)
	}
	again, _ := generate(t, token, hsm.P256, "kedge")
	signs(t, again)
}

func TestTwoCopiesOfAKeyAreAmbiguousUnlessTheirIDsAreAsked(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	p.Import(t, "copy", "0a", "0b")
	token := open(t, p, nil)
	keys, err := token.Keys(t.Context())
	if err != nil || len(keys) != 2 {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	if _, _, err := token.Find(t.Context(), keys[0].Public); !errors.Is(err, hsm.ErrAmbiguous) || !strings.Contains(err.Error(), "remove the others") {
		t.Errorf("by their public half: %v", err)
	}
	for _, key := range keys {
		signer, _, err := token.FindID(t.Context(), key.ID)
		if err != nil {
			t.Errorf("by the id %s: %v", key.ID, err)
			continue
		}
		kill(t, token, syscall.SIGKILL)
		signs(t, signer)
	}
}

// TestTheChildHoldsNothingOfItsParents: files and sockets of the parent are not the child's, not even those that somebody left open for whatever program comes.
func TestTheChildHoldsNothingOfItsParents(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	secret := filepath.Join(p.Dir, "secret")
	if err := os.WriteFile(secret, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	left, err := unix.Open(secret, unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(left)
	said := filepath.Join(p.Dir, "said")
	t.Setenv(fakeFile, said)
	t.Setenv(fakeChild, "tells of itself")
	token := open(t, p, nil)
	if _, err := token.Keys(t.Context()); err != nil {
		t.Fatal(err)
	}
	holds := func(process any) map[string]bool {
		names := map[string]bool{}
		paths, err := filepath.Glob(fmt.Sprintf("/proc/%v/fd/*", process))
		if err != nil || len(paths) == 0 {
			t.Fatalf("what is open in %v: %v", process, err)
		}
		for _, path := range paths {
			if name, err := os.Readlink(path); err == nil { // else it was closed meanwhile
				names[name] = true
			}
		}
		return names
	}
	ours := holds("self")
	if !ours[secret] {
		t.Fatalf("this process does not have %s: %v", secret, ours)
	}
	kinds := map[string]int{}
	for name := range holds(token.ChildPID()) {
		kind, _, numbered := strings.Cut(name, ":[")
		switch {
		case numbered: // anon_inode:[eventpoll] and its like, which all have the same name, are Go's own
			kinds[kind]++
			if kind == "socket" && ours[name] {
				t.Errorf("the child has %s, which is this process's", name)
			}
		case name != os.DevNull && !strings.HasPrefix(name, "/sys/fs/cgroup/"): // Go looks there how many CPUs it has
			t.Errorf("the child has %s", name)
		}
	}
	if kinds["socket"] != 1 || kinds["pipe"] != 1 { // to its parent, and its standard error
		t.Errorf("the child has %v", kinds)
	}
	kill(t, token, syscall.SIGUSR1)
	var text []byte
	eventually(t, func() (err error) { text, err = os.ReadFile(said); return err })
	if string(text) != "dumpable 0, error <nil>" {
		t.Errorf("the child says %q", text)
	}
}
