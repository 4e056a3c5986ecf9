package crash

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/ca/ledger"
	"kedge/test/process"
)

// soakLives is how many processes share a soak: two in each quarter, one of which is killed.
const soakLives = 8

// TestSoak lets a CA work at half of its peak for KEDGE_SOAK: certificates of seconds, issuing CAs that rotate all the time, pruning and archiving, restarts
// in good order and by kill -9. Memory, descriptors, goroutines and the size of the ledger's file level off: in the last quarter they are about what they
// were in the second. Each certificate that a client received is in the ledger.
//
// An event goes only after the hour in which its certificate expired, so that a soak would see its file grow, and nothing else. It begins with a past as long as
// itself for that reason: what is pruned of that is the room for what comes.
func TestSoak(t *testing.T) {
	t.Parallel()
	length := 20 * time.Second
	if text := os.Getenv("KEDGE_SOAK"); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil || length < 10*time.Second {
			t.Fatalf("KEDGE_SOAK %q is not a duration of 10s or more", text)
		}
	}
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	archive := filepath.Join(k.Dir, "archive")
	if err := os.Mkdir(archive, 0o700); err != nil {
		t.Fatal(err)
	}
	process.Write(t, k.Config, shortLives+cluster.Configuration(t, k.Dir)+
		fmt.Sprintf("ledger: {retention: %s, archiveDir: %q}\nlog: {level: warn}\n", length/4, archive))

	s := &soak{cluster: cluster, keys: map[int]process.Key{}}
	for i := range workers {
		s.keys[i] = process.NewKey(t)
	}
	rate := s.peak(t) / 2
	past := newPast(t, k.Data, int(rate*length.Seconds()*1.3))
	t.Logf("%.0f certificates a second for %s, after a past of %d events", rate, length, past)
	book, err := ledger.Open(k.Data, ledger.Options{TrustDomain: "cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	s.last = book.Head().Number
	if err := book.Close(); err != nil {
		t.Fatal(err)
	}

	for life := range soakLives {
		k.Start(t)
		stop := s.work(t, k, rate)
		s.watch(t, k, length/soakLives)
		if life%2 == 0 {
			k.Kill(t)
			stop()
		} else {
			stop()
			k.Stop(t)
		}
		s.check(t, k)
	}
	k.Start(t)
	process.Eventually(t, "the past to be pruned", func() error {
		if out := k.Must(t, "ledger", "count", "--to", fmt.Sprint(past)); out != "0\n" {
			return errors.New(out)
		}
		return nil
	})
	report := k.Verify(t)
	if archived, err := readArchives(archive); err != nil || archived < report.FirstNumber-1 {
		t.Errorf("the ledger begins with event %d, and the archives end with %d (%v)", report.FirstNumber, archived, err)
	}
	if issuing := strings.Count(k.Must(t, "authority", "list"), " issuing "); issuing < 3 {
		t.Errorf("there were only %d issuing CAs", issuing)
	}
	k.Stop(t)
	s.judge(t)
}

// soak is the clients' side, and what was measured.
type soak struct {
	cluster *process.Cluster
	keys    map[int]process.Key
	last    uint64 // event that was looked at

	mu       sync.Mutex
	received map[string]ledger.Hash // of this life: certificates by their serials
	odd      error
	issued   int
	samples  []map[string]float64
}

// peak is how many certificates a second a young CA issues to clients that ask without a pause.
func (s *soak) peak(t *testing.T) float64 {
	t.Helper()
	k := newCA(t, s.cluster, "log: {level: warn}\n")
	k.Start(t)
	stop := s.work(t, k, 0)
	began, rate := time.Now(), 0.0
	process.Eventually(t, "a few thousand certificates", func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.issued < 3000 {
			return fmt.Errorf("%d were issued", s.issued)
		}
		rate = float64(s.issued) / time.Since(began).Seconds()
		return nil
	})
	stop()
	k.Stop(t)
	return rate
}

