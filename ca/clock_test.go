package ca_test

import (
	"path/filepath"
	"testing"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
)

func openGuarded(t *testing.T, path string, clock ca.Clock) *ca.GuardedClock {
	t.Helper()
	g, err := ca.OpenGuardedClock(path, clock, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestTheGuardedClockFollowsNoJump(t *testing.T) {
	h, path := newHandClock(), filepath.Join(t.TempDir(), "clock.json")
	g, began := openGuarded(t, path, h.clock()), h.wall
	h.pass(time.Hour)
	if got := g.Now().Sub(began); got != time.Hour {
		t.Errorf("after an hour: %s", got)
	}
	h.jump(365 * 24 * time.Hour)
	if got := g.Now().Sub(began); got != time.Hour {
		t.Errorf("after a jump of a year: %s", got)
	}
	if g.Behind() == nil {
		t.Error("the jump is not noticed")
	}
	g.Corroborate(began.Add(30 * 24 * time.Hour))
	if got := g.Now().Sub(began); got != 30*24*time.Hour {
		t.Errorf("after somebody's word of 30 days: %s", got)
	}
	g.Corroborate(began.Add(10 * 365 * 24 * time.Hour))
	if got := g.Now(); got.After(h.wall) {
		t.Errorf("it runs ahead of the wall clock: %s", got)
	}
	h.jump(-400 * 24 * time.Hour)
	if got := g.Now(); got.After(h.wall) {
		t.Errorf("after a jump back it is ahead of the wall clock: %s", got)
	}
	if err := g.Behind(); err != nil {
		t.Errorf("behind: %v", err)
	}
}

func TestTheGuardedClockGoesOnAfterARestartButNotAfterAReboot(t *testing.T) {
	h, path := newHandClock(), filepath.Join(t.TempDir(), "clock.json")
	if err := openGuarded(t, path, h.clock()).Save(); err != nil {
		t.Fatal(err)
	}
	began := h.wall
	h.pass(2 * time.Hour)
	if got := openGuarded(t, path, h.clock()).Now().Sub(began).Round(time.Second); got != 2*time.Hour {
		t.Errorf("after a restart two hours later: %s", got)
	}
	rebooted := h.clock()
	rebooted.Boot = "boot-2"
	g := openGuarded(t, path, rebooted)
	if got := g.Now().Sub(began).Round(time.Second); got != 0 {
		t.Errorf("after a reboot it claims to know of %s", got)
	}
}

// TestAnAdminsWordForTheClockIsRecorded, with what was known before it.
func TestAnAdminsWordForTheClockIsRecorded(t *testing.T) {
	f := newFixture(t)
	f.mustOpen(t)
	before := f.clock.wall
	f.clock.jump(time.Hour)
	if f.ca.Guarded().Behind() == nil {
		t.Fatal("the jump is not noticed")
	}
	number, _, err := f.ca.ConfirmClock(t.Context(), "uid 0")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.ca.Guarded().Behind(); err != nil {
		t.Errorf("after an admin's word: %v", err)
	}
	event, err := f.ledger.Event(t.Context(), number)
	if err != nil {
		t.Fatal(err)
	}
	want := &ledger.Waiver{Gate: "clock", From: ledger.At(before), To: ledger.At(before.Add(time.Hour)), By: "uid 0"}
	if got, ok := event.Body.(*ledger.Waiver); !ok || *got != *want {
		t.Errorf("recorded: %+v, want %+v", event.Body, want)
	}
}

func TestTheSystemsClockIsComparedAsItIsSet(t *testing.T) {
	// With a monotonic reading Go compares by that, and a clock that was set meanwhile seems not to have moved (package time).
	if now := ca.SystemClock().Wall(); now != now.Round(0) {
		t.Errorf("%s has a monotonic reading", now)
	}
}
