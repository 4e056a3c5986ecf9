package crash

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/test/process"
)

// TestFileDescriptorsThatAreGoneComeBack: the process has as many files open as it may. Callers that are connected are served on, others wait, the log tells of
// it, and when there are descriptors again so is everything else.
func TestFileDescriptorsThatAreGoneComeBack(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "log: {level: warn}\n")
	k.Start(t)
	l := newLoad(t, cluster)
	stop := l.start(t, k)
	l.await(t, 50)
	status := k.Status(t)

	var before unix.Rlimit
	err := unix.Prlimit(k.PID(), unix.RLIMIT_NOFILE, nil, &before)
	if err == nil {
		err = unix.Prlimit(k.PID(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 8, Max: before.Max}, nil) // fewer than it has
	}
	if err != nil {
		process.Impossible(t, "limiting the descriptors of a process that runs", err)
		return
	}
	var waiting []net.Conn
	for _, address := range []string{status.CSRAddress, status.OpsAddress} {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		waiting = append(waiting, conn)
	}
	process.Eventually(t, "the log to tell of it", func() error {
		for _, door := range []string{"csr.listen", "operations.listen"} {
			if log := k.Log(); !strings.Contains(log, fmt.Sprintf(`"door":%q`, door)) || !strings.Contains(log, "too many open files") || !strings.Contains(log, "raise the limit") {
				return errors.New("it does not tell of " + door)
			}
		}
		return nil
	})
	l.await(t, 200)

	if err := unix.Prlimit(k.PID(), unix.RLIMIT_NOFILE, &before, nil); err != nil {
		t.Fatal(err)
	}
	k.Ready(t, process.Patience)
	process.Eventually(t, "new callers to be served", func() error {
		issued, err := k.Dial(t, nil).Issue(t.Context(), l.keys[0].CSR, l.tokens[0], 0)
		if err == nil {
			l.mu.Lock()
			l.leaves = append(l.leaves, issued.Leaf)
			l.mu.Unlock()
		}
		return err
	})
	for _, conn := range waiting {
		if _, err := conn.Write([]byte("GET /healthz HTTP/1.1\r\nHost: kedge\r\n\r\n")); err != nil {
			t.Errorf("a connection that had to wait: %v", err)
		}
	}
	l.await(t, 50)
	stop()
	if refused := l.refused.Load(); refused > 0 {
		t.Errorf("%d callers that were connected were refused", refused)
	}
	l.check(t, k)
}
