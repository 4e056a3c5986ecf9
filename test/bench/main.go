// Command bench measures what a certificate costs: Kedge's real 'kedge serve' beside Istio's own CA server and beside the bare cryptography, all in one
// run, and Kedge's latency, its behaviour with a large ledger and under overload. 'make bench' runs it.
//
// There are two processes under measurement, each pinned to one core, the server's, where only one of them has work at a time; Go gives such a process
// GOMAXPROCS=1. This process makes the load, pinned to another core. What a server costs is its CPU time, user and system, as the kernel accounts for it
// to the nanosecond (clock_gettime of the process's own CPU clock, see cpuTime), so that waiting costs nothing. A round measures everything once, Kedge and
// Istio in turn, with processes that were started for it, so that no server ever sees a token or a CSR of a round twice. Numbers are medians of
// rounds, ratios and differences medians of those of each round.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// settings say how much is measured.
type settings struct {
	rounds  int           // of each measurement; of latency and overload, which take long, half of them
	calls   int           // in one measurement of the cost of a call
	open    time.Duration // of one measurement of latency
	flood   time.Duration // of one measurement under overload
	live    int           // records in the large ledger
	herd    int           // agents that come at the same instant
	profile time.Duration // of one profile

	neighbour time.Duration // of one measurement beside a neighbour

	streams   int // SDS: in memory
	pushCount int // of a new root, to all of them
	idle      int // SDS: over loopback
}

var (
	full = settings{rounds: 7, calls: 4000, open: 8 * time.Second, flood: 20 * time.Second, live: 1_000_000, herd: 100_000, profile: 15 * time.Second,
		neighbour: 12 * time.Second, streams: 20_000, pushCount: 7, idle: 9_000}
	quick = settings{rounds: 2, calls: 600, open: 2 * time.Second, flood: 4 * time.Second, live: 50_000, herd: 3_000, profile: 3 * time.Second,
		neighbour: time.Second, streams: 500, pushCount: 2, idle: 300}
)

// bench is one run.
type bench struct {
	settings
	kedge, istio string // programs
	source       string // of Kedge
	dir          string // for everything that is written, removed at the end
	keep         string // a folder that gets the profiles; "": none does
	attacks      string // see the flag
	cores        cores
	crowd        *crowd
	progress     func(format string, args ...any)
}

// section is a part of the run, which may be left out.
type section struct {
	name string
	run  func(*bench, context.Context) (string, error)
}

var sections = []section{
	{"cost", (*bench).costs}, {"size", (*bench).sizes}, {"latency", (*bench).latencies}, {"overload", (*bench).overload}, {"herd", (*bench).stampede},
	{"neighbours", (*bench).neighbours}, {"hsm", (*bench).tokens}, {"sds", (*bench).sds}, {"profile", (*bench).profiles},
}

// plays is whether this process has a part in the measurement of another one, which it then has played.
func plays() bool {
	if len(os.Args) != 2 {
		return false
	}
	switch os.Args[1] {
	case bareVerb:
		bare()
	case agentsVerb:
		if err := playAgents(); err != nil {
			fmt.Fprintln(os.Stderr, "bench: agents:", err)
			os.Exit(1)
		}
	case hostileVerb:
		if err := playHostile(); err != nil {
			fmt.Fprintln(os.Stderr, "bench: a hostile neighbour:", err)
			os.Exit(1)
		}
	case bareSDSVerb:
		if err := playBareSDS(); err != nil {
			fmt.Fprintln(os.Stderr, "bench: the bare server of streams:", err)
			os.Exit(1)
		}
	case streamsVerb:
		if err := playStreams(); err != nil {
			fmt.Fprintln(os.Stderr, "bench: streams:", err)
			os.Exit(1)
		}
	default:
		return false
	}
	return true
}

