package atomicfile_test

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"kedge/ca/atomicfile"
	"kedge/test/process"
)

// writeTo is the environment variable that makes the test program write generation 2 to a folder, and do nothing else: so that it can be
// killed, or denied a system call, in the middle of it.
const writeTo = "KEDGE_TEST_WRITE_SET_TO"

func init() {
	if os.Getenv(writeTo) != "" {
		runtime.LockOSThread() // the main thread: strace counts by thread
	}
}

func TestMain(m *testing.M) {
	dir := os.Getenv(writeTo)
	if dir == "" {
		os.Exit(m.Run())
	}
	if err := atomicfile.WriteSet(dir, generation(2)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// writeThrough writes generation 2 to the folder in a process of its own, and says whether it succeeded. strace traces it with these flags into a log.
func writeThrough(t *testing.T, dir string, flags ...string) (succeeded bool, log string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	log = filepath.Join(t.TempDir(), "trace")
	command := exec.Command("strace", append(append([]string{"--follow-forks", "--quiet=all", "--output=" + log}, flags...), self)...)
	command.Env = append(os.Environ(), writeTo+"="+dir, "GORACE=atexit_sleep_ms=0")
	out, err := command.CombinedOutput()
	if err != nil && command.ProcessState == nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Logf("%s: %v %s", flags, err, out)
	}
	return err == nil, log
}

// changing are the system calls by which WriteSet changes something, or makes it durable.
var changing = []string{"mkdirat", "write", "fsync", "symlinkat", "renameat", "unlinkat"}

// faults are what may happen at each of them, and to a writer that finds what.
var faults = map[string][]string{
	"signal=KILL": slices.Collect(maps.Keys(before)),
	"error=EIO":   {"a set"}, // what it leaves is what a crash there leaves, or less
}

// before are the folders that a write may find, and what they hold: generation 1, or nothing.
var before = map[string]struct {
	lay      func(t *testing.T, dir string)
	complete bool // generation 1 is there
}{
	"nothing":                       {func(*testing.T, string) {}, false},
	"a set":                         {func(t *testing.T, dir string) { mustWrite(t, dir, generation(1)) }, true},
	"plain files":                   {foreign["plain files"], true},
	"plain files over an older set": {foreign["plain files over an older set"], true},
}

// TestACrashAtAnyStepLeavesOneSetOrTheOther kills the writer at each of its steps, and lets each of them fail. The folder holds the old set or the new,
// never some of each, and the next write leaves nothing of it behind.
func TestACrashAtAnyStepLeavesOneSetOrTheOther(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("strace"); err != nil {
		process.Impossible(t, "strace is not installed", err)
		return
	}
	for fault, folders := range faults {
		for _, what := range folders {
			t.Run(what+", "+fault, func(t *testing.T) {
				t.Parallel()
				found := before[what]
				steps, outcomes := 0, map[string]int{}
				for _, call := range changing {
					for n := 1; ; n++ {
						dir := filepath.Join(t.TempDir(), "set")
						if err := os.Mkdir(dir, 0o700); err != nil {
							t.Fatal(err)
						}
						found.lay(t, dir)
						succeeded, log := writeThrough(t, dir, "--trace="+call, fmt.Sprintf("--inject=%s:%s:when=%d", call, fault, n))
						if succeeded {
							checkFolder(t, dir, 2)
						}
						if succeeded && !strings.Contains(process.Read(t, log), "(INJECTED)") {
							break // there is no such step
						}
						if succeeded { // in spite of it
							continue
						}
						steps++
						outcomes[outcome(t, dir, found.complete)]++
						mustWrite(t, dir, generation(3))
						checkFolder(t, dir, 3)
						if t.Failed() {
							t.Fatalf("the fault was at %s %d", call, n)
						}
					}
				}
				if steps < 12 || outcomes["old"] < 5 || outcomes["new"] < 1 {
					t.Errorf("the writer was disturbed at %d steps, and left %v: are its steps still found?", steps, outcomes)
				}
			})
		}
	}
}

// outcome says what a writer left that did not come to its end.
func outcome(t *testing.T, dir string, complete bool) string {
	t.Helper()
	files, err := readNames(dir)
	if err != nil {
		if complete {
			t.Errorf("a file is missing: %v", err)
		}
		for _, name := range names {
			if data, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
				t.Errorf("%s is there without the others: %.20q", name, data)
			}
		}
		return "old"
	}
	n, err := paired(files)
	if err != nil {
		t.Error(err)
	}
	return map[int]string{1: "old", 2: "new"}[n]
}

