package crash

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/hsm"
	"kedge/test/hsmparts"
	"kedge/test/process"
)

// module is the process that the PKCS#11 module of a CA lives in.
func module(t *testing.T, k *process.Kedge) int {
	t.Helper()
	var pid int
	process.Eventually(t, "the process that the module lives in", func() error {
		stats, err := filepath.Glob("/proc/[0-9]*/stat")
		if err != nil {
			return err
		}
		for _, stat := range stats {
			if state, parent := stateOf(stat); state != "Z" && parent == k.PID() {
				pid, err = strconv.Atoi(filepath.Base(filepath.Dir(stat)))
				return err
			}
		}
		return errors.New("the CA has no child")
	})
	return pid
}

// stateOf reads the state and the parent of a process (proc_pid_stat(5)); "": it is gone.
func stateOf(stat string) (state string, parent int) {
	text, err := os.ReadFile(stat)
	if err != nil {
		return "", 0
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	parent, err = strconv.Atoi(fields[1])
	if err != nil {
		return "", 0
	}
	return fields[0], parent
}

// tokenRoot makes a root on the token in a ceremony, and returns what configures it and the file of its certificate.
func tokenRoot(t *testing.T, dir string, uri hsm.URI) (configuration, file string) {
	t.Helper()
	uri.Object = "root"
	plan := filepath.Join(dir, "plan.yaml")
	process.Write(t, plan, fmt.Sprintf(`
make: root
purpose: a test
operators: [test]
key: {uri: %q, create: P-256}
subject: {commonName: Token Root}
trustDomain: cluster.local
serial: "4b656467654b656467654b656467654b"
notBefore: %s
notAfter: %s
out: {file: root.pem, record: root-ceremony.json}
`, uri, time.Now().Add(-time.Hour).UTC().Format(time.RFC3339), time.Now().AddDate(1, 0, 0).UTC().Format(time.RFC3339)))
	if out, err := exec.Command(process.Binary(), "ceremony", plan).CombinedOutput(); err != nil {
		t.Fatalf("the ceremony: %v\n%s", err, out)
	}
	file = filepath.Join(dir, "root.pem")
	return fmt.Sprintf("root: {kind: pkcs11, pkcs11: {uri: %q, certificateFile: %q}}\n", uri, file), file
}

// says waits until /readyz has that code and names the problem, or none when that is "". The metric and the doctor agree.
func says(t *testing.T, k *process.Kedge, code int, problem string) {
	t.Helper()
	process.Eventually(t, "/readyz to say so", func() error {
		got, body := k.Get(t, "/readyz")
		if got != code || problem == "" && body != "ready\n" || !strings.Contains(body, problem) {
			return fmt.Errorf("%d %s", got, body)
		}
		return nil
	})
	if n := k.Metrics(t)["kedge_problems"]; (n == 0) != (problem == "") {
		t.Errorf("kedge_problems is %v", n)
	}
	if r := k.Run(t, "doctor"); (r.Code == 0) != (problem == "") || !strings.Contains(r.Stdout, problem) {
		t.Errorf("doctor: %d %s", r.Code, r.Stdout)
	}
}

// TestAnIssuingKeyOnATokenOutlivesItsModuleAndItsToken: the token signs every certificate. While clients are at work its module's process is killed, then it stands still: nobody is refused. Then
// the token is away: callers are told to try again, everything says what is wrong, and all goes on by itself when it is back. Last the CA is killed, and its module's process does not stay behind.
func TestAnIssuingKeyOnATokenOutlivesItsModuleAndItsToken(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, fmt.Sprintf("issuingCA: {keyStore: pkcs11, pkcs11: {uri: %q}}\npkcs11: {sessions: 4, timeout: 1s}\n", p.URI))
	k.Start(t)
	l := newLoad(t, cluster)
	stop := l.start(t, k)
	defer stop()
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP} {
		l.await(t, workers)
		before := module(t, k)
		if err := syscall.Kill(before, signal); err != nil {
			t.Fatal(err)
		}
		process.Eventually(t, "another process of the module", func() error {
			if module(t, k) == before {
				return fmt.Errorf("after %s it is the same one", signal)
			}
			return nil
		})
		l.await(t, 2*workers)
	}
	if n := l.refused.Load(); n > 0 {
		t.Errorf("%d calls were refused, though the token was there", n)
	}

	back := p.Away(t)
	process.Eventually(t, "a refusal", func() error {
		if l.refused.Load() == 0 {
			return errors.New("nobody was refused")
		}
		return nil
	})
	says(t, k, http.StatusServiceUnavailable, `key store: the token "tok" cannot be used since `)
	if !strings.Contains(k.Log(), `"level":"ERROR","msg":"the token cannot be used","token":"tok"`) {
		t.Error("the log does not say that the token cannot be used")
	}
	back()
	says(t, k, http.StatusOK, "")
	if !strings.Contains(k.Log(), `"msg":"the token works again","token":"tok"`) {
		t.Error("the log does not say that the token works again")
	}
	l.await(t, workers)
	stop()
	l.check(t, k)

	child := module(t, k)
	if err := syscall.Kill(k.PID(), syscall.SIGKILL); err != nil { // it alone
		t.Fatal(err)
	}
	k.Wait(t)
	process.Eventually(t, "the end of the module's process", func() error {
		if state, _ := stateOf(fmt.Sprintf("/proc/%d/stat", child)); !slices.Contains([]string{"", "Z"}, state) {
			return fmt.Errorf("it is in the state %s", state)
		}
		return nil
	})
	k.Start(t)
	l.ask(t.Context(), k.Dial(t, nil), l.keys[0], l.tokens[0])
	l.check(t, k)
	if out := k.Must(t, "authority", "list"); strings.Count(out, " issuing ") != 1 {
		t.Errorf("the key on the token was not found again: authority list:\n%s", out)
	}
}

