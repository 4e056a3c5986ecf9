// Package hsmparts makes tokens for tests: of SoftHSM, NSS, a TPM (swtpm), and opencryptoki. They are real PKCS#11 modules, each with its own ways. A part that this machine
// lacks is passed over with a line that says which; in CI that is a failure.
package hsmparts

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/hsm"
	"kedge/test/process"
)

// PIN is the user's PIN of every token.
const PIN = "123456"

// Part is a token that a test has for itself, but for opencryptoki's, which the machine has once.
type Part struct {
	Name       string
	URI        hsm.URI // of the token, with the PIN's file
	Parameters string  // see hsm.Options
	Specs      []hsm.Spec
	Sessions   int    // that it bears at once
	Dir        string // what there is of it, but for the token of opencryptoki
	Files      string // the folder of the token's own files
	TPM        *TPM   // of the TPM
}

// Options opens the part's token.
func (p *Part) Options() hsm.Options {
	return hsm.Options{URI: p.URI, Parameters: p.Parameters, Sessions: p.Sessions, StateDir: filepath.Join(p.Dir, "kedge")}
}

// All makes a token of each kind.
func All() map[string]func(t testing.TB) *Part {
	return map[string]func(t testing.TB) *Part{"SoftHSM": SoftHSM, "NSS": NSS, "TPM": NewTPM, "opencryptoki": Opencryptoki}
}

const libraries = "/usr/lib/x86_64-linux-gnu"

// lacking passes a test over on a machine that lacks a part, which CI may not.
func lacking(t testing.TB, what string) {
	t.Helper()
	process.Impossible(t, "this machine lacks what the test needs (see 'make packages')", errors.New(what))
	t.SkipNow()
}

func need(t testing.TB, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if _, err := exec.LookPath(path); err != nil {
			if _, err := os.Stat(path); err != nil {
				lacking(t, path)
			}
		}
	}
}