func main() {
	if plays() {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	b := &bench{progress: func(format string, args ...any) { fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...) }}
	flag.StringVar(&b.kedge, "kedge", "bin/kedge", "the kedge to measure")
	flag.StringVar(&b.istio, "istio", "bin/istio-ca", "Istio's CA server, of test/bench/istio")
	flag.StringVar(&b.source, "source", ".", "Kedge's source, of which a program that profiles itself is built")
	short := flag.Bool("quick", false, "little of everything, to see that it works; the numbers say nothing")
	rounds := flag.Int("rounds", 0, "how often each thing is measured")
	calls := flag.Int("calls", 0, "calls in each measurement of the cost of a call")
	agentCount := flag.Int("herd", 0, "agents that come at the same instant")
	only := flag.String("only", "", "these parts alone, with commas between them: cost, size, latency, overload, herd, neighbours, hsm, sds, profile")
	flag.StringVar(&b.attacks, "beside", "", "neighbours: those alone whose names have this in them")
	out := flag.String("out", "", "a page that gets the results of each part, between the lines for it")
	flag.StringVar(&b.keep, "profiles", "", "a folder that gets the profiles, for 'go tool pprof'")
	flag.Parse()
	b.settings = full
	if *short {
		b.settings = quick
	}
	if *rounds > 0 {
		b.settings.rounds = *rounds
	}
	if *calls > 0 {
		b.settings.calls = *calls
	}
	if *agentCount > 0 {
		b.settings.herd = *agentCount
	}
	for _, path := range []*string{&b.kedge, &b.istio, &b.source} {
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	if b.dir, err = workFolder(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if b.cores, err = findCores(); err != nil {
		return err
	}
	b.progress("making tokens and CSRs, on all cores")
	if b.crowd, err = newCrowd(b.settings.calls); err != nil {
		return err
	}
	if err := b.cores.settle(); err != nil {
		return err
	}
	debug.SetGCPercent(400) // the generator's core is for calls
	for _, s := range sections {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), s.name) {
			continue
		}
		text, err := b.section(ctx, s)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, errors.Join(context.Cause(ctx), err)) // a signal, if it was one, says why
		}
		fmt.Println(text)
		if *out != "" {
			if err := insert(*out, s.name, text); err != nil {
				return err
			}
		}
	}
	return nil
}

// section runs a part. What it returns says also where it was measured, and beside what.
func (b *bench) section(ctx context.Context, s section) (string, error) {
	began := time.Now()
	others, err := b.cores.watch()
	if err != nil {
		return "", err
	}
	text, err := s.run(b, ctx)
	if err != nil {
		return "", err
	}
	where, err := machine(b.dir)
	if err != nil {
		return "", err
	}
	share, err := others()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s\n%s It took %s, during which other programs and the kernel had %.0f %% of the two cores.\n", text, where, time.Since(began).Round(time.Second), 100*share), nil
}

// workFolder makes a folder on a disk: an fsync that costs nothing would flatter Kedge.
func workFolder() (string, error) {
	dir, err := os.MkdirTemp("", "kedge-bench-")
	if err != nil {
		return "", err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return "", errors.Join(fmt.Errorf("looking at the file system of %s: %w", dir, err), os.Remove(dir))
	}
	if fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC {
		return "", errors.Join(fmt.Errorf("%s is in memory, and the ledger is to be measured on a disk: set TMPDIR to a folder on one", dir), os.Remove(dir))
	}
	return dir, nil
}

// insert writes the results of a part into a page, between the lines that are for it.
func insert(path, part, results string) error {
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	begin, end := fmt.Sprintf("<!-- results of 'make bench': %s -->", part), fmt.Sprintf("<!-- end of %s -->", part)
	before, rest, begun := strings.Cut(string(page), begin)
	_, after, ended := strings.Cut(rest, end)
	if !begun || !ended {
		return fmt.Errorf("%s has no line %q with a line %q after it", path, begin, end)
	}
	return os.WriteFile(path, []byte(before+begin+"\n\n"+strings.TrimSpace(results)+"\n\n"+end+after), 0o644)
}
