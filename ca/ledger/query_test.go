package ledger

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"
)

func TestEventsAreFiltered(t *testing.T) {
	t.Parallel()
	h := newHouse(t) // events 1 to 3
	start := h.clock.at()
	var issues []*Issue
	for i := range 6 { // events 4 to 9, ten minutes apart
		issue := h.issue(func(e *Issue) { e.SPIFFEID = fmt.Sprintf("spiffe://cluster.local/%d", i%2) })
		h.must(issue)
		issues = append(issues, issue)
		h.clock.advance(10 * time.Minute)
	}
	h.must(&Confirm{Number: 5, Serial: issues[1].Serial, How: "sds-ack"},
		&Revoke{Serial: issues[1].Serial, NotAfter: issues[1].NotAfter, By: "uid=0"},
		&Token{ID: "t", SPIFFEID: "spiffe://cluster.local/1", Expires: start + 999999, By: "uid=0"}) // 10, 11, 12
	tests := []struct {
		name   string
		filter Filter
		want   []uint64
	}{
		{"all", Filter{}, []uint64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}},
		{"newest first", Filter{Newest: true, From: 9}, []uint64{12, 11, 10, 9}},
		{"from to", Filter{From: 3, To: 5}, []uint64{3, 4, 5}},
		{"beyond the end", Filter{From: 13}, nil},
		{"limit", Filter{Limit: 2}, []uint64{1, 2}},
		{"newest, limit", Filter{Limit: 2, Newest: true}, []uint64{12, 11}},
		{"types", Filter{Types: []Type{TypeBundle, TypeToken}}, []uint64{3, 12}},
		{"identity", Filter{SPIFFEID: "spiffe://cluster.local/1"}, []uint64{5, 7, 9, 12}},
		{"identity, issues, newest, limit", Filter{SPIFFEID: "spiffe://cluster.local/1", Types: []Type{TypeIssue}, Newest: true, Limit: 2}, []uint64{9, 7}},
		{"a part of an identity", Filter{SPIFFEID: "spiffe://cluster.local/"}, nil},
		{"serial", Filter{Serial: issues[1].Serial}, []uint64{5, 10, 11}},
		{"authority", Filter{Authority: h.ca.ID, Limit: 3}, []uint64{2, 4, 5}},
		{"since", Filter{Since: start + 1200, Types: []Type{TypeIssue}}, []uint64{6, 7, 8, 9}},
		{"until", Filter{Until: start + 600}, []uint64{1, 2, 3, 4}},
		{"since until", Filter{Since: start + 1, Until: start + 1201}, []uint64{5, 6}},
		{"a time before everything", Filter{Until: start}, nil},
		{"a time after everything", Filter{Since: start + 99999}, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var got []uint64
			for e, err := range h.Events(context.Background(), test.filter) {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, e.Number)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("events %v, want %v", got, test.want)
			}
			if count, err := h.Count(context.Background(), test.filter); count != uint64(len(test.want)) || err != nil {
				t.Errorf("Count is %d (%v), want %d", count, err, len(test.want))
			}
		})
	}
}

// Longer than one read transaction, in both directions, with appends, a handle swap and an early end in between.
func TestALongReadEndsWhereItBegan(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var bodies []Body
	for range maxDraft {
		bodies = append(bodies, h.issue())
	}
	for h.Head().Number < 3000 { // more than chunkBytes
		h.must(bodies...)
	}
	for _, newest := range []bool{false, true} {
		head := h.Head().Number
		seen, sum := uint64(0), uint64(0)
		for e, err := range h.Events(context.Background(), Filter{Newest: newest}) {
			if err != nil {
				t.Fatal(err)
			}
			seen++
			sum += e.Number
			if seen%1000 == 0 {
				h.must(h.issue())
				if err := h.reopenHandle(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if seen != head || sum != head*(head+1)/2 {
			t.Errorf("newest %t: %d events, want %d", newest, seen, head)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var last error
	for e, err := range h.Events(ctx, Filter{}) {
		if e.Number == 1 {
			cancel()
		}
		last = err
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("a read whose context ended ends with %v", last)
	}
}

// reopenHandle swaps the file's handle as a fault does. The writer is idle.
func (h *house) reopenHandle() error { return h.Ledger.reopen() }

func TestAnIssueIsFoundBySerialWhateverTheClockDid(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	type sample struct {
		issue  *Issue
		number uint64
		signed time.Time
	}
	var samples []sample
	jump := map[int]time.Duration{3: 48 * time.Hour, 5: -48 * time.Hour, 9: -24 * time.Hour, 12: 72 * time.Hour}
	for i := range 16 {
		h.clock.advance(jump[i] + time.Minute)
		var bodies []Body
		for range 60 {
			bodies = append(bodies, h.issue())
		}
		n := h.must(bodies...)
		for _, at := range []int{0, 30, 59} {
			samples = append(samples, sample{bodies[at].(*Issue), n + uint64(at), h.clock.Now()})
		}
	}
	for _, s := range samples {
		for _, off := range []time.Duration{0, -time.Minute, 100 * time.Hour, -100 * time.Hour} {
			e, err := h.FindIssue(context.Background(), s.issue.Serial, s.signed.Add(off))
			if err != nil || e.Number != s.number || e.Body.(*Issue).Serial.String() != s.issue.Serial.String() {
				t.Errorf("issue %d, looked for %v off: event %d, %v", s.number, off, e.Number, err)
			}
		}
	}
	for _, serial := range []Serial{{1}, {}, make(Serial, 100)} {
		if _, err := h.FindIssue(context.Background(), serial, h.clock.Now()); err == nil || (len(serial) == 1 && !errors.Is(err, ErrNotFound)) {
			t.Errorf("the serial %s: %v", serial, err)
		}
	}
}
