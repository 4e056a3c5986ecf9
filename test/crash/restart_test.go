package crash

import (
	"crypto/x509"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/test/process"
)

// TestARestartOnAFullDiskHealsByItself: the CA comes up though it can write nothing, so that whoever has to mend it sees what is wrong and what
// was issued. Nobody is served until there is room again, and then everybody is, without a further restart.
func TestARestartOnAFullDiskHealsByItself(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k, disk, err := newCAOnASmallDisk(t, cluster)
	if err != nil {
		process.Impossible(t, "mounting a small tmpfs", err)
		return
	}
	k.Start(t)
	l := newLoad(t, cluster)
	stop := l.start(t, k)
	l.await(t, 50)
	k.Kill(t)
	stop()

	roots := x509.NewCertPool()
	rootFile, clockFile := filepath.Join(k.Data, "root-cert.pem"), filepath.Join(k.Data, "clock.json")
	if !roots.AppendCertsFromPEM([]byte(process.Read(t, rootFile))) {
		t.Fatal("no root")
	}
	for _, path := range []string{rootFile, clockFile} { // what every start writes when it is not there
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	hollow(t, filepath.Join(k.Data, "ledger.db"))
	filler := filepath.Join(disk, "filler")
	fill(t, filler)

	for range 2 { // it ends in good order too, and comes up once more
		k.Start(t)
		checkFullDisk(t, k, roots)
		k.Stop(t)
	}
	k.Start(t)
	if out := k.Must(t, "ledger", "list", "--limit", "3"); strings.Count(out, "\n") != 4 {
		t.Errorf("reading the ledger meanwhile:\n%s", out)
	}
	l.check(t, k)

	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	k.Ready(t, process.Patience)
	process.Eventually(t, "the root certificate file", func() error {
		_, err := os.Stat(rootFile)
		return err
	})
	stop = l.start(t, k)
	l.await(t, 50)
	stop()
	shown, err := served(k, k.Status(t).CSRAddress, roots)
	if err != nil {
		t.Fatal(err)
	}
	const end = "kedge_serving_certificate_not_after_timestamp_seconds"
	if got, want := k.Metrics(t)[end], float64(shown.NotAfter.Unix()); got != want {
		t.Errorf("%s is %v, and the certificate ends at %v", end, got, want)
	}
	if log := k.Log(); !strings.Contains(log, `"msg":"works again","about":"serving certificate"`) {
		t.Error("the log does not say that the serving certificate works again")
	}
	l.check(t, k)
	k.Stop(t)
	k.Start(t)
	k.Ready(t, servesAtOnce)
	l.check(t, k)
}

// checkFullDisk makes sure that a CA that came up on a full disk says so at every door.
func checkFullDisk(t *testing.T, k *process.Kedge, roots *x509.CertPool) {
	t.Helper()
	const full = "the disk is full"
	if greeting := k.Greeting(t); strings.Contains(greeting, "ready after") || !strings.Contains(greeting, full) || !strings.Contains(greeting, "\nNext: kedge doctor") {
		t.Errorf("the greeting:\n%s", greeting)
	}
	code, body := k.Get(t, "/readyz")
	if code != http.StatusServiceUnavailable || !strings.HasPrefix(body, "not ready: ") {
		t.Errorf("/readyz: %d %s", code, body)
	}
	for _, want := range []string{full, "free some space", "\nproblem: serving certificate: ", "\nproblem: root certificate file: ", "\nproblem: guarded clock: "} {
		if !strings.Contains(body, want) {
			t.Errorf("/readyz does not tell of %q:\n%s", want, body)
		}
	}
	if code, body := k.Get(t, "/healthz"); code != http.StatusOK || body != "ok\n" {
		t.Errorf("/healthz: %d %s", code, body)
	}
	metrics := k.Metrics(t)
	for name, want := range map[string]float64{"kedge_ledger_fault": 1, "kedge_serving_certificate_not_after_timestamp_seconds": 0} {
		if got, ok := metrics[name]; !ok || got != want {
			t.Errorf("%s is %v, not %v", name, got, want)
		}
	}
	if got := metrics["kedge_problems"]; got < 4 { // the ledger too
		t.Errorf("kedge_problems is %v", got)
	}
	for _, about := range []string{"ledger", "serving certificate", "root certificate file", "guarded clock"} {
		if sample := `kedge_problem{about="` + about + `",file="",reason=""}`; metrics[sample] != 1 {
			t.Errorf("%s is %v", sample, metrics[sample])
		}
	}
	if r := k.Run(t, "doctor"); r.Code != 4 || !strings.Contains(r.Stdout, full) || !strings.Contains(r.Stdout, "serving certificate") {
		t.Errorf("doctor: %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if out := k.Must(t, "authority", "list"); strings.Count(out, " active ") != 2 {
		t.Errorf("authority list:\n%s", out)
	}
	if _, err := served(k, k.Status(t).CSRAddress, roots); err == nil || !strings.Contains(err.Error(), "internal error") {
		t.Errorf("a handshake: %v", err)
	}
	if r := k.Run(t, "token", "create", "--identity", "ns/default/sa/web"); r.Code != 1 || !strings.Contains(r.Stderr, full) {
		t.Errorf("token create: %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// hollow gives back to the file system what a ledger's file keeps in free pages: then no write fits that the disk has no room for.
func hollow(t *testing.T, path string) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true})
	if err != nil {
		t.Fatal(err)
	}
	tx, err := db.Begin(false)
	if err != nil {
		t.Fatal(err)
	}
	page, end := int64(db.Info().PageSize), tx.Size()
	var free []int64
	for id := range end / page {
		info, err := tx.Page(int(id))
		if err != nil {
			t.Fatal(err)
		}
		if info.Type == "free" {
			free = append(free, id*page)
		}
	}
	if err := errors.Join(tx.Rollback(), db.Close()); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	punch := func(offset, length int64) error {
		return unix.Fallocate(int(file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
	}
	for _, offset := range free {
		err = errors.Join(err, punch(offset, page))
	}
	if info, statErr := file.Stat(); statErr != nil {
		err = errors.Join(err, statErr)
	} else if size := info.Size(); size > end {
		err = errors.Join(err, punch(end, size-end))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestAStartWhoseWritesFailHealsByItself: the first fsync of every thread fails. That is no reason to be away.
func TestAStartWhoseWritesFailHealsByItself(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		process.Impossible(t, "strace is not installed", err)
		return
	}
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "")
	k.Start(t)
	k.Stop(t)
	k.Env = []string{"GOMAXPROCS=1"} // few threads
	k.Through = []string{strace, "--follow-forks", "--output=/dev/null", "--trace=fdatasync", "--inject=fdatasync:error=EIO:when=1"}
	k.Start(t)
	k.Ready(t, process.Patience)
	issued := eventuallyIssued(t, k, cluster)
	for _, want := range []string{"input/output error", `"msg":"works again","about":"serving certificate"`} {
		if !strings.Contains(k.Log(), want) {
			t.Errorf("the log does not have %q", want)
		}
	}
	k.CheckLedger(t, []*x509.Certificate{issued.Leaf})
	k.Kill(t)
}

// eventuallyIssued asks for a certificate until there is one. Meanwhile a client is told nothing but Unavailable.
func eventuallyIssued(t *testing.T, k *process.Kedge, cluster *process.Cluster) (issued *process.Issued) {
	t.Helper()
	caller, key, token := k.Dial(t, nil), process.NewKey(t), cluster.Token(t, "default", "web")
	process.Eventually(t, "a certificate", func() (err error) {
		issued, err = caller.Issue(t.Context(), key.CSR, token, 0)
		if err != nil && status.Code(err) != codes.Unavailable {
			t.Fatal(err)
		}
		return err
	})
	return issued
}
