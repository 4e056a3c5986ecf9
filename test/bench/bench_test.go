package main

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/ca"
	"kedge/test/process"
)

func TestMain(m *testing.M) {
	if plays() {
		return
	}
	os.Exit(process.Main(m))
}

// newBench is a run of a few calls, with servers and load on the same cores.
func newBench(t *testing.T) *bench {
	t.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	core := 0
	for !set.IsSet(core) {
		core++
	}
	crowd, err := newCrowd(40)
	if err != nil {
		t.Fatal(err)
	}
	return &bench{settings: settings{calls: 40}, kedge: process.Binary(), dir: t.TempDir(), cores: cores{core, core}, crowd: crowd, progress: t.Logf}
}

// TestTheRealProgramIsMeasured keeps the harness from measuring nothing: each way to ask works against a data folder that was filled, and costs CPU time.
func TestTheRealProgramIsMeasured(t *testing.T) {
	b := newBench(t)
	const records = 300
	dir := filepath.Join(b.dir, "kedge")
	certificates, err := fill(t.Context(), dataFolder(dir), records, 0)
	if err != nil {
		t.Fatal(err)
	}
	s, err := b.startKedge(t.Context(), b.kedge, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.stop(); err != nil {
			t.Error(err)
		}
	}()
	for _, sc := range scenarios {
		for _, kind := range keyKinds {
			m, err := b.costOf(t.Context(), s, sc, kind, certificates)
			if err != nil {
				t.Fatal(err)
			}
			// A signature alone takes more than 5 µs everywhere.
			if m.cpu < 5 || m.rate <= 0 || m.commits.events.mean() < 1 || m.commits.seconds.mean() <= 0 {
				t.Errorf("%s, %s: %+v", sc.name, kind, m)
			}
		}
	}
	callers, release, err := s.crew(t.Context(), 4, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	o := open(t.Context(), callers, 200, 200*time.Millisecond, patience, b.crowd.cycle())
	if o.offered == 0 || len(o.answered) != o.offered || len(o.refused) != 0 {
		t.Errorf("an open loop: %d of %d calls were answered, and refused were %v", len(o.answered), o.offered, o.refused)
	}
}

// A herd in which nobody is lost and nobody is refused is seen as such.
func TestAHerdIsServedAndCounted(t *testing.T) {
	b := newBench(t)
	b.herd = 50
	dir := filepath.Join(b.dir, "kedge")
	if _, err := fill(t.Context(), dataFolder(dir), 100, 0); err != nil {
		t.Fatal(err)
	}
	run, err := b.herdRun(t.Context(), func() (*server, error) { return b.startKedge(t.Context(), b.kedge, dir) })
	if err != nil {
		t.Fatal(err)
	}
	issued, good := labelled(run.counted, "kedge_csr_requests_total")["issued"], labelled(run.counted, "kedge_handshakes_total")["good"]
	if len(run.served.values) != b.herd || run.reports.Answers["OK"] != b.herd || int(issued) != b.herd || int(good) < b.herd {
		t.Errorf("of %d agents %d were served, by %v answers; the server counted %g certificates and %g handshakes", b.herd, len(run.served.values), run.reports.Answers, issued, good)
	}
	if run.reports.Dials < b.herd || run.reports.Handshakes < b.herd || run.files < b.herd || run.rss[1] < run.rss[0] || run.cpu <= 0 {
		t.Errorf("%+v, %d descriptors, %v MB, %g µs", run.reports, run.files, run.rss, run.cpu)
	}
	if text := herdTables([]*herdRun{run}); !strings.Contains(text, "OK 1.000") || strings.Contains(text, "NaN") {
		t.Error(text)
	}
}

// Whoever ends the run does not wait for a herd that is not served.
func TestAHerdEndsWithTheRun(t *testing.T) {
	b := newBench(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	crew, err := b.playAgents(ctx, agentsOrder{Address: silent.Addr().String(), Count: 1, Connecting: 1, Tokens: b.crowd.tokens, CSRs: b.crowd.csrs[keyP256], Patience: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	defer crew.end()
	if err := errors.Join(crew.out.Decode(&agentsReport{}), json.NewEncoder(crew.in).Encode(time.Now().UnixNano())); err != nil {
		t.Fatal(err)
	}
	conn, err := silent.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cancel()
	if err := crew.out.Decode(&agentsReport{}); err == nil {
		t.Error("an agent that nobody answers reports")
	}
}

// Each attack does something, and whoever is attacked with it has nothing to do afterwards; good callers are served.
func TestAGoodCallerIsServedBesideEveryNeighbour(t *testing.T) {
	b := newBench(t)
	b.neighbour = 200 * time.Millisecond
	text, err := b.neighbours(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	rows := strings.Split(strings.TrimSpace(text), "\n")[4:]
	wanted := 2 // without a neighbour
	for _, a := range attacks {
		if wanted++; a.many {
			wanted++
		}
	}
	if len(rows) != wanted {
		t.Errorf("there are %d rows, want %d", len(rows), wanted)
	}
	for _, row := range rows {
		if !strings.Contains(row, " | 0 of ") || strings.Contains(row, " 0 of 0 ") {
			t.Errorf("somebody was not served: %s", row)
		}
	}
}

// The CSRs that are dear to refuse are refused for what they are meant to be refused for.
func TestTheHostileCSRsAreWhatTheyClaim(t *testing.T) {
	for bits, exponent := range map[int]int{4096: math.MaxInt32, 16384: 65537} {
		text, err := unsigned(bits, exponent)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode([]byte(text))
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		key, ok := csr.PublicKey.(*rsa.PublicKey)
		if !ok || key.N.BitLen() != bits || key.E != exponent || len(text) > ca.MaxCSR {
			t.Errorf("%d bits: %T in %d octets", bits, csr.PublicKey, len(text))
		}
		if err := csr.CheckSignature(); !errors.Is(err, rsa.ErrVerification) && bits == 4096 {
			t.Errorf("%d bits: %v", bits, err)
		}
	}
}

func TestPruningLeavesTheCallersAndLessThanHalf(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	const records = 2000
	if _, err := fill(t.Context(), dir, records, 0); err != nil {
		t.Fatal(err)
	}
	left, err := prune(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if left < (1-provenAt)*records || left > records/2 {
		t.Errorf("%d of %d events are left", left, records)
	}
}

func TestNoCallIsMadeTwice(t *testing.T) {
	b := newBench(t)
	seen := map[request]bool{}
	for _, kind := range keyKinds {
		for range 2 {
			requests, err := b.crowd.take(kind, 20, true)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range requests {
				for _, part := range []request{{csr: r.csr}, {token: r.token}} {
					if seen[part] {
						t.Fatalf("twice: %+v", part)
					}
					seen[part] = true
				}
			}
		}
	}
	if _, err := b.crowd.take(keyP256, 10_000, true); err == nil {
		t.Error("more calls than there are tokens")
	}
}

func TestAHistogramIsReadAsPrometheusReadsIt(t *testing.T) {
	var before, after histogram
	for h, lines := range map[*histogram][]string{
		&before: {`_bucket{le="1"} 0`, `_bucket{le="2"} 0`, `_bucket{le="+Inf"} 1`, `_sum 100`, `_count 1`},
		&after:  {`_bucket{le="1"} 2`, `_bucket{le="2"} 4`, `_bucket{le="+Inf"} 5`, `_sum 106`, `_count 5`},
	} {
		for _, line := range lines {
			if err := h.read(line); err != nil {
				t.Fatal(err)
			}
		}
	}
	d := after.since(before)
	if got := []float64{d.mean(), d.quantile(0.25), d.quantile(0.5), d.quantile(0.75), d.quantile(1)}; got[0] != 1.5 || got[1] != 0.5 || got[2] != 1 || got[3] != 1.5 || got[4] != 2 {
		t.Errorf("mean and quartiles are %v", got)
	}
}

func TestASampleShowsMedianAndSpread(t *testing.T) {
	var s sample
	if !math.IsNaN(s.median()) {
		t.Error("nothing has a median")
	}
	for _, v := range []float64{5, 1, 4, 2} {
		s.add(v)
	}
	if got := s.of("%.0f"); got != "3 (1–5)" {
		t.Errorf("%q", got)
	}
	if s.quantile(0.5) != 2 || s.quantile(0.99) != 5 {
		t.Errorf("the quantiles are %g and %g", s.quantile(0.5), s.quantile(0.99))
	}
}

func TestResultsGoBetweenTheMarkers(t *testing.T) {
	page := filepath.Join(t.TempDir(), "page.md")
	const first, second = "<!-- results of 'make bench': cost -->\nold\n<!-- end of cost -->\n", "<!-- results of 'make bench': size -->\n<!-- end of size -->\n"
	process.Write(t, page, "before\n"+first+second+"after\n")
	for range 2 {
		if err := insert(page, "cost", "new\n"); err != nil {
			t.Fatal(err)
		}
	}
	if text := process.Read(t, page); text != "before\n"+strings.Replace(first, "old", "\nnew\n", 1)+second+"after\n" {
		t.Errorf("%q", text)
	}
	if err := insert(page, "herd", "new"); err == nil {
		t.Error("a page without lines for a part is written to")
	}
	if err := insert("../../docs/benchmarks.md.none", "cost", "new"); err == nil {
		t.Error("a page that is not there is written to")
	}
	text := process.Read(t, "../../docs/benchmarks.md")
	for _, part := range sections {
		if !strings.Contains(text, "\n<!-- results of 'make bench': "+part.name+" -->\n") || !strings.Contains(text, "\n<!-- end of "+part.name+" -->\n") {
			t.Errorf("docs/benchmarks.md has no lines for the part %s", part.name)
		}
	}
}
