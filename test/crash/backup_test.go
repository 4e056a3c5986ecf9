package crash

import (
	"archive/tar"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/ca/ledger"
	"kedge/issuer/admin"
	"kedge/test/process"
)

// joinToken makes a join token, and spends it at once if spend says so.
func joinToken(t *testing.T, k *process.Kedge, spend bool) string {
	t.Helper()
	token := strings.TrimSpace(k.Must(t, "token", "create", "--identity", "ns/default/sa/web"))
	if spend {
		if _, err := k.Dial(t, nil).Issue(t.Context(), process.NewKey(t).CSR, token, 0); err != nil {
			t.Fatal(err)
		}
	}
	return token
}

// holder is a client that has a certificate of a CA.
func holder(t *testing.T, k *process.Kedge, token string) *tls.Certificate {
	t.Helper()
	key := process.NewKey(t)
	issued, err := k.Dial(t, nil).Issue(t.Context(), key.CSR, token, 0)
	if err != nil {
		t.Fatal(err)
	}
	return key.Certificate(issued)
}

// issueOf is what the ledger has of a certificate; nil when it has nothing.
func issueOf(events []admin.Event, leaf *x509.Certificate) *admin.Event {
	serial := ledger.Serial(leaf.SerialNumber.Bytes()).String()
	at := slices.IndexFunc(events, func(e admin.Event) bool { return e.Issue != nil && e.Issue.Serial.String() == serial })
	if at < 0 {
		return nil
	}
	return &events[at]
}

