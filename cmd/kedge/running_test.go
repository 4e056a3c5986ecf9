package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"kedge/test/process"
)

// fetched is an SVID that a test's machine has, and the token that it had it with.
type fetched struct{ dir, token string }

// join makes a token and fetches an SVID with it.
func join(t *testing.T, k *process.Kedge) fetched {
	t.Helper()
	f := fetched{dir: filepath.Join(t.TempDir(), "svid")}
	f.token = strings.TrimSpace(k.Must(t, "token", "create", "--identity", "ns/default/sa/web"))
	file := filepath.Join(t.TempDir(), "token")
	process.Write(t, file, f.token)
	k.Must(t, "svid", "fetch", "--token-file", file, "--out", f.dir)
	return f
}

// TestServeNeedsNoConfiguration runs 'kedge serve' in an empty folder, on a loopback interface of its own, where the default ports are free.
func TestServeNeedsNoConfiguration(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var greeting, log bytes.Buffer
	command := exec.Command(process.Binary(), "serve")
	command.Dir, command.Stdout, command.Stderr = dir, &greeting, &log
	began := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread with the other network ends with this goroutine
		began <- startAlone(command)
	}()
	if err := <-began; errors.Is(err, fs.ErrPermission) {
		process.Impossible(t, "a network of its own needs root", err)
		return
	} else if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = command.Process.Kill() }() // fails when all went well, since it has ended
	kedge := func(args ...string) string {
		out, err := runIn(dir, args...)
		if err != nil {
			t.Fatalf("%v\n%s", err, log.String())
		}
		return out
	}
	process.Eventually(t, "the CA", func() error {
		_, err := runIn(dir, "bundle", "show")
		return err
	})
	if out := kedge("token", "create", "--identity", "ns/default/sa/web"); strings.Count(out, ".") != 2 {
		t.Errorf("token create: %s", out)
	}
	if err := command.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := command.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	for _, promised := range []string{"trust domain cluster.local", "127.0.0.1:15012 (TLS)", "http://127.0.0.1:15014", filepath.Join(dir, "kedge-data"),
		"\nNext: kedge token create --identity ns/default/sa/web\n"} {
		if !strings.Contains(greeting.String(), promised) {
			t.Errorf("the greeting lacks %q:\n%s", promised, greeting.String())
		}
	}
}

// startAlone starts a program in a network namespace of its own, with a loopback interface.
func startAlone(command *exec.Cmd) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	loopback, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	loopback.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, loopback); err != nil {
		return fmt.Errorf("raising lo: %w", err)
	}
	return command.Start()
}

// runIn runs a verb in a folder.
func runIn(dir string, args ...string) (string, error) {
	command := exec.Command(process.Binary(), args...)
	command.Dir = dir
	var stderr bytes.Buffer
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("kedge %q: %w: %s", args, err, stderr.String())
	}
	return string(out), nil
}

func TestTheBundleDocumentIsWhatGoSPIFFEReads(t *testing.T) {
	t.Parallel()
	k := process.New(t, process.Ports+"trustDomain: prod.example.org\n")
	k.Start(t)
	td := spiffeid.RequireTrustDomainFromString("prod.example.org")
	bundle, err := spiffebundle.Parse(td, []byte(k.Must(t, "bundle", "show", "--format", "spiffe")))
	if err != nil {
		t.Fatal(err)
	}
	if sequence, ok := bundle.SequenceNumber(); !ok || sequence != 1 {
		t.Errorf("its sequence number is %d", sequence)
	}
	if hint, ok := bundle.RefreshHint(); !ok || hint < time.Second {
		t.Errorf("its refresh hint is %s", hint)
	}
	block, _ := pem.Decode([]byte(k.Must(t, "bundle", "show", "--format", "pem")))
	if roots := bundle.X509Authorities(); len(roots) != 1 || !bytes.Equal(roots[0].Raw, block.Bytes) {
		t.Errorf("it has %d roots, and not the one of the PEM", len(roots))
	}
}

