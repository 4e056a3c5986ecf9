package crash

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"kedge/test/process"
)

// TestAFullDiskHealsByItself: nothing is issued that cannot be recorded, reading goes on, and when there is room again so does issuing.
func TestAFullDiskHealsByItself(t *testing.T) {
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
	stop()

	fill(t, filepath.Join(disk, "filler"))
	caller := k.Dial(t, nil)
	process.Eventually(t, "a call that is refused since the disk is full", func() error {
		issued, err := caller.Issue(t.Context(), l.keys[0].CSR, l.tokens[0], 0)
		switch {
		case err == nil:
			l.leaves = append(l.leaves, issued.Leaf)
			return errors.New("there was room for one more")
		case status.Code(err) != codes.Unavailable:
			t.Fatalf("the client was told %v", err)
		}
		return nil
	})
	process.Eventually(t, "/readyz to tell of the disk", func() error { // its last verdict may be a second old
		code, body := k.Get(t, "/readyz")
		if code != http.StatusServiceUnavailable || !strings.Contains(body, "the disk is full") || !strings.Contains(body, "free some space") {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
	if _, others := k.Get(t, "/healthz"); others != "ok\n" {
		t.Errorf("/healthz: %s", others)
	}
	if fault := k.Metrics(t)["kedge_ledger_fault"]; fault != 1 {
		t.Errorf("kedge_ledger_fault is %v", fault)
	}
	if r := k.Run(t, "doctor"); r.Code != 4 || !strings.Contains(r.Stdout, "the disk is full") {
		t.Errorf("doctor: %d %s", r.Code, r.Stdout)
	}
	if out := k.Must(t, "ledger", "list", "--limit", "3"); strings.Count(out, "\n") != 4 {
		t.Errorf("reading the ledger meanwhile:\n%s", out)
	}
	health := func(want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		process.Eventually(t, "gRPC health to say "+want.String(), func() error {
			state, err := caller.Health(t.Context())
			if err == nil && state != want {
				err = errors.New(state.String())
			}
			return err
		})
	}
	health(grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	l.check(t, k)

	if err := os.Remove(filepath.Join(disk, "filler")); err != nil {
		t.Fatal(err)
	}
	k.Ready(t, process.Patience)
	health(grpc_health_v1.HealthCheckResponse_SERVING)
	stop = l.start(t, k)
	l.await(t, 50)
	stop()
	l.check(t, k)
	k.Stop(t)
	k.Start(t)
	l.check(t, k)
}

// newCAOnASmallDisk makes a CA whose data folder is on a file system of 4 MiB, mounted at disk.
func newCAOnASmallDisk(t *testing.T, cluster *process.Cluster) (k *process.Kedge, disk string, err error) {
	t.Helper()
	disk = t.TempDir()
	if err := syscall.Mount("kedge-test", disk, "tmpfs", 0, "size=40m,mode=0700"); err != nil {
		return nil, "", err
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(disk, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmounting the tmpfs: %v", err)
		}
	})
	k = newCA(t, cluster, "")
	k.Data = filepath.Join(disk, "data")
	process.Write(t, k.Config, process.Read(t, k.Config)+fmt.Sprintf("dataDir: %q\n", k.Data))
	t.Cleanup(func() { k.Kill(t) }) // before the tmpfs goes
	return k, disk, nil
}

// fill writes a file until there is no room for another octet.
func fill(t *testing.T, path string) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	for size := 1 << 16; size > 0; {
		if _, err := file.Write(make([]byte, size)); errors.Is(err, syscall.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
}
