package crash

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/ca/ledger"
	"kedge/plugins/file"
	"kedge/test/process"
)

// receipts are the certificates that clients got while a recording was made, and when.
type receipts struct {
	mu  sync.Mutex
	all []receipt
}

type receipt struct {
	leaf *x509.Certificate
	at   time.Time // it was there by then
}

// until lets clients ask without a pause until done says so; then they end.
func (r *receipts) until(t *testing.T, k *process.Kedge, cluster *process.Cluster, done func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var running sync.WaitGroup
	for range 4 {
		caller, key, token := k.Dial(t, nil), process.NewKey(t), cluster.Token(t, "default", "web")
		running.Go(func() {
			for ctx.Err() == nil {
				issued, err := caller.Issue(ctx, key.CSR, token, 0)
				if err != nil {
					continue
				}
				now := time.Now()
				r.mu.Lock()
				r.all = append(r.all, receipt{issued.Leaf, now})
				r.mu.Unlock()
			}
		})
	}
	process.Eventually(t, "clients to have been served for long enough", done)
	cancel()
	running.Wait()
}

// more is done when so many more were received.
func (r *receipts) more(n int) func() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	goal := len(r.all) + n
	return func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.all) < goal {
			return fmt.Errorf("%d of %d certificates were received", len(r.all), goal)
		}
		return nil
	}
}

// before are those that were there before a moment.
func (r *receipts) before(moment time.Time) (leaves []*x509.Certificate) {
	for _, receipt := range r.all {
		if receipt.at.Before(moment) {
			leaves = append(leaves, receipt.leaf)
		}
	}
	return leaves
}

// cuts is how many power cuts are played: KEDGE_CUTS, or else usual.
func cuts(t *testing.T, usual int) int {
	t.Helper()
	text := os.Getenv("KEDGE_CUTS")
	if text == "" {
		return usual
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("KEDGE_CUTS %q is not a number from 1", text)
	}
	return n
}

// TestAPowerCutLosesNothingThatWasAcknowledged plays cuts at many moments of a CA's work, which was recorded: while it issues, archives, prunes and renews its
// issuing CA, and is killed now and then or has an fsync fail, after which it goes on from what the kernel has and the disk may not. Each time the ledger opens, has all
// that was acknowledged until the cut, is sound, and takes more.
func TestAPowerCutLosesNothingThatWasAcknowledged(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("strace"); err != nil {
		process.Impossible(t, "strace is not installed", err)
		return
	}
	t.Run("a ledger with much to archive and to drop", func(t *testing.T) { cutsOfLives(t, 600) })
	t.Run("a young ledger, which soon uses again what it has freed", func(t *testing.T) { cutsOfLives(t, 1) })
}

func cutsOfLives(t *testing.T, old int) {
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	disk := filepath.Join(k.Dir, "disk")
	k.Data = filepath.Join(disk, "data")
	archive := filepath.Join(disk, "archive")
	process.Write(t, k.Config, shortLives+cluster.Configuration(t, k.Dir)+
		fmt.Sprintf("dataDir: %q\nledger: {retention: 1h, archiveDir: %q}\nlog: {level: warn}\n", k.Data, archive))
	last := newPast(t, k.Data, old)
	if err := os.Mkdir(archive, 0o700); err != nil {
		t.Fatal(err)
	}
	before, err := readDisk(disk)
	if err != nil {
		t.Fatal(err)
	}
	r, got := &recording{root: disk}, &receipts{}
	for lives := 1; ; lives++ {
		r.live(t, k, func() {
			k.Start(t)
			got.until(t, k, cluster, func() error {
				if k.Ended() {
					return nil
				}
				return errors.New("it is not killed yet")
			})
		}, fmt.Sprintf("--inject=fdatasync:signal=KILL:when=%d", 20+rand.IntN(20)))
		if r.killedInTheMiddle() {
			break
		}
		if lives == 20 {
			t.Fatal("no life of the CA ended between the two writes of a commit's last step")
		}
	}
	r.live(t, k, func() {
		k.Start(t)
		got.until(t, k, cluster, func() error {
			if !strings.Contains(k.Log(), "the ledger is faulted") {
				return errors.New("no fsync has failed yet")
			}
			return nil
		})
		got.until(t, k, cluster, got.more(50))
		signalled(t, k, syscall.SIGTERM)
	}, "--inject=fdatasync:error=EIO:when=20..21")
	r.live(t, k, func() {
		k.Start(t)
		got.until(t, k, cluster, got.more(100))
		signalled(t, k, syscall.SIGTERM)
	})
	r.buildsOnWhatIsSure(t)
	if archived, err := readArchives(archive); err != nil || archived < last {
		t.Fatalf("%d of %d events of the past are archived (%v): a cut in the middle of that is not played", archived, last, err)
	}

	seed := rand.Uint64()
	check := func(dir string, must []*x509.Certificate) error {
		return survives(t.Context(), filepath.Join(dir, "data"), filepath.Join(dir, "archive"), must)
	}
	for _, err := range playCuts(t, newPlatter(before, r), cuts(t, 100), 4, seed, got, check) {
		t.Errorf("seed %d: %v", seed, err)
	}
	t.Logf("seed %d, %d lines of strace, %d certificates", seed, r.lines, len(got.all))

	// A disk that calls durable what is not is noticed: else all this would show nothing.
	liar := newPlatter(before, r)
	liar.lies = true
	if lost := playCuts(t, liar, 30, 4, seed, got, check); len(lost) == 0 {
		t.Error("a disk whose fsync does nothing lost nothing")
	}
}