func run(t testing.TB, dir string, env []string, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, name, args...)
	c.Dir, c.Env = dir, append(os.Environ(), env...)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func folder(t testing.TB, path ...string) string {
	t.Helper()
	dir := filepath.Join(path...)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func newPart(t testing.TB, name, label, module string) *Part {
	t.Helper()
	p := &Part{Name: name, Dir: t.TempDir(), Sessions: 4, Specs: []hsm.Spec{hsm.P256, hsm.P384, hsm.RSA2048, hsm.RSA3072, hsm.RSA4096}}
	pin := filepath.Join(p.Dir, "pin")
	write(t, pin, PIN+"\n")
	p.URI = hsm.URI{Token: label, ModulePath: module, PINSource: hsm.PINSource{File: pin}}
	return p
}

// SoftHSM makes a token of SoftHSM. The test's environment names its configuration, so such a test does not run beside others.
func SoftHSM(t testing.TB) *Part {
	t.Helper()
	const module = "/usr/lib/softhsm/libsofthsm2.so"
	need(t, module, "softhsm2-util")
	p := newPart(t, "SoftHSM", "tok", module)
	config := filepath.Join(p.Dir, "softhsm2.conf")
	p.Files = folder(t, p.Dir, "tokens")
	write(t, config, fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", p.Files))
	t.Setenv("SOFTHSM2_CONF", config)
	p.AddToken(t, "tok")
	return p
}

// Away takes the token's files away, and returns what brings them back in the place of what is there meanwhile. At the end of the test they are back.
func (p *Part) Away(t testing.TB) (back func()) {
	t.Helper()
	away := p.Files + ".away"
	if err := os.Rename(p.Files, away); err != nil {
		t.Fatal(err)
	}
	back = sync.OnceFunc(func() {
		if err := errors.Join(os.RemoveAll(p.Files), os.Rename(away, p.Files)); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(back)
	return back
}

// AddToken makes another token of SoftHSM beside the first.
func (p *Part) AddToken(t testing.TB, label string) {
	t.Helper()
	run(t, p.Dir, nil, "softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "so1234", "--pin", PIN)
}

// NSS makes a database of NSS, which wants to be initialised with a text.
func NSS(t testing.TB) *Part {
	t.Helper()
	const module = libraries + "/libsoftokn3.so"
	need(t, module, "certutil")
	p := newPart(t, "NSS", "tok", module)
	p.Files = folder(t, p.Dir, "nss")
	t.Setenv("NSS_MAX_MP_PBE_ITERATION_COUNT", "1") // else RSA runs at 20 a second
	run(t, p.Dir, nil, "certutil", "-N", "-d", "sql:"+p.Files, "-f", p.URI.PINSource.File)
	p.Parameters = fmt.Sprintf("configdir='sql:%s' certPrefix='' keyPrefix='' secmod='secmod.db' flags= dbTokenDescription='tok'", p.Files)
	return p
}

// TPM is a software TPM in a process of its own, behind a resource manager (tpm2-abrmd), as the kernel has one for a real TPM: a TPM has three places for loaded keys, and what a client
// that dies leaves in them stays there.
type TPM struct {
	dir     string
	port    int
	pid     int
	manager *exec.Cmd
	ended   chan struct{} // once it has
}

// NewTPM makes a software TPM with a token on it, which bears any number of wrong PINs: to a TPM, being killed after a login is one.
func NewTPM(t testing.TB) *Part {
	t.Helper()
	return newTPM(t, true)
}

// TPMLimit is how many wrong PINs a TPM takes by default.
const TPMLimit = 3

// StrictTPM makes one that locks itself after TPMLimit wrong PINs, for a quarter of an hour.
func StrictTPM(t testing.TB) *Part {
	t.Helper()
	return newTPM(t, false)
}

func newTPM(t testing.TB, lenient bool) *Part {
	t.Helper()
	const module = libraries + "/pkcs11/libtpm2_pkcs11.so"
	need(t, module, "swtpm", "tpm2_dictionarylockout", "pkcs11-tool", "tpm2-abrmd", "dbus-daemon", libraries+"/libtss2-tcti-tabrmd.so.0")
	p := newPart(t, "TPM", "tok", module)
	p.Specs, p.Sessions = []hsm.Spec{hsm.P256, hsm.P384, hsm.RSA2048}, 2
	p.TPM = &TPM{dir: p.Dir}
	folder(t, p.Dir, "state")
	bus := filepath.Join(p.Dir, "bus")
	daemon := exec.Command("dbus-daemon", "--session", "--nofork", "--nopidfile", "--address=unix:path="+bus)
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.TPM.Kill()
		_ = daemon.Process.Kill() // it was started here
		_ = daemon.Wait()
	})
	const tcti = "tabrmd:bus_type=session"
	for name, value := range map[string]string{"DBUS_SESSION_BUS_ADDRESS": "unix:path=" + bus, "TPM2_PKCS11_TCTI": tcti, "TPM2TOOLS_TCTI": tcti, "TPM2_PKCS11_STORE": folder(t, p.Dir, "store"),
		"TPM2_PKCS11_BACKEND": "esysdb", "TSS2_LOG": "all+NONE"} {
		t.Setenv(name, value)
	}
	p.TPM.Start(t)
	if lenient {
		run(t, p.Dir, nil, "tpm2_dictionarylockout", "-s", "-n", "1000000", "-t", "1", "-l", "1")
	}
	run(t, p.Dir, nil, "pkcs11-tool", "--module", module, "--slot-index", "0", "--init-token", "--label", "tok", "--so-pin", "so1234")
	run(t, p.Dir, nil, "pkcs11-tool", "--module", module, "--token-label", "tok", "--login", "--login-type", "so", "--so-pin", "so1234", "--init-pin", "--pin", PIN)
	return p
}

// Start starts the TPM's process, at the port that it had before.
func (m *TPM) Start(t testing.TB) {
	t.Helper()
	pidFile := filepath.Join(m.dir, "swtpm.pid")
	for range 20 {
		port := m.port
		if port == 0 {
			port = twoPorts(t)
		}
		c := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+filepath.Join(m.dir, "state"),
			"--server", fmt.Sprintf("type=tcp,port=%d,bindaddr=127.0.0.1", port), "--ctrl", fmt.Sprintf("type=tcp,port=%d,bindaddr=127.0.0.1", port+1),
			"--flags", "not-need-init,startup-clear", "--pid", "file="+pidFile, "--daemon")
		if out, err := c.CombinedOutput(); err != nil { // somebody took the port meanwhile, or still has it
			t.Logf("starting swtpm: %v: %s", err, out)
			continue
		}
		text, err := os.ReadFile(pidFile)
		if err == nil {
			m.pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
		}
		if err != nil {
			t.Fatal(err)
		}
		m.port = port
		m.manage(t)
		return
	}
	t.Fatal("swtpm does not start")
}

// managerLimit is how long a resource manager may take until it answers, which is some 50 ms.
const managerLimit = 5 * time.Second

// manage starts the resource manager, and waits until it answers. It ends when it finds no bus, or no TPM, yet, or hangs on its way out: then another one
// is started.
func (m *TPM) manage(t testing.TB) {
	t.Helper()
	var err error
	for range 50 {
		m.manager = exec.Command("tpm2-abrmd", "--session", "--allow-root", fmt.Sprintf("--tcti=swtpm:host=127.0.0.1,port=%d", m.port))
		if err := m.manager.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func(c *exec.Cmd) {
			_ = c.Wait() // whether it answers is what counts
			close(ended)
		}(m.manager)
		m.ended = ended
		limit := time.After(managerLimit)
		for running := true; running; {
			var out []byte
			if out, err = exec.Command("tpm2_getcap", "properties-fixed").CombinedOutput(); err == nil {
				return
			}
			err = fmt.Errorf("%w: %s", err, out)
			select {
			case <-ended:
				running = false
			case <-limit:
				_ = m.manager.Process.Kill() // it may have ended
				<-ended
				running = false
			case <-time.After(20 * time.Millisecond):
			}
		}
		<-time.After(50 * time.Millisecond)
	}
	t.Fatalf("the resource manager of the TPM does not answer: %v", err)
}

// twoPorts finds two free ports, one above the other: the control port is where clients look for it.
func twoPorts(t testing.TB) int {
	t.Helper()
	for range 100 { // below the ports that the kernel hands out: next to one of those there is often another
		port := 10000 + rand.IntN(20000)
		one, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		two, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port+1))
		one.Close()
		if err == nil {
			two.Close()
			return port
		}
	}
	t.Fatal("no two ports in a row are free")
	return 0
}

