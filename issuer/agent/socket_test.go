package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/ca/atomicfile"
)

var private = atomicfile.Private

func TestASocketIsForThoseWhoMayUseIt(t *testing.T) {
	for _, c := range []struct {
		access       atomicfile.Access
		folder, sock fs.FileMode
	}{
		{private, 0o700, 0o600},
		{atomicfile.Access{Mode: 0o660, Group: os.Getegid()}, 0o750, 0o660},
		{atomicfile.Access{Mode: 0o666, Group: -1}, 0o755, 0o666},
	} {
		path := filepath.Join(t.TempDir(), "run", "agent.sock")
		l, err := listen(Socket{Path: path, Access: c.access, MaxConnections: 1}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]fs.FileMode{filepath.Dir(path): c.folder, path: c.sock} {
			if info, err := os.Stat(name); err != nil || info.Mode().Perm() != want {
				t.Errorf("%s has the mode %v, not %v (%v)", name, info.Mode().Perm(), want, err)
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
	}
}

// TestASocketThatIsRemovedIsAProblem: those who have a connection keep it, and nobody else gets one.
func TestASocketThatIsRemovedIsAProblem(t *testing.T) {
	b := newBench(t, time.Hour)
	socket := Socket{Path: filepath.Join(t.TempDir(), "s", "agent.sock"), Access: private, MaxConnections: 1}
	d, err := openDoor(b.identity, []Socket{socket})
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	if d.look(b.identity); len(b.problems()) != 0 {
		t.Errorf("the socket is there, and the problems are %v", b.problems())
	}
	if err := os.RemoveAll(filepath.Dir(socket.Path)); err != nil {
		t.Fatal(err)
	}
	d.look(b.identity)
	d.look(b.identity)
	if all := b.problems(); len(all) != 1 || !strings.Contains(all[0].Err.Error(), "start the agent again") {
		t.Errorf("the socket is gone, and the problems are %v", all)
	}
	if n := b.said("nobody can connect any more"); n != 1 {
		t.Errorf("it is said %d times", n)
	}
	if err := os.Mkdir(filepath.Dir(socket.Path), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, socket.Path, "another file")
	if d.look(b.identity); len(b.problems()) != 1 {
		t.Errorf("another file is there, and the problems are %v", b.problems())
	}
}

// TestThoseForWhomSocketsAndFilesAreGetToThem, through all the folders that were made; a folder that was there and is closed is said.
func TestThoseForWhomSocketsAndFilesAreGetToThem(t *testing.T) {
	under := inMemory(t)
	if under == "" {
		return
	}
	if err := os.Chmod(under, 0o711); err != nil {
		t.Fatal(err)
	}
	group := atomicfile.Access{Mode: 0o660, Group: os.Getgid()}
	var said bytes.Buffer
	log := slog.New(slog.NewTextHandler(&said, nil))
	if err := prepareState(filepath.Join(under, "kedge", "state")); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(under, "kedge", "state")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the state folder: %v (%v)", info.Mode(), err)
	}
	l, err := listen(Socket{Path: filepath.Join(under, "kedge", "web", "agent.sock"), Access: group, MaxConnections: 1}, log)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := atomicfile.WriteSetFor(atomicfile.Access{Mode: 0o644, Group: -1}, filepath.Join(under, "others", "batch", "svid"), map[string][]byte{"key.pem": nil}); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]fs.FileMode{"kedge": 0o711, "kedge/web": 0o750, "others": 0o711, "others/batch": 0o711, "others/batch/svid": 0o755} {
		if info, err := os.Stat(filepath.Join(under, dir)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, not %v (%v)", dir, info.Mode(), want, err)
		}
	}
	if strings.Contains(said.String(), "WARN") {
		t.Errorf("it is said that somebody does not get there: %s", said.String())
	}
	closed := filepath.Join(under, "kedge", "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err = listen(Socket{Path: filepath.Join(closed, "agent.sock"), Access: group, MaxConnections: 1}, log)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if !strings.Contains(said.String(), "chmod o+x "+closed) {
		t.Errorf("nobody gets to the socket, and what is said is: %s", said.String())
	}
}