// killedInTheMiddle says whether the last life ended after a meta page was written and before that was durable.
func (r *recording) killedInTheMiddle() bool {
	for _, c := range slices.Backward(r.calls) {
		if c.name == "pwrite64" && strings.HasSuffix(c.path, "/ledger.db") {
			return c.ended != never && c.offset < 2*int64(os.Getpagesize())
		}
	}
	return false
}

// TestAPowerCutDuringTheFirstStartIsHealedByTheNext cuts the power while a data folder comes into being, perhaps after processes that were killed on the way, and
// shortly after. The next start finishes what was begun, or begins anew when nobody was told of anything yet.
func TestAPowerCutDuringTheFirstStartIsHealedByTheNext(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("strace"); err != nil {
		process.Impossible(t, "strace is not installed", err)
		return
	}
	cluster := process.NewCluster(t)
	at := func(k *process.Kedge, disk string) *process.Kedge {
		k.Data = filepath.Join(disk, "data")
		process.Write(t, k.Config, process.Ports+cluster.Configuration(t, k.Dir)+fmt.Sprintf("dataDir: %q\n", k.Data))
		return k
	}
	k := process.New(t, "")
	disk := filepath.Join(k.Dir, "disk")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	at(k, disk)
	r, got := &recording{root: disk}, &receipts{}
	for range rand.IntN(4) { // lives that end before the CA is there
		r.live(t, k, func() {
			k.Launch(t)
			process.Eventually(t, "the end of the process, or its greeting", func() error {
				if greeted := strings.Contains(k.Greeting(t), "\nNext: "); greeted {
					signalled(t, k, syscall.SIGKILL)
				} else if !k.Ended() {
					return errors.New("neither has come")
				}
				return nil
			})
		}, fmt.Sprintf("--inject=fsync,fdatasync:signal=KILL:when=%d", 1+rand.IntN(12)))
	}
	r.live(t, k, func() {
		k.Start(t)
		got.until(t, k, cluster, got.more(5))
		signalled(t, k, syscall.SIGTERM)
	})
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	playCuts(t, newPlatter(newFolder(), r), cuts(t, 40), 1, seed, got, func(dir string, must []*x509.Certificate) error {
		t.Run("", func(t *testing.T) {
			k := at(process.New(t, ""), dir)
			k.Start(t)
			issued, err := k.Dial(t, nil).Issue(t.Context(), process.NewKey(t).CSR, cluster.Token(t, "default", "web"), 0)
			if err != nil {
				t.Fatal(err)
			}
			k.CheckLedger(t, append(must, issued.Leaf))
			if out := k.Must(t, "authority", "list"); strings.Count(out, " root ") != 1 || strings.Count(out, " active ") != 2 {
				t.Errorf("authority list:\n%s", out)
			}
			k.Stop(t)
		})
		return nil
	})
}

// buildsOnWhatIsSure makes sure that each life first made durable what the one before may not have: cuts find that out only by luck.
func (r *recording) buildsOnWhatIsSure(t *testing.T) {
	t.Helper()
	fresh := false
	for _, c := range r.calls {
		switch {
		case c.name == "death":
			fresh = true
		case !fresh || !strings.HasSuffix(c.path, "/ledger.db"):
		case c.name == "fdatasync":
			fresh = false
		case c.name == "pwrite64":
			t.Errorf("strace's line %d: the ledger is written to, before what a killed process had written is made durable", c.began)
			fresh = false
		}
	}
}