// Signal sends the TPM's process a signal.
func (m *TPM) Signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(m.pid, s); err != nil {
		t.Fatal(err)
	}
}

// WrongPINs is how many wrong PINs the TPM has counted (TPM_PT_LOCKOUT_COUNTER).
func (m *TPM) WrongPINs(t testing.TB) int {
	t.Helper()
	_, after, found := strings.Cut(run(t, m.dir, nil, "tpm2_getcap", "properties-variable"), "TPM2_PT_LOCKOUT_COUNTER:")
	line, _, _ := strings.Cut(after, "\n")
	n, err := strconv.ParseInt(strings.TrimSpace(line), 0, 32)
	if !found || err != nil {
		t.Fatalf("the TPM does not say how many wrong PINs it has counted: %v", err)
	}
	return int(n)
}

// Unlock has the TPM forget them.
func (m *TPM) Unlock(t testing.TB) {
	t.Helper()
	run(t, m.dir, nil, "tpm2_dictionarylockout", "--clear-lockout")
}

// Kill ends the TPM's process at once, and its resource manager, which would not find it again. It waits until they are gone.
func (m *TPM) Kill() {
	if m.manager != nil {
		_ = m.manager.Process.Kill() // it may have ended
		<-m.ended
		m.manager = nil
	}
	if m.pid == 0 {
		return
	}
	_ = syscall.Kill(m.pid, syscall.SIGCONT)
	for syscall.Kill(m.pid, syscall.SIGKILL) == nil { // it is no child of this process: nobody waits for it here
		<-time.After(5 * time.Millisecond)
	}
	m.pid = 0
}

// Opencryptoki is the soft token of opencryptoki, which the machine has once, for all users. Its keys are RSA.
func Opencryptoki(t testing.TB) *Part {
	t.Helper()
	const module = libraries + "/pkcs11/libopencryptoki.so"
	need(t, module, "pkcsslotd", "pkcsconf")
	if os.Getuid() != 0 {
		lacking(t, "a root user, whom opencryptoki's state belongs to")
	}
	p := newPart(t, "opencryptoki", "tok", module)
	p.Specs, p.Files = []hsm.Spec{hsm.RSA2048, hsm.RSA3072, hsm.RSA4096}, "/var/lib/opencryptoki/swtok"
	lock, err := os.OpenFile("/run/lock/kedge-test-opencryptoki", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lock.Close() })
	run(t, p.Dir, nil, "systemd-tmpfiles", "--create", "/usr/lib/tmpfiles.d/opencryptoki.conf")
	p.StartSlotDaemon(t)
	wipe := p.wipe
	if wipe() != nil { // it is new, or somebody else's
		initialise(t, p.Dir)
		if err := wipe(); err != nil {
			t.Fatalf("opencryptoki's token cannot be used: %v", err)
		}
	}
	return p
}