// TestABackupUnderLoadBringsTheCABack: it is made while clients are at work, the CA is killed, and another comes back from it in a new folder.
// What each of the old one's certificates and tokens is worth there is what the ledger can know.
func TestABackupUnderLoadBringsTheCABack(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	const yaml = "log: {level: warn}\nprofiles: {default: {backdate: 0s}}\n"
	lost := newCA(t, cluster, yaml)
	lost.Start(t)
	web := cluster.Token(t, "default", "web")
	before, tokens := holder(t, lost, web), map[string]string{"spent": joinToken(t, lost, true), "outstanding": joinToken(t, lost, false)}
	later := joinToken(t, lost, false)

	l := newLoad(t, cluster)
	stop := l.start(t, lost)
	l.await(t, 200)
	l.mu.Lock()
	held := slices.Clone(l.leaves) // the backup has these for certain
	l.mu.Unlock()
	saved := filepath.Join(t.TempDir(), "backup.tar")
	lost.Must(t, "backup", "--out", saved)
	l.await(t, 100)
	after := holder(t, lost, web)
	if _, err := lost.Dial(t, nil).Issue(t.Context(), process.NewKey(t).CSR, later, 0); err != nil {
		t.Fatal(err)
	}
	tokens["spent after the backup"] = later
	bundle := lost.Status(t).Bundle
	lost.Kill(t)
	stop()

	k := newCA(t, cluster, yaml)
	k.Must(t, "restore", "--from", saved)
	k.Start(t)
	k.Ready(t, servesAtOnce)
	k.CheckLedger(t, append(held, before.Leaf))
	events := k.Export(t)
	if issueOf(events, after.Leaf) != nil {
		t.Fatal("the restored ledger knows what was issued after the backup")
	}
	restores := slices.DeleteFunc(slices.Clone(events), func(e admin.Event) bool { return e.Restore == nil })
	if len(restores) != 1 || restores[0].Restore.Log != events[0].Log || restores[0].Log == events[0].Log || events[len(events)-1].Log != restores[0].Log {
		t.Errorf("restores %+v", restores)
	}
	if got := k.Status(t).Bundle; got <= bundle || got < uint64(time.Now().Add(-time.Hour).Unix()) {
		t.Errorf("the bundle's sequence is %d, and was %d", got, bundle)
	}

	// Certificates of before the backup renew, and so do those of which nothing is known.
	key := process.NewKey(t)
	renewed, err := k.Dial(t, before).Issue(t.Context(), key.CSR, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	unknown, err := k.Dial(t, after).Issue(t.Context(), key.CSR, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	events = k.Export(t)
	if was, is := issueOf(events, before.Leaf), issueOf(events, renewed.Leaf); is.Issue.Replaces != was.Number || is.Issue.Holder != was.Issue.Holder {
		t.Errorf("what was renewed is %+v, and the one before it %+v", is.Issue, was.Issue)
	}
	if is := issueOf(events, unknown.Leaf); is.Issue.Replaces != 0 || is.Issue.Holder != (ledger.Holder{Kind: "lineage", ID: ledger.Serial(after.Leaf.SerialNumber.Bytes()).String()}) {
		t.Errorf("what was renewed for an unknown one is %+v", is.Issue)
	}
	renewed.Roots = x509.NewCertPool() // of before
	renewed.Roots.AppendCertsFromPEM([]byte(process.Read(t, filepath.Join(lost.Data, "root-cert.pem"))))
	if err := renewed.VerifyAt(time.Now()); err != nil {
		t.Errorf("under the root of before: %v", err)
	}
	for what, token := range tokens {
		if _, err := k.Dial(t, nil).Issue(t.Context(), key.CSR, token, 0); status.Code(err) != codes.Unauthenticated {
			t.Errorf("a join token that was %s: %v", what, err)
		}
	}

	// The lost CA was not lost after all, and still signs: what it signs since the restore proves nothing here, and no serial is there twice.
	lost.Start(t)
	var alive *tls.Certificate
	process.Eventually(t, "a certificate of after the second of the restore", func() error {
		if alive = holder(t, lost, web); ledger.At(alive.Leaf.NotBefore) > restores[0].Time {
			return nil
		}
		return errors.New("it is of the same second")
	})
	if _, err := k.Dial(t, alive).Issue(t.Context(), key.CSR, "", 0); status.Code(err) != codes.Unauthenticated || !strings.Contains(k.Log(), "is not in the ledger") {
		t.Errorf("a certificate that the lost CA issued after the restore: %v", err)
	}
	young := newLoad(t, cluster)
	stop = young.start(t, k)
	young.await(t, 200)
	k.Kill(t)
	stop()
	k.Start(t)
	young.check(t, k)
	lost.CheckLedger(t, append(l.leaves, alive.Leaf))
	serials := map[string]bool{}
	for _, leaf := range l.leaves {
		serials[leaf.SerialNumber.String()] = true
	}
	for _, leaf := range young.leaves {
		if serials[leaf.SerialNumber.String()] {
			t.Errorf("both CAs gave the serial %x", leaf.SerialNumber)
		}
	}
}

// TestALedgerThatIsPutBackAfterACrashIsNoticed: the high-water mark was written while the CA ran.
func TestALedgerThatIsPutBackAfterACrashIsNoticed(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "log: {level: warn}\n")
	k.Start(t)
	saved := filepath.Join(t.TempDir(), "backup.tar")
	k.Must(t, "backup", "--out", saved)
	l := newLoad(t, cluster)
	stop := l.start(t, k)
	l.await(t, 50)
	number := k.Status(t).Number
	path := filepath.Join(k.Data, ledger.MarkFile)
	process.Eventually(t, "the high-water mark", func() error {
		mark, err := ledger.ReadMark(path)
		if err == nil && mark.Number < number {
			err = fmt.Errorf("it is at %d, and the ledger was at %d", mark.Number, number)
		}
		return err
	})
	k.Kill(t)
	stop()
	k.Start(t) // the mark is behind, which is as it should be
	k.Kill(t)
	mark, err := ledger.ReadMark(path)
	if err != nil {
		t.Fatal(err)
	}

	putBack(t, saved, k.Data)
	for range 2 {
		k.Launch(t)
		if code := k.Wait(t); code != 1 {
			t.Fatalf("exit code %d\n%s", code, k.Log())
		}
		for _, want := range []string{fmt.Sprintf("event %d was recorded in log %s", mark.Number, mark.Log), "kedge restore --from " + k.Data + " --data NEWFOLDER"} {
			if !strings.Contains(k.Log(), want) {
				t.Errorf("the log does not say %q:\n%s", want, k.Log())
			}
		}
	}
	restored := newCA(t, cluster, "")
	var report struct{ Restore ledger.Restore }
	if err := json.Unmarshal([]byte(restored.Must(t, "restore", "--from", k.Data, "--json")), &report); err != nil || *report.Restore.Mark != mark {
		t.Errorf("the restore says %+v, %v", report.Restore, err)
	}
	restored.Start(t)
	issued, err := restored.Dial(t, nil).Issue(t.Context(), process.NewKey(t).CSR, cluster.Token(t, "default", "web"), 0)
	if err != nil {
		t.Fatal(err)
	}
	restored.CheckLedger(t, []*x509.Certificate{issued.Leaf})
}

// putBack does by hand what is not to be done: it puts the ledger of a backup into a data folder.
func putBack(t *testing.T, saved, data string) {
	t.Helper()
	file, err := os.Open(saved)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for r := tar.NewReader(file); ; {
		header, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if header.Name != "ledger.db" {
			continue
		}
		to, err := os.OpenFile(filepath.Join(data, "ledger.db"), os.O_WRONLY|os.O_TRUNC, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(to, r)
		if err := errors.Join(err, to.Close()); err != nil {
			t.Fatal(err)
		}
		return
	}
}
