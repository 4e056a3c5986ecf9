package ca

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kedge/ca/atomicfile"
)

// Clock is where time comes from. Wall may be set, and jump; Elapsed only ever counts up, at the pace of real seconds,
// for as long as Boot stays the same.
type Clock struct {
	Wall    func() time.Time     // without a monotonic reading, by which Go would compare two times: a jump would go unseen
	Elapsed func() time.Duration // since the machine booted, suspended time included
	Boot    string               // names this boot of the machine; "" when that cannot be had
}

// SystemClock is this machine's.
func SystemClock() Clock {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		boot = nil // then no time is known to have passed between two runs
	}
	return Clock{
		Wall: func() time.Time { return time.Now().Round(0) },
		Elapsed: func() time.Duration {
			var ts unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
				panic(fmt.Sprintf("reading CLOCK_BOOTTIME: %v", err)) // Linux has it since 2.6.39
			}
			return time.Duration(ts.Nano())
		},
		Boot: strings.TrimSpace(string(boot)),
	}
}

// frozenAfter is how far the wall clock may run ahead of the guarded one before that is called a problem.
const frozenAfter = 10 * time.Minute

// GuardedClock tells the time for steps that cannot be taken back (I8): pruning, and the removal of authorities. It never
// runs ahead of the wall clock, and moves no faster than time is known to have passed: so a wall clock that jumps forward
// moves nothing, until somebody else's clock or an admin bears it out.
type GuardedClock struct {
	clock Clock
	path  string // where it is kept between runs

	mu      sync.Mutex
	base    time.Time     // the guarded time …
	elapsed time.Duration // … when Elapsed said this
}

// guardedState is the content of the file.
type guardedState struct {
	Boot    string        `json:"boot"`
	Elapsed time.Duration `json:"elapsed_ns"`
	Guarded time.Time     `json:"guarded"`
}

// OpenGuardedClock goes on from what path holds. Without the file it begins with the time of the ledger's last event, or, when that has none
// (zero), with the wall clock. It writes nothing: see Save.
func OpenGuardedClock(path string, clock Clock, lastEvent time.Time) (*GuardedClock, error) {
	if err := atomicfile.Clean(path); err != nil {
		return nil, fmt.Errorf("reading the guarded clock: %w", err)
	}
	g := &GuardedClock{clock: clock, path: path, base: clock.Wall(), elapsed: clock.Elapsed()}
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if !lastEvent.IsZero() {
			g.base = earlier(g.base, lastEvent)
		}
		return g, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the guarded clock: %w", err)
	}
	var state guardedState
	if err := json.Unmarshal(raw, &state); err != nil {
		return nil, fmt.Errorf("the guarded clock in %s cannot be read (%w): remove the file once you have made sure that this machine's clock is right", path, err)
	}
	g.base = state.Guarded
	if state.Boot != "" && state.Boot == clock.Boot && g.elapsed >= state.Elapsed {
		g.base = g.base.Add(g.elapsed - state.Elapsed)
	}
	return g, nil
}

// Now returns the guarded time.
func (g *GuardedClock) Now() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.now()
}

func (g *GuardedClock) now() time.Time {
	elapsed := g.clock.Elapsed()
	g.base = earlier(g.clock.Wall(), g.base.Add(elapsed-g.elapsed))
	g.elapsed = elapsed
	return g.base
}

// Corroborate takes somebody else's word that t has come: a token issuer's, whose signature was checked. It moves the guarded
// clock forward to t, never beyond the wall clock.
func (g *GuardedClock) Corroborate(t time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if now := g.now(); t.After(now) {
		g.base = earlier(t, g.clock.Wall())
	}
}

// Behind says how far the wall clock has run ahead of what is known; nil when that is within reason.
func (g *GuardedClock) Behind() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	guarded, wall := g.now(), g.clock.Wall()
	if wall.Sub(guarded) <= frozenAfter {
		return nil
	}
	return fmt.Errorf("this machine's clock says %s, but only %s is borne out: nothing is pruned or removed for what lies between. "+
		"A fresh token of any token issuer will bear it out; or, if the clock is right, run 'kedge clock confirm'",
		wall.UTC().Format(time.RFC3339), guarded.UTC().Format(time.RFC3339))
}

// State is the content of the file that the next run goes on from.
func (g *GuardedClock) State() ([]byte, error) {
	g.mu.Lock()
	state := guardedState{Boot: g.clock.Boot, Guarded: g.now(), Elapsed: g.elapsed}
	g.mu.Unlock()
	raw, err := json.Marshal(state)
	if err != nil {
		return nil, fmt.Errorf("keeping the guarded clock: %w", err)
	}
	return raw, nil
}

// Save keeps the clock for the next run.
func (g *GuardedClock) Save() error {
	raw, err := g.State()
	if err != nil {
		return err
	}
	if err := atomicfile.Write(g.path, raw); err != nil {
		return fmt.Errorf("keeping the guarded clock: %w", err)
	}
	return nil
}
