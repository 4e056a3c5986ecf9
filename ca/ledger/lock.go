package ledger

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// How long Lock waits for a process that is about to end, or whose child holds what it had for a moment between fork and exec, and how often it looks.
const (
	lockWait = time.Second
	lockLook = 20 * time.Millisecond
)

// Lock takes the data folder dir for this process, until release is called or the process ends, however it ends: the lock is
// the kernel's. When another process has it, for longer than one that ends does, the error wraps ErrLocked and names that process.
func Lock(dir string) (release func() error, err error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the data folder %s: %w", dir, err)
	}
	for until := time.Now().Add(lockWait); ; <-time.After(lockLook) {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(until) {
			break
		}
	}
	if err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("locking the data folder %s: flock %s: %w", dir, path, err)
		}
		text, readErr := io.ReadAll(io.LimitReader(f, 32))
		holder := "process " + strings.TrimSpace(string(text))
		if _, convErr := strconv.Atoi(strings.TrimSpace(string(text))); readErr != nil || convErr != nil {
			holder = "another process"
		}
		return nil, fmt.Errorf("%w: %s holds %s; one data folder serves one CA: stop that process, or give this one a folder of its own",
			ErrLocked, holder, dir)
	}
	_ = writePID(f) // it holds without: a full disk keeps nobody out, and a second process is then told of "another process"
	return f.Close, nil
}

func writePID(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}
