package crash

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/test/process"
)

// recording is what a CA did to its disk, call by call, in all the lives that it had, as strace saw it.
type recording struct {
	root  string // the folder whose calls are kept; everything else is nothing to it
	lines int    // of strace
	calls []*call
}

// call is a system call that changes the disk, or makes changes durable. A call that failed is none.
type call struct {
	name         string // "": none; "death": the process is gone, and left is what it left
	path, to     string // below root; to is where a rename leads
	makes, cuts  bool   // openat: it makes the file when it is not there, it cuts it to nothing
	data         []byte
	offset, size int64
	began, ended int       // lines. When the process was gone before the call ended, that is never
	at           time.Time // when it began
	left         *node
}

// never is a line that no recording reaches.
const never = 1 << 60

// recorded are all the calls that change a disk. One that the recording does not know how to play makes it fail.
const recorded = "openat,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat," +
	"write,pwrite64,writev,pwritev,pwritev2,truncate,ftruncate,fallocate,copy_file_range,sendfile,splice,fsync,fdatasync,sync,syncfs"

// live records a CA's life under strace: life starts it, and sees to its end.
func (r *recording) live(t *testing.T, k *process.Kedge, life func(), flags ...string) {
	t.Helper()
	output := filepath.Join(k.Dir, "trace")
	k.Through = append([]string{"strace", "--follow-forks", "--output=" + output, "-ttt", "--decode-fds=path", "--strings-in-hex=all",
		"--string-limit=4194304", "--trace=" + recorded}, flags...)
	life()
	k.Wait(t)
	k.Through = nil
	left, err := readDisk(r.root)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(output)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := r.read(f); err != nil {
		t.Fatal(err)
	}
	r.lines++
	r.calls = append(r.calls, &call{name: "death", began: r.lines, ended: r.lines, at: time.Now(), left: left})
}

// signalled sends a signal to kedge itself, which strace runs.
func signalled(t *testing.T, k *process.Kedge, signal syscall.Signal) {
	t.Helper()
	pid, err := strconv.Atoi(strings.TrimSpace(process.Read(t, filepath.Join(k.Data, "lock"))))
	if err == nil {
		err = syscall.Kill(pid, signal)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// read adds the lines of one life.
func (r *recording) read(lines io.Reader) error {
	const begun = " <unfinished ...>"
	type half struct {
		*call
		text string
	}
	open := map[string]half{} // by thread
	for reader := bufio.NewReaderSize(lines, 1<<20); ; {
		line, err := reader.ReadString('\n')
		if errors.Is(err, io.EOF) && line == "" {
			break
		}
		if err != nil {
			return fmt.Errorf("strace's line %d is cut short: %w", r.lines+1, err)
		}
		r.lines++
		thread, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		stamp, text, _ := strings.Cut(strings.TrimSpace(rest), " ")
		if strings.HasPrefix(text, "---") || strings.HasPrefix(text, "+++") { // a signal, an end
			continue
		}
		var c *call
		if resumed, yes := strings.CutPrefix(text, "<... "); yes {
			_, resumed, _ = strings.Cut(resumed, " resumed>")
			c, text = open[thread].call, open[thread].text+resumed
			delete(open, thread)
			if c == nil {
				return fmt.Errorf("strace's line %d ends what never began: %.200s", r.lines, line)
			}
		} else {
			seconds, micros, _ := strings.Cut(stamp, ".")
			s, err := strconv.ParseInt(seconds, 10, 64)
			us, err2 := strconv.ParseInt(micros, 10, 64)
			if err = errors.Join(err, err2); err != nil {
				return fmt.Errorf("strace's line %d: %w", r.lines, err)
			}
			c = &call{began: r.lines, at: time.Unix(s, us*1000)}
			r.calls = append(r.calls, c)
		}
		if beginning, yes := strings.CutSuffix(text, begun); yes {
			open[thread] = half{c, beginning}
			continue
		}
		c.ended = r.lines
		if err := c.parse(strings.Replace(text, begun+")", ")", 1), r.root); err != nil {
			return fmt.Errorf("strace's line %d: %w: %.200s", r.lines, err, text)
		}
	}
	for _, c := range open { // the process was gone before they ended
		if strings.HasPrefix(c.text, "???") {
			continue
		}
		if err := c.parse(c.text+") = ?", r.root); err != nil {
			return fmt.Errorf("strace's line %d: %w: %.200s", c.began, err, c.text)
		}
	}
	return nil
}

// parse reads a whole call. With --strings-in-hex nothing in it but the call's own syntax has a comma or a parenthesis.
func (c *call) parse(text, root string) (err error) {
	name, rest, ok := strings.Cut(text, "(")
	end := strings.LastIndex(rest, ") ")
	if !ok || end < 0 {
		return errors.New("it is no call")
	}
	args, result := strings.Split(rest[:end], ", "), strings.TrimLeft(rest[end+1:], " =")
	if strings.HasPrefix(result, "-1 ") {
		return nil
	}
	if result == "?" {
		c.ended = never
	}
	number := func(i int) (n int64) {
		if err == nil {
			n, err = strconv.ParseInt(args[i], 10, 64)
		}
		return n
	}
	switch name {
	case "openat":
		c.path = join(root, args[0], args[1])
		c.makes, c.cuts = strings.Contains(args[2], "O_CREAT"), strings.Contains(args[2], "O_TRUNC")
		if !c.makes && !c.cuts {
			return nil
		}
	case "mkdirat", "unlinkat":
		c.path = join(root, args[0], args[1])
	case "renameat":
		c.path, c.to = join(root, args[0], args[1]), join(root, args[2], args[3])
	case "write", "pwrite64":
		if c.path = join(root, args[0], ""); c.path == "" {
			return nil
		}
		if c.data, err = unhex(args[1]); err != nil {
			return err
		}
		if name == "pwrite64" {
			c.offset = number(3)
		}
		if c.ended != never && result != strconv.Itoa(len(c.data)) {
			return errors.New("a write was not written as a whole, or strace does not show all of it")
		}
	case "ftruncate":
		c.path, c.size = join(root, args[0], ""), number(1)
	case "fsync", "fdatasync":
		c.path = join(root, args[0], "")
	default:
		for _, arg := range args {
			if strings.Contains(arg, hexed(root)) {
				return errors.New("how to play this call is not known")
			}
		}
	}
	if err == nil && c.path != "" {
		c.name = name
	}
	return err
}

// join is the path below root that a call means: by a descriptor, as strace decodes it, and a name from there. "." is root itself, and "" elsewhere.
func join(root, descriptor, name string) string {
	_, folder, _ := strings.Cut(descriptor, "<")
	whole, err := unhex(strings.TrimSuffix(folder, ">"))
	if text, err2 := unhex(name); err2 == nil && name != "" {
		if filepath.IsAbs(string(text)) {
			whole, err = text, nil
		} else {
			whole = append(append(whole, '/'), text...)
		}
	}
	if err != nil {
		return ""
	}
	if rest, below := strings.CutPrefix(string(whole)+"/", root+"/"); below {
		return path.Clean(rest)
	}
	return ""
}

func hexed(text string) (out string) {
	for _, octet := range []byte(text) {
		out += fmt.Sprintf(`\x%02x`, octet)
	}
	return out
}

// unhex reads what strace prints with --strings-in-hex.
func unhex(text string) ([]byte, error) {
	return hex.DecodeString(strings.ReplaceAll(strings.Trim(text, `"`), `\x`, ""))
}