// StartSlotDaemon starts what the module of opencryptoki asks which tokens there are, unless it runs.
func (p *Part) StartSlotDaemon(t testing.TB) {
	t.Helper()
	if slotDaemon(t) == 0 {
		run(t, p.Dir, nil, "pkcsslotd")
	}
}

// KillSlotDaemon ends it at once, and waits until it is gone.
func (p *Part) KillSlotDaemon(t testing.TB) {
	t.Helper()
	t.Cleanup(func() { p.StartSlotDaemon(t) })
	for pid := slotDaemon(t); pid != 0 && syscall.Kill(pid, syscall.SIGKILL) == nil; { // it is no child of this process: nobody waits for it here
		<-time.After(5 * time.Millisecond)
	}
}

// slotDaemon is its process; 0: it does not run.
func slotDaemon(t testing.TB) int {
	t.Helper()
	out, err := exec.Command("pgrep", "-x", "pkcsslotd").Output()
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatalf("which process is pkcsslotd: %v", err)
	}
	return pid
}

// wipe deletes every key on the token.
func (p *Part) wipe() error {
	o := p.Options()
	o.StateDir = ""
	token, err := hsm.Open(o)
	if err != nil {
		return err
	}
	defer token.Close()
	keys, err := token.Keys(context.Background())
	for _, key := range keys {
		err = errors.Join(err, token.Delete(context.Background(), key.ID))
	}
	return err
}

// initialise makes the token, as opencryptoki's manual has it. What is left of another one goes first: a second C_InitToken leaves a token to which its security officer cannot log in.
func initialise(t testing.TB, dir string) {
	t.Helper()
	for _, pattern := range []string{"/var/lib/opencryptoki/swtok/NVTOK.DAT", "/var/lib/opencryptoki/swtok/MK_*", "/var/lib/opencryptoki/swtok/TOK_OBJ/*", "/dev/shm/var.lib.opencryptoki.swtok"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	c := exec.CommandContext(t.Context(), "pkcsconf", "-I", "-c", "3", "-S", "87654321")
	c.Dir, c.Stdin = dir, strings.NewReader("tok\n")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("making opencryptoki's token: %v: %s", err, out)
	}
	run(t, dir, nil, "pkcsconf", "-P", "-c", "3", "-S", "87654321", "-n", "76543210")
	run(t, dir, nil, "pkcsconf", "-u", "-c", "3", "-S", "76543210", "-n", "87651234")
	run(t, dir, nil, "pkcsconf", "-p", "-c", "3", "-U", "87651234", "-n", PIN)
}

// Import puts a key that was made elsewhere onto a token of SoftHSM, once for each id. Ids are in hex.
func (p *Part) Import(t testing.TB, label string, ids ...string) {
	t.Helper()
	file := filepath.Join(p.Dir, label+".pem")
	run(t, p.Dir, nil, "openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", file)
	for _, id := range ids {
		run(t, p.Dir, nil, "softhsm2-util", "--import", file, "--token", p.URI.Token, "--label", label, "--id", id, "--pin", PIN)
	}
}

// Destroy destroys half of a key pair on a token of SoftHSM, "privkey" or "pubkey", with the token's own tools. id is in hex.
func (p *Part) Destroy(t testing.TB, half, id string) {
	t.Helper()
	need(t, "pkcs11-tool")
	run(t, p.Dir, nil, "pkcs11-tool", "--module", p.URI.ModulePath, "--token-label", p.URI.Token, "--login", "--pin", PIN, "--delete-object", "--type", half, "--id", id)
}

// Generate makes a P-256 key on a token of SoftHSM as the token's own tools do, also beside one of the same label. id is in hex; more are further arguments of pkcs11-tool.
func (p *Part) Generate(t testing.TB, label, id string, more ...string) {
	t.Helper()
	need(t, "pkcs11-tool")
	run(t, p.Dir, nil, "pkcs11-tool", append([]string{"--module", p.URI.ModulePath, "--token-label", p.URI.Token, "--login", "--pin", PIN, "--keypairgen", "--key-type", "EC:prime256v1",
		"--label", label, "--id", id}, more...)...)
}

// GenerateAlwaysAuthenticate makes a key that wants the PIN for each signature (CKA_ALWAYS_AUTHENTICATE).
func (p *Part) GenerateAlwaysAuthenticate(t testing.TB, label, id string) {
	t.Helper()
	p.Generate(t, label, id, "--always-auth")
}