// TestNoSecretIsLogged looks for every key and token of a CA at work in everything that it said, at the level that says most.
func TestNoSecretIsLogged(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	process.Write(t, filepath.Join(k.Dir, "passphrase"), "correct-horse-battery\n")
	process.Write(t, k.Config, process.Ports+cluster.Configuration(t, k.Dir)+`
log: {level: debug}
issuingCA: {passphraseFile: passphrase}
`)
	k.Start(t)
	machine := join(t, k)
	secrets := map[string]string{"join token": machine.token, "passphrase": "correct-horse-battery"}
	said := k.Must(t, "svid", "fetch", "--renew", "--out", machine.dir)
	caller := k.Dial(t, nil)
	key := process.NewKey(t)
	token := cluster.Token(t, "default", "web")
	if _, err := caller.Issue(t.Context(), key.CSR, token, 0); err != nil {
		t.Fatal(err)
	}
	secrets["service account token"] = token
	broken := token[:len(token)-8] + "AAAAAAAA"
	if _, err := caller.Issue(t.Context(), key.CSR, broken, 0); err == nil {
		t.Error("a token with a broken signature was accepted")
	} else {
		said += err.Error()
	}
	file := filepath.Join(t.TempDir(), "token")
	process.Write(t, file, broken)
	refused := k.Run(t, "svid", "fetch", "--token-file", file, "--out", filepath.Join(t.TempDir(), "svid"))
	said += refused.Stdout + refused.Stderr + k.Must(t, "config", "print") + k.Must(t, "doctor") + k.Must(t, "ledger", "export")
	kept := k.Run(t, "backup", "--out", filepath.Join(t.TempDir(), "backup.tar"))
	said += kept.Stdout + kept.Stderr
	k.Stop(t)
	said += k.Greeting(t) + k.Log()

	for _, dir := range []string{k.Data, machine.dir} {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() {
				return err
			}
			text, err := os.ReadFile(path)
			if block, _ := pem.Decode(text); err == nil && block != nil && strings.Contains(block.Type, "PRIVATE KEY") {
				secrets[path] = base64.StdEncoding.EncodeToString(block.Bytes)[48:] // what is the key's own
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(secrets) < 6 {
		t.Fatalf("only %d secrets were found: the test looks in the wrong places", len(secrets))
	}
	said = strings.ReplaceAll(said, `\n`, "")
	said = strings.ReplaceAll(said, "\n", "")
	for what, secret := range secrets {
		for _, part := range strings.Split(secret, ".") { // of a token: each of its parts
			if strings.Contains(said, part) {
				t.Errorf("the %s was said", what)
			}
		}
	}
	if strings.Contains(said, "PRIVATE KEY") {
		t.Error("a private key was said")
	}
}

func TestAnotherUserIsTurnedAway(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		process.Impossible(t, "running a command as somebody else needs root", fs.ErrPermission)
		return
	}
	k := process.New(t, "")
	k.Start(t)
	for dir := k.Dir; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) { // let anybody get as far as the data folder
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	program := filepath.Join(k.Dir, "kedge")
	if err := copyProgram(program); err != nil {
		t.Fatal(err)
	}
	command := exec.Command(program, "token", "create", "--identity", "ns/default/sa/web", "--data", k.Data)
	command.Dir = "/"
	command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := command.CombinedOutput()
	if code := command.ProcessState.ExitCode(); err == nil || code != 1 {
		t.Errorf("exit code %d: %s", code, out)
	}
	if want := "kedge: this user may not use the admin socket " + filepath.Join(k.Data, "admin.sock") + ": run the command as the CA's user or root: "; !strings.HasPrefix(string(out), want) {
		t.Errorf("it says %s, not %s", out, want)
	}

	// Were the folder and the socket open, the CA would still look at who it is.
	for path, mode := range map[string]os.FileMode{k.Data: 0o755, filepath.Join(k.Data, "admin.sock"): 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	command = exec.Command(program, "ledger", "list", "--data", k.Data)
	command.Dir = "/"
	command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, _ = command.CombinedOutput() // the exit code says whether it failed
	if code := command.ProcessState.ExitCode(); code != 1 || !strings.Contains(string(out), "only the CA's own user and root may do this") {
		t.Errorf("exit code %d: %s", code, out)
	}
	if !regexp.MustCompile(`"msg":"an admin call was refused","peer":"uid 65534`).MatchString(k.Log()) {
		t.Errorf("the log does not say who was turned away:\n%s", k.Log())
	}
}

// TestNoCrashLeavesKeysBehind: the kernel writes no core file of the CA, and pipes none to a collector, which heeds no size limit but the dumpable flag (core(5)).
// The flag shows in who owns the files of the process under /proc (proc(5)): root, instead of its own user. So it runs as somebody else, beside a process of the
// same user that is as others are.
func TestNoCrashLeavesKeysBehind(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		process.Impossible(t, "running the CA as somebody else needs root", fs.ErrPermission)
		return
	}
	const nobody = 65534
	k := process.New(t, "")
	for dir := k.Dir; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) { // let anybody get as far as the folder
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	program := filepath.Join(k.Dir, "kedge")
	if err := copyProgram(program); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{k.Dir, k.Config} {
		if err := os.Chown(path, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	start := func(name string, args ...string) (pid int) {
		t.Helper()
		command := exec.Command(name, args...)
		command.Dir, command.SysProcAttr = "/", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		stdin, err := command.StdinPipe() // what holds cat
		if err != nil {
			t.Fatal(err)
		}
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = stdin.Close()
			_ = command.Process.Kill() // fails when it has ended
			_ = command.Wait()         // it was killed
		})
		return command.Process.Pid
	}
	owner := func(pid int) uint32 {
		t.Helper()
		info, err := os.Stat(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil {
			t.Fatal(err)
		}
		return info.Sys().(*syscall.Stat_t).Uid
	}
	ca, other := start(program, "serve", "--config", k.Config), start("cat")
	process.Eventually(t, "the CA", func() error {
		_, err := runIn(k.Dir, "bundle", "show", "--config", k.Config)
		return err
	})
	if got := owner(other); got != nobody {
		t.Fatalf("the files of a process that may be dumped belong to user %d: the test sees nothing", got)
	}
	if got := owner(ca); got != 0 {
		t.Errorf("the CA may be dumped: its files under /proc belong to user %d", got)
	}
	if limits := process.Read(t, fmt.Sprintf("/proc/%d/limits", ca)); !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).MatchString(limits) {
		t.Errorf("the CA may write a core file:\n%s", limits)
	}
}

// copyProgram copies the program under test. Another program does it: were the copy open for writing here, a child that another test starts at that moment would hold it for longer, and nobody
// could run it yet (ETXTBSY).
func copyProgram(to string) error {
	if out, err := exec.Command("install", "-m", "755", process.Binary(), to).CombinedOutput(); err != nil {
		return fmt.Errorf("copying the program: %w: %s", err, out)
	}
	return nil
}

func TestTheGreetingIsTrue(t *testing.T) {
	t.Parallel()
	k := process.New(t, "")
	k.Start(t)
	status := k.Status(t)
	for _, said := range []string{status.CSRAddress, status.OpsAddress, status.RootFile, status.Root.String(), status.DataDir, status.TrustDomain, status.Version} {
		if said == "" || !strings.Contains(k.Greeting(t), said) {
			t.Errorf("the greeting lacks %q", said)
		}
	}
	var findings []finding
	if err := json.Unmarshal([]byte(k.Must(t, "doctor", "--json")), &findings); err != nil || len(findings) < 4 {
		t.Errorf("doctor: %v %v", findings, err)
	}
}