// work sets clients to work at a rate, in certificates a second; 0 is as fast as they can. stop ends them.
func (s *soak) work(t *testing.T, k *process.Kedge, rate float64) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	turns := make(chan struct{}, workers)
	var running sync.WaitGroup
	running.Go(func() {
		defer close(turns)
		ticker := time.NewTicker(10 * time.Millisecond)
		defer ticker.Stop()
		for owed := 0.0; ; {
			owed += rate / 100
			if rate == 0 {
				owed = workers
			}
			for ; owed >= 1; owed-- {
				select {
				case turns <- struct{}{}:
				case <-ctx.Done():
					return
				}
			}
			if rate == 0 {
				continue
			}
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return
			}
		}
	})
	s.received = map[string]ledger.Hash{}
	callers := make([]*process.Caller, connections)
	for i := range callers {
		callers[i] = k.Dial(t, nil)
	}
	for i := range workers {
		key, token := s.keys[i], s.cluster.Token(t, "default", fmt.Sprintf("web-%d", i%8))
		running.Go(func() {
			for range turns {
				issued, err := callers[i%connections].Issue(ctx, key.CSR, token, 0)
				s.mu.Lock()
				switch {
				case err == nil:
					s.issued++
					s.received[ledger.Serial(issued.Leaf.SerialNumber.Bytes()).String()] = sha256.Sum256(issued.Leaf.Raw)
				case ctx.Err() == nil && status.Code(err) != codes.Unavailable:
					s.odd = err
				}
				s.mu.Unlock()
			}
		})
	}
	return func() {
		cancel()
		running.Wait()
		for _, caller := range callers {
			_ = caller.Conn.Close() // its server may be gone
		}
	}
}

// watch samples what should level off, for a while.
func (s *soak) watch(t *testing.T, k *process.Kedge, length time.Duration) {
	t.Helper()
	ticker := time.NewTicker(max(length/25, 100*time.Millisecond))
	defer ticker.Stop()
	for end := time.After(length); ; {
		select {
		case <-end:
			return
		case <-ticker.C:
		}
		m := k.Metrics(t)
		info, err := os.Stat(filepath.Join(k.Data, "ledger.db"))
		if err != nil {
			t.Fatal(err)
		}
		s.samples = append(s.samples, map[string]float64{
			"MiB in memory": ownMemory(t, k.PID()), "descriptors": m["process_open_fds"], "goroutines": m["go_goroutines"],
			"MiB of ledger": float64(info.Size()) / (1 << 20),
		})
	}
}

// ownMemory is what a process has in memory of its own, in MiB. The pages of the ledger's file that it has looked at are the kernel's, which takes them back when it needs room: they grow with what
// is looked at, up to the size of the file.
func ownMemory(t *testing.T, pid int) float64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if fields := strings.Fields(line); fields[0] == "RssAnon:" {
			kib, err := strconv.ParseFloat(fields[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib / 1024
		}
	}
	t.Fatalf("there is no RssAnon in %s", status)
	return 0
}

// check reads on in the ledger of a CA that has ended: the numbers have no gap, and what clients received in its life is there.
func (s *soak) check(t *testing.T, k *process.Kedge) {
	t.Helper()
	if s.odd != nil {
		t.Fatalf("a client was told: %v", s.odd)
	}
	book, err := ledger.Open(k.Data, ledger.Options{TrustDomain: "cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	for event, err := range book.Events(t.Context(), ledger.Filter{From: s.last + 1}) {
		if err != nil {
			t.Fatal(err)
		}
		if event.Number != s.last+1 {
			t.Fatalf("event %d follows on %d", event.Number, s.last)
		}
		s.last = event.Number
		if issue, ok := event.Body.(*ledger.Issue); ok && s.received[issue.Serial.String()] == issue.Certificate {
			delete(s.received, issue.Serial.String())
		}
	}
	if err := book.Close(); err != nil {
		t.Fatal(err)
	}
	if len(s.received) > 0 {
		t.Fatalf("%d certificates that clients hold are not in the ledger, or not as they are: %v", len(s.received), slices.Collect(maps.Keys(s.received))[0])
	}
}

// judge compares the last quarter of the samples with the second.
func (s *soak) judge(t *testing.T) {
	t.Helper()
	quarter := len(s.samples) / 4
	if quarter < 10 {
		t.Fatalf("there are only %d samples", len(s.samples))
	}
	for what, slack := range map[string]float64{"MiB in memory": 48, "descriptors": 20, "goroutines": 40, "MiB of ledger": 8} {
		median := func(from int) float64 {
			var values []float64
			for _, sample := range s.samples[from : from+quarter] {
				values = append(values, sample[what])
			}
			slices.Sort(values)
			return values[len(values)/2]
		}
		second, last := median(quarter), median(len(s.samples)-quarter)
		t.Logf("%s: %.0f in the second quarter, %.0f in the last", what, second, last)
		if second == 0 || last > 1.25*second+slack {
			t.Errorf("%s: %.0f in the second quarter, %.0f in the last: that goes on rising", what, second, last)
		}
	}
}