// TestNothingButTheSocketIsOpenedToOthers: the folder may be the workload's user's, and a link in the place of the socket leads to what is not his.
func TestNothingButTheSocketIsOpenedToOthers(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), "private")
	write(t, elsewhere, "secret")
	dir := t.TempDir()
	access := atomicfile.Access{Mode: 0o666, Group: os.Getgid()}
	if err := os.Symlink(elsewhere, filepath.Join(dir, "agent.sock")); err != nil {
		t.Fatal(err)
	}
	if err := grantSocket(filepath.Join(dir, "agent.sock"), access); err == nil {
		t.Error("a link that leads elsewhere is taken for the socket")
	}
	if info, err := os.Stat(elsewhere); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("others may use what is not theirs: %v (%v)", info.Mode(), err)
	}
	folder := filepath.Join(dir, "folder")
	if err := os.Symlink(filepath.Dir(elsewhere), folder); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(folder)
	if err != nil {
		t.Fatal(err)
	}
	if err := grantFolder(folder, access); err == nil {
		t.Error("what a link leads to is taken for the folder that was made")
	}
	if after, err := os.Stat(folder); err != nil || after.Mode() != before.Mode() {
		t.Errorf("others may enter what is not theirs: %v (%v)", after.Mode(), err)
	}
}

// TestASocketIsNotTakenFromWhoServesIt, nor is anything else that has its name; what a killed agent left is replaced.
func TestASocketIsNotTakenFromWhoServesIt(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "agent.sock")
	try := func() (*listener, error) {
		return listen(Socket{Path: path, Access: private, MaxConnections: 1}, slog.New(slog.DiscardHandler))
	}
	first, err := try()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := try(); err == nil || !strings.Contains(err.Error(), "is served by another process") {
		t.Errorf("the socket of a running agent: %v", err)
	}
	first.Listener.(*net.UnixListener).SetUnlinkOnClose(false) // as one that is killed
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := try()
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	write(t, path, "a file")
	if _, err := try(); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("a file of that name: %v", err)
	}
	path = filepath.Join(dir, strings.Repeat("x", 110))
	if _, err := try(); err == nil || !strings.Contains(err.Error(), "choose a shorter one") {
		t.Errorf("a long path: %v", err)
	}
}

// TestConnectionsAreCountedAndTheirPeersLogged.
func TestConnectionsAreCountedAndTheirPeersLogged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	var log bytes.Buffer
	l, err := listen(Socket{Path: path, Access: private, MaxConnections: 2}, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dial := func() net.Conn {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	accepted := make(chan net.Conn)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- conn
		}
	}()
	one, two := dial(), dial()
	defer one.Close()
	defer two.Close()
	first, second := <-accepted, <-accepted
	three := dial()
	defer three.Close()
	if n, err := three.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("one connection too many reads %d octets, and %v", n, err)
	}
	if err := errors.Join(first.Close(), second.Close()); err != nil {
		t.Error(err)
	}
	_ = second.Close() // as gRPC may: it counts once
	four := dial()
	defer four.Close()
	(<-accepted).Close()
	if open := l.open.Load(); open != 0 {
		t.Errorf("%d connections are counted", open)
	}
	who := fmt.Sprintf("pid %d", os.Getpid())
	if got := strings.Count(log.String(), "a workload has connected"); got != 3 || strings.Count(log.String(), who) != 4 || !strings.Contains(log.String(), fmt.Sprintf("uid %d", os.Getuid())) {
		t.Errorf("the log says:\n%s", log.String())
	}
	if !strings.Contains(log.String(), "as many as there may be") || l.refused.Load() != 1 {
		t.Errorf("the log says:\n%s", log.String())
	}
}

// TestAFolderThatEverybodyMayWriteToIsSaid: somebody else could put his own socket there.
func TestAFolderThatEverybodyMayWriteToIsSaid(t *testing.T) {
	for mode, said := range map[fs.FileMode]bool{0o777: true, 0o777 | fs.ModeSticky: false, 0o755: false} {
		dir := t.TempDir()
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		l, err := listen(Socket{Path: filepath.Join(dir, "s"), Access: private, MaxConnections: 1}, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if got := strings.Contains(log.String(), "everybody may replace the socket"); got != said {
			t.Errorf("mode %v: it is said: %t", mode, got)
		}
	}
}
