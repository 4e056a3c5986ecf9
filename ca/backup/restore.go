package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"kedge/ca"
	"kedge/ca/ledger"
)

// Options of a restore.
type Options struct {
	From    string       // a backup's file, or a data folder that no CA runs on
	Dir     string       // the data folder to make: it is not there yet, or empty
	Mark    string       // file of the high-water mark that the lost CA kept outside its data folder; "": there is none
	By      string       // who restores, for the ledger
	Version string       // of this program
	Clock   ca.Clock     //
	Logger  *slog.Logger // gets what is odd and stops nothing
}

// Report says what a restore did.
type Report struct {
	Dir         string          `json:"data_dir"`
	TrustDomain string          `json:"trust_domain"`
	Log         ledger.LogID    `json:"log"`    // that begins
	Number      uint64          `json:"number"` // of the restore event
	Bundle      uint64          `json:"bundle_sequence"`
	Events      uint64          `json:"events"` // verified
	Restore     *ledger.Restore `json:"restore"`
	Root        bool            `json:"root"` // the root's files were there
}

// Lost counts the events that the high-water mark knew of, and that are not here.
func (r Report) Lost() uint64 {
	if m := r.Restore.Mark; m != nil && m.Log == r.Restore.Log && m.Number > r.Restore.Number {
		return m.Number - r.Restore.Number
	}
	return 0
}

// Restore makes a data folder from a backup, or from a data folder that was put back by hand. Everything is verified, and a new log begun,
// in a folder beside the one that is to be made, which gets its name only when it is complete: there is all of it, or nothing.
func Restore(ctx context.Context, o Options) (report Report, err error) {
	if o.Dir, err = target(o.Dir); err != nil {
		return report, err
	}
	temporary, err := os.MkdirTemp(filepath.Dir(o.Dir), "."+filepath.Base(o.Dir)+".restoring-*") // mode 0700
	if err != nil {
		return report, fmt.Errorf("making a folder to restore to: %w", err)
	}
	if report, err = restore(ctx, o, temporary); err != nil {
		return report, errors.Join(fmt.Errorf("restoring from %s: %w", o.From, err), os.RemoveAll(temporary))
	}
	report.Dir = o.Dir
	return report, nil
}

// target says where the new data folder goes, and makes sure that nothing is there.
func target(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("finding the folder to restore to: %w", err)
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("looking at the folder to restore to: %w", err)
	}
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
			return "", fmt.Errorf("making the folder to restore to: %w", err)
		}
		return dir, nil
	case err != nil:
		return "", fmt.Errorf("looking at the folder to restore to: %w", err)
	case len(entries) > 0:
		return "", fmt.Errorf("the folder %s is not empty: restore into a new folder, or move this one away first; nothing is ever restored over a data folder", dir)
	}
	var inside, outside unix.Stat_t
	if err := errors.Join(unix.Stat(dir, &inside), unix.Stat(filepath.Dir(dir), &outside)); err != nil {
		return "", fmt.Errorf("looking at the folder to restore to: %w", err)
	}
	if inside.Dev != outside.Dev {
		return "", fmt.Errorf("the folder %s is where a file system is mounted, and a restored folder gets its name all at once, by being renamed: "+
			"restore into a folder within it, such as %s, and make that the dataDir", dir, filepath.Join(dir, "data"))
	}
	return dir, nil
}

// source is what is known of the place that everything came from.
type source struct {
	taken ledger.Time  // 0: of its last event
	head  *ledger.Head // that the ledger must have; nil: that is not known
	mark  string       // file of a high-water mark; "": there is none
}

func restore(ctx context.Context, o Options, temporary string) (report Report, err error) {
	release, err := ledger.Lock(temporary)
	if err != nil {
		return report, err
	}
	defer release() // the folder has its name by then, or is gone
	info, err := os.Stat(o.From)
	if err != nil {
		return report, err
	}
	var from source
	if info.IsDir() {
		from, err = copyFolder(ctx, o.From, temporary)
	} else {
		from, err = unpack(ctx, o.From, temporary)
	}
	if err != nil {
		return report, err
	}
	if o.Mark != "" {
		from.mark = o.Mark
	}
	seen, err := ledger.Look(temporary, o.Version, nil)
	if err != nil {
		return report, err
	}
	if from.head != nil && *from.head != seen.Head {
		return report, fmt.Errorf("its manifest says that the ledger ends with event %d of log %s, and that ends with event %d of log %s",
			from.head.Number, from.head.Log, seen.Head.Number, seen.Head.Log)
	}
	// Without a clock the new CA would begin with the time of the restore, on the word of this machine alone (I8).
	guarded, err := ca.OpenGuardedClock(filepath.Join(temporary, clockFile), o.Clock, seen.Head.Time.Time())
	if err == nil {
		err = guarded.Save()
	}
	if err != nil {
		return report, err
	}
	if report, err = newLog(ctx, o, temporary, seen.TrustDomain, from); err != nil {
		return report, err
	}
	_, err = os.Stat(filepath.Join(temporary, rootFolder))
	report.Root = err == nil
	for _, dir := range []string{filepath.Join(temporary, rootFolder), filepath.Join(temporary, keysFolder), temporary} {
		if err := syncFolder(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return report, err
		}
	}
	// rename(2) replaces an empty folder, which os.Rename does not. It fails when there is something in it by now.
	if err := unix.Rename(temporary, o.Dir); err != nil {
		return report, fmt.Errorf("giving the restored folder the name %s: %w", o.Dir, err)
	}
	return report, syncFolder(filepath.Dir(o.Dir))
}