// TestASetIsOnDiskBeforeItIsShown: a power cut may lose whatever was not flushed, so each file, its version and the links are flushed before ..data leads
// to them, and ..data before the version before is removed.
func TestASetIsOnDiskBeforeItIsShown(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("strace"); err != nil {
		process.Impossible(t, "strace is not installed", err)
		return
	}
	for what, found := range before {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "set")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			found.lay(t, dir)
			succeeded, log := writeThrough(t, dir, "--decode-fds=path", "--string-limit=4096", "--trace=fsync,renameat,unlinkat,symlinkat")
			if !succeeded {
				t.Fatal("the writer failed")
			}
			calls := callsIn(t, log, dir)
			shown := map[string]bool{}
			for i, call := range calls {
				version, is := strings.CutPrefix(call, "show ")
				if !is {
					continue
				}
				shown[version] = true
				earlier := calls[:i]
				folder := lastIndex(earlier, "fsync .")
				if folder < 0 || lastIndex(earlier, "fsync "+version) < 0 || folder < lastIndex(earlier, "link") {
					t.Errorf("%s is shown before it is on disk: %q", version, earlier)
				}
				if files := slices.DeleteFunc(slices.Clone(earlier), func(c string) bool { return !strings.HasPrefix(c, "fsync "+version+"/") }); len(files) == 0 {
					t.Errorf("no file of %s is on disk when it is shown: %q", version, earlier)
				}
				later := calls[i+1:]
				flushed := slices.Index(later, "fsync .")
				if removed := slices.IndexFunc(later, func(c string) bool { return strings.HasPrefix(c, "remove") }); flushed < 0 || removed >= 0 && removed < flushed {
					t.Errorf("what follows %s comes before it is on disk: %q", version, later)
				}
			}
			if len(shown) == 0 {
				t.Errorf("nothing was shown: %q", calls)
			}
			last, err := os.Readlink(filepath.Join(dir, "..data"))
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range names {
				if !slices.Contains(calls, "fsync "+last+"/"+name) {
					t.Errorf("%s was not flushed: %q", name, calls)
				}
			}
		})
	}
}

func lastIndex(calls []string, call string) int {
	for i := len(calls) - 1; i >= 0; i-- {
		if calls[i] == call {
			return i
		}
	}
	return -1
}

// callsIn reads what strace saw in a folder: "fsync PATH" ("." is the folder itself), "show VERSION" for what ..data leads to from then on, "link" for a
// name that became a link, and "remove PATH".
func callsIn(t *testing.T, log, dir string) []string {
	t.Helper()
	var (
		fsync   = regexp.MustCompile(`fsync\(\d+<` + regexp.QuoteMeta(dir) + `/?([^>]*)>\) += 0`)
		symlink = regexp.MustCompile(`symlinkat\("([^"]*)"`)
		rename  = regexp.MustCompile(`renameat\(.*"` + regexp.QuoteMeta(dir) + `/\.\.next".*"` + regexp.QuoteMeta(dir) + `/([^"]*)"\) += 0`)
		unlink  = regexp.MustCompile(`unlinkat\(.*"(\.\.version-[^"]*|` + regexp.QuoteMeta(dir) + `/\.\.version-[^"]*)".*\) += 0`)
	)
	var calls []string
	target := ""
	for line := range strings.Lines(process.Read(t, log)) {
		if found := fsync.FindStringSubmatch(line); found != nil {
			calls = append(calls, "fsync "+map[bool]string{true: ".", false: found[1]}[found[1] == ""])
		} else if found := symlink.FindStringSubmatch(line); found != nil {
			target = found[1]
		} else if found := rename.FindStringSubmatch(line); found != nil && found[1] == "..data" {
			calls = append(calls, "show "+target)
		} else if found != nil {
			calls = append(calls, "link")
		} else if found := unlink.FindStringSubmatch(line); found != nil {
			calls = append(calls, "remove "+found[1])
		}
	}
	return calls
}