// signer tells which issuing CA signs now, and keeps the leaf that it signed for that.
func (l *load) signer(t *testing.T, k *process.Kedge) string {
	t.Helper()
	issued, err := k.Dial(t, nil).Issue(t.Context(), l.keys[0].CSR, l.tokens[0], 0)
	if err != nil {
		t.Fatal(err)
	}
	l.leaves = append(l.leaves, issued.Leaf)
	return issued.Chain[0].SerialNumber.String()
}

// awaitRenewal waits until another issuing CA signs.
func (l *load) awaitRenewal(t *testing.T, k *process.Kedge, first string) {
	t.Helper()
	process.Eventually(t, "the renewal", func() error {
		if l.signer(t, k) == first {
			return errors.New("the first issuing CA still signs")
		}
		return nil
	})
}

// TestARootOnATokenThatIsAwayHoldsUpRenewalsOnly: the issuing CA is in memory. What is issued goes on, the renewal that fails is told, and it is made when the token is back.
func TestARootOnATokenThatIsAwayHoldsUpRenewalsOnly(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	root, _ := tokenRoot(t, k.Dir, p.URI)
	process.Write(t, k.Config, strings.Replace(shortLives, "issuingCA: {", "issuingCA: {keyStore: memory, ", 1)+cluster.Configuration(t, k.Dir)+root)
	k.Start(t)
	l := newLoad(t, cluster)
	first := l.signer(t, k)
	back := p.Away(t)
	says(t, k, http.StatusOK, `root: the token "tok" cannot be used since `)
	process.Eventually(t, "a renewal that fails", func() error {
		if !strings.Contains(k.Log(), `"about":"issuing CA","error":"making a new issuing CA: having it certified by the root`) {
			return errors.New("the log does not say so")
		}
		return nil
	})
	if l.signer(t, k) != first {
		t.Error("another issuing CA signs, though the root's token is away")
	}
	back()
	l.awaitRenewal(t, k, first)
	says(t, k, http.StatusOK, "")
	l.check(t, k)
}

// TestATokenOfARootThatIsAwayIsNoticedBeforeARenewalAsksIt: the issuing CA is in a file, and is renewed in days.
func TestATokenOfARootThatIsAwayIsNoticedBeforeARenewalAsksIt(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	root, _ := tokenRoot(t, k.Dir, p.URI)
	process.Write(t, k.Config, process.Ports+cluster.Configuration(t, k.Dir)+root)
	k.Start(t)
	l := newLoad(t, cluster)
	first := l.signer(t, k)
	back := p.Away(t)
	says(t, k, http.StatusOK, `root: the token "tok" cannot be used since `)
	if log := k.Log(); !strings.Contains(log, `"msg":"the token cannot be used","token":"tok"`) || strings.Contains(log, "making a new issuing CA") {
		t.Errorf("the log does not say that the token is away, or a renewal asked it:\n%s", log)
	}
	back()
	says(t, k, http.StatusOK, "")
	if l.signer(t, k) != first {
		t.Error("another issuing CA signs, though none was due")
	}
	l.check(t, k)
}

// TestARestartWithoutTheCertificateOfItsRootGoesOn, since the data folder has an issuing CA: what is wrong is told, and ends by itself. A first start has nothing to go on with.
func TestARestartWithoutTheCertificateOfItsRootGoesOn(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	root, file := tokenRoot(t, k.Dir, p.URI)
	process.Write(t, k.Config, shortLives+cluster.Configuration(t, k.Dir)+root)
	move := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	move(file, file+".away")
	k.Launch(t)
	if code := k.Wait(t); code != 1 || !strings.Contains(k.Log(), `"msg":"the CA did not start"`) || !strings.Contains(k.Log(), "put the file there that 'kedge ceremony' wrote") {
		t.Errorf("the first start ended with exit code %d:\n%s", code, k.Log())
	}
	move(file+".away", file)
	k.Start(t)
	l := newLoad(t, cluster)
	first := l.signer(t, k)
	k.Stop(t)
	move(file, file+".away")
	k.Start(t)
	says(t, k, http.StatusOK, "the certificate of the root in a token: stat "+file)
	if !strings.Contains(k.Log(), `"about":"root","error":"nobody says now what is to be trusted: what the ledger knows of it goes on serving`) {
		t.Error("the log does not say that nobody says what is to be trusted")
	}
	if l.signer(t, k) != first {
		t.Error("another issuing CA signs, though the root's certificate is away")
	}
	move(file+".away", file)
	l.awaitRenewal(t, k, first)
	says(t, k, http.StatusOK, "")
	l.check(t, k)
}