// playCuts plays a recording, and cuts the power at n of its events. What each leaves, and what clients had received until then, goes to check, so many at once;
// 1 is on the goroutine of the test. It returns what check found.
func playCuts(t *testing.T, p *platter, n, atOnce int, seed uint64, got *receipts, check func(dir string, must []*x509.Certificate) error) (lost []error) {
	t.Helper()
	random := rand.New(rand.NewPCG(seed, 0))
	moments := p.moments()
	at := map[int]int{}
	for i := range n {
		kind := moments[i%len(moments)]
		at[kind[random.IntN(len(kind))]]++
	}
	memory, err := os.MkdirTemp("/dev/shm", "kedge-test-") // no disk is needed to look at what is left, and the checks wait for it most of all
	if errors.Is(err, fs.ErrNotExist) {
		memory, err = os.MkdirTemp("", "kedge-test-")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(memory); err != nil {
			t.Error(err)
		}
	})
	var checks sync.WaitGroup
	var mu sync.Mutex
	free := make(chan struct{}, atOnce)
	for i := 0; len(p.events) > 0; i++ {
		for j := range at[i] {
			dir := filepath.Join(memory, fmt.Sprintf("%d-%d", i, j))
			if err := p.cut(dir, random); err != nil {
				t.Fatal(err)
			}
			next, must := p.events[0], got.before(p.events[0].at)
			look := func() {
				err := check(dir, must)
				if err != nil {
					err = fmt.Errorf("the power is cut before line %d of strace, %s of %s: %w", next.line, next.name, next.path, err)
				}
				mu.Lock()
				defer mu.Unlock()
				lost = append(lost, err)
				if err := os.RemoveAll(dir); err != nil {
					t.Error(err)
				}
			}
			if atOnce == 1 {
				look()
				continue
			}
			free <- struct{}{}
			checks.Go(func() {
				look()
				<-free
			})
		}
		if err := p.next(); err != nil {
			t.Fatal(err)
		}
	}
	checks.Wait()
	return slices.DeleteFunc(lost, func(err error) bool { return err == nil })
}

// survives says what is wrong with a data folder after a power cut.
func survives(ctx context.Context, data, archive string, must []*x509.Certificate) (err error) {
	book, err := ledger.Open(data, ledger.Options{TrustDomain: "cluster.local"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, book.Close()) }()
	switch mark, err := ledger.ReadMark(filepath.Join(data, ledger.MarkFile)); {
	case err == nil:
		if err := book.CheckMark(mark); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	archived, err := readArchives(archive)
	if err != nil {
		return err
	}
	head := book.Head()
	if archived < head.First-1 {
		return fmt.Errorf("the ledger begins with event %d, and the archives end with %d", head.First, archived)
	}
	recorded, next := map[string]ledger.Hash{}, head.First
	for event, err := range book.Events(ctx, ledger.Filter{}) {
		if err != nil {
			return err
		}
		if event.Number != next {
			return fmt.Errorf("event %d follows on %d", event.Number, next-1)
		}
		next++
		if issue, ok := event.Body.(*ledger.Issue); ok {
			recorded[issue.Serial.String()] = issue.Certificate
		}
	}
	for _, leaf := range must {
		serial := ledger.Serial(leaf.SerialNumber.Bytes()).String()
		if recorded[serial] != sha256.Sum256(leaf.Raw) {
			return fmt.Errorf("a client holds %s, and the ledger, which ends with event %d, does not know it", serial, head.Number)
		}
	}
	keys, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: filepath.Join(data, "keys")})
	if err != nil {
		return err
	}
	authorities, err := book.Authorities()
	if err != nil {
		return err
	}
	for _, authority := range authorities {
		if authority.State == ledger.StateActive && authority.KeyRef != "" {
			if _, err := keys.Open(ctx, authority.KeyRef); err != nil {
				return fmt.Errorf("the active issuing CA cannot sign: %w", err)
			}
		}
	}
	for i := range 8 { // page by page it uses what it takes to be free
		token := &ledger.Token{ID: strconv.Itoa(i), SPIFFEID: "spiffe://cluster.local/ns/default/sa/web", Expires: ledger.At(time.Now().Add(time.Hour)), By: "test"}
		number, err := book.Append(ctx, token)
		if err != nil || number != head.Number+uint64(i)+1 {
			return fmt.Errorf("recording on gave the number %d after %d: %w", number, head.Number+uint64(i), err)
		}
	}
	report, err := book.Verify(ctx)
	if err == nil && len(report.Problems) > 0 {
		err = fmt.Errorf("%s", strings.Join(report.Problems, "; "))
	}
	return err
}

// readArchives makes sure that the archives hold every event from the first on, and returns the number of the last that they have.
func readArchives(dir string) (last uint64, err error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.kedge-ledger"))
	if err != nil {
		return 0, err
	}
	for _, path := range paths {
		for commit, err := range ledger.ReadArchive(path) {
			if err != nil {
				return last, err
			}
			if commit.First > last+1 {
				return last, fmt.Errorf("the archives have nothing between the events %d and %d", last, commit.First)
			}
			last = max(last, commit.First+uint64(len(commit.Raw))-1)
		}
	}
	return last, nil
}