// newLog verifies the ledger in a folder and begins a new log in it.
func newLog(ctx context.Context, o Options, dir, trustDomain string, from source) (report Report, err error) {
	book, err := ledger.Open(dir, ledger.Options{TrustDomain: trustDomain, ProgramVersion: o.Version, Now: o.Clock.Wall, Logger: o.Logger})
	if err != nil {
		return report, err
	}
	defer func() { err = errors.Join(err, book.Close()) }()
	verified, err := book.Verify(ctx)
	if err != nil {
		return report, err
	}
	if len(verified.Problems) > 0 {
		return report, fmt.Errorf("its ledger does not verify, so nothing was restored:\n  %s", strings.Join(verified.Problems, "\n  "))
	}
	r := ledger.Restore{Taken: from.taken, By: o.By}
	if r.Taken == 0 {
		r.Taken = book.Head().Time
	}
	if from.mark != "" {
		switch mark, err := ledger.ReadMark(from.mark); {
		case err == nil:
			r.Mark = &mark
		case !errors.Is(err, fs.ErrNotExist):
			o.Logger.Warn("what the high-water mark knew is not recorded", "error", err)
		}
	}
	event, err := book.Restore(ctx, r)
	if err != nil {
		return report, err
	}
	bundle, err := book.CurrentBundle()
	if err != nil {
		return report, err
	}
	report = Report{TrustDomain: trustDomain, Log: event.Log, Number: event.Number, Bundle: bundle.Sequence, Events: verified.Events, Restore: event.Body.(*ledger.Restore)}
	return report, ledger.WriteMark(filepath.Join(dir, ledger.MarkFile), book.Head().Mark())
}

// unpack puts the files of a backup into a folder.
func unpack(ctx context.Context, path, dir string) (from source, err error) {
	file, err := os.Open(path)
	if err != nil {
		return from, err
	}
	defer file.Close() // it was only read
	m, err := Read(reader{ctx, file}, func(file File) (io.WriteCloser, error) { return newFile(dir, file.Name) })
	return source{taken: m.Taken, head: &m.Ledger}, err
}

// copyFolder copies from a data folder what a backup of it would hold.
func copyFolder(ctx context.Context, from, dir string) (s source, err error) {
	release, err := ledger.Lock(from)
	if err != nil {
		return s, err
	}
	defer release() // nothing of it was changed
	names := []string{ledgerFile, formatFile, clockFile}
	for _, folder := range []string{rootFolder, keysFolder} {
		entries, err := os.ReadDir(filepath.Join(from, folder))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return s, err
		}
		for _, entry := range entries {
			if name := folder + "/" + entry.Name(); fileName.MatchString(name) { // not what a crash left half-written
				names = append(names, name)
			}
		}
	}
	for _, name := range names {
		if err := copyFile(ctx, from, dir, name); err != nil && !(name == clockFile && errors.Is(err, fs.ErrNotExist)) {
			return s, err
		}
	}
	return source{mark: filepath.Join(from, ledger.MarkFile)}, nil
}

func copyFile(ctx context.Context, from, dir, name string) error {
	file, err := os.Open(filepath.Join(from, filepath.FromSlash(name)))
	if err != nil {
		return err
	}
	defer file.Close() // it was only read
	to, err := newFile(dir, name)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, reader{ctx, file})
	return errors.Join(err, to.Close())
}

// newFile makes a file of mode 0600, durable once it is closed, and its folder.
func newFile(dir, name string) (io.WriteCloser, error) {
	path := filepath.Join(dir, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return durable{file}, nil
}

type durable struct{ *os.File }

func (d durable) Close() error { return errors.Join(d.Sync(), d.File.Close()) }

// reader reads until ctx ends.
type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r reader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(b)
}

// syncFolder makes the names in a folder durable.
func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
