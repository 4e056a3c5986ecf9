package ledger

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"math"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Reading goes through the log in short transactions: a long one would keep the writer from growing its file.
const (
	chunkRecords = 4096
	chunkBytes   = 1 << 20 // of what is kept of them
)

// Filter selects events. The zero value selects all. What is set must all hold.
type Filter struct {
	From, To  uint64 // numbers, both inclusive; 0: from the first that is kept, to the last. A From that was pruned is ErrPruned
	Types     []Type // any of these; empty: all
	SPIFFEID  string // of an issue or a join token
	Serial    Serial // of an issue, confirmation or revocation
	Authority Hash   // that issued, or that changed its state
	Since     Time   // the event's time, inclusive; 0: open
	Until     Time   // the event's time, exclusive; 0: open
	Newest    bool   // the newest first
	Limit     int    // how many at most; 0: no limit
}

// matcher decides about stored events, and rejects most of them without decoding their body.
type matcher struct {
	filter  Filter
	needles [][]byte // CBOR strings that a matching event contains
}

func newMatcher(f Filter) matcher {
	m := matcher{filter: f}
	if f.SPIFFEID != "" {
		m.needles = append(m.needles, append(appendHead(nil, majorText, uint64(len(f.SPIFFEID))), f.SPIFFEID...))
	}
	if len(f.Serial) > 0 {
		m.needles = append(m.needles, append(appendHead(nil, majorBytes, uint64(len(f.Serial))), f.Serial...))
	}
	if !f.Authority.IsZero() {
		m.needles = append(m.needles, append(appendHead(nil, majorBytes, uint64(len(f.Authority))), f.Authority[:]...))
	}
	return m
}

// may says whether a stored event can match.
func (m matcher) may(raw []byte) (bool, error) {
	for _, needle := range m.needles {
		if !bytes.Contains(raw, needle) {
			return false, nil
		}
	}
	if len(m.filter.Types) == 0 {
		return true, nil
	}
	e, _, err := unseal(raw)
	return slices.Contains(m.filter.Types, e.typ), err
}

// matches decides about an event of which may was true.
func (m matcher) matches(e Event) bool {
	var spiffeID string
	var serial Serial
	var authority Hash
	switch b := e.Body.(type) {
	case *Issue:
		spiffeID, serial, authority = b.SPIFFEID, b.Serial, b.Authority
	case *Confirm:
		serial = b.Serial
	case *Revoke:
		serial = b.Serial
	case *Token:
		spiffeID = b.SPIFFEID
	case *Authority:
		authority = b.ID
	}
	f := m.filter
	return (f.SPIFFEID == "" || f.SPIFFEID == spiffeID) && (len(f.Serial) == 0 || bytes.Equal(f.Serial, serial)) &&
		(f.Authority.IsZero() || f.Authority == authority)
}

// span is what of the log is still to be read: the numbers from first to last, from one end or the other.
type span struct {
	first, last uint64
	newest      bool
	whole       bool // each of the numbers has its event, unless it was pruned meanwhile: then chunk gives ErrPruned, if it reads from the first on
}

func (s span) empty() bool { return s.first > s.last }

// chunk reads on in one short transaction, until visit says that it is enough. What is left of s tells where to go on.
func (l *Ledger) chunk(s *span, visit func(n uint64, raw []byte) (more bool, err error)) error {
	return l.view(func(tx *bolt.Tx) error {
		cursor := tx.Bucket(bucketEvents).Cursor()
		step := cursor.Next
		key, raw := cursor.Seek(number(s.first))
		if s.newest {
			step = cursor.Prev
			if key, raw = cursor.Seek(number(s.last)); key == nil {
				key, raw = cursor.Last()
			} else if toNumber(key) > s.last {
				key, raw = cursor.Prev()
			}
		}
		if s.whole && !s.newest && toNumber(key) != s.first {
			last := s.last
			if key != nil {
				last = min(last, toNumber(key)-1)
			}
			return l.pruned(s.first, last)
		}
		for read := 0; read < chunkRecords; read++ {
			n := toNumber(key)
			if key == nil || n < s.first || n > s.last {
				s.first, s.last = 1, 0 // nothing is left
				return nil
			}
			more, err := visit(n, raw)
			if s.newest {
				s.last = n - 1
			} else {
				s.first = n + 1
			}
			if err != nil || !more {
				return err
			}
			key, raw = step()
		}
		return nil
	})
}

// span finds the numbers that a filter leaves. Times never fall along the log, so that they are found by bisection.
func (l *Ledger) span(f Filter) (s span, err error) {
	s = span{first: max(f.From, 1), last: math.MaxUint64 - 1, newest: f.Newest, whole: true}
	if f.To != 0 {
		s.last = f.To
	}
	err = l.view(func(tx *bolt.Tx) error {
		head, err := readHead(tx)
		if err != nil {
			return err
		}
		s.first, s.last = max(s.first, head.First), min(s.last, head.Number)
		if f.Since != 0 {
			n, err := firstAt(tx, head, f.Since)
			if err != nil {
				return err
			}
			s.first = max(s.first, n)
		}
		if f.Until != 0 {
			n, err := firstAt(tx, head, f.Until)
			if err != nil {
				return err
			}
			s.last = min(s.last, n-1)
		}
		if f.From != 0 && f.From < head.First && s.first == head.First { // else what was pruned is earlier than Since
			last := head.First - 1
			if f.To != 0 {
				last = min(last, f.To)
			}
			return l.pruned(f.From, last)
		}
		return nil
	})
	return s, err
}

// pruned says that events are gone, and where they may be.
func (l *Ledger) pruned(first, last uint64) error {
	what := fmt.Sprintf("the events %d to %d are", first, last)
	if first == last {
		what = fmt.Sprintf("event %d is", first)
	}
	where := "there is no archive of them, since ledger.archiveDir is not set"
	if l.o.ArchiveDir != "" {
		where = "what was dropped since ledger.archiveDir is set is in files in " + l.o.ArchiveDir
	}
	return fmt.Errorf("%s no longer in the ledger, which begins with number %d: %w; %s", what, l.Head().First, ErrPruned, where)
}

// firstAt returns the number of the first event that is not earlier than t, or the one after the last event.
func firstAt(tx *bolt.Tx, head Head, t Time) (uint64, error) {
	events := tx.Bucket(bucketEvents)
	low, high := head.First, head.Number+1
	for low < high {
		middle := low + (high-low)/2
		e, _, err := unseal(events.Get(number(middle)))
		if err != nil {
			return 0, damaged{fmt.Errorf("event %d: %w", middle, err)}
		}
		if e.time < t {
			low = middle + 1
		} else {
			high = middle
		}
	}
	return low, nil
}

// Event returns the event with a number. The error wraps ErrNotFound when the log has none, or no longer has it.
func (l *Ledger) Event(ctx context.Context, n uint64) (e Event, err error) {
	if err := ctx.Err(); err != nil {
		return e, err
	}
	err = l.view(func(tx *bolt.Tx) error {
		raw := tx.Bucket(bucketEvents).Get(number(n))
		if raw == nil {
			return fmt.Errorf("event %d: %w", n, ErrNotFound)
		}
		e, err = decodeStored(n, raw)
		return err
	})
	return e, err
}

func decodeStored(n uint64, raw []byte) (Event, error) {
	e, err := DecodeEvent(raw)
	if err == nil && e.Number != n {
		err = fmt.Errorf("it says that it is event %d", e.Number)
	}
	if err != nil {
		return e, damaged{fmt.Errorf("event %d cannot be read: %w; run 'kedge ledger verify'", n, err)}
	}
	return e, nil
}

type stored struct {
	number uint64
	raw    []byte
}

// Events goes through the events that match. A gap is an error, ErrPruned: when From is no longer kept, or when what is to be read is pruned meanwhile. It ends with the last event that there was when it began, or after an error, which
// it yields as its last. The body of the loop may use the ledger freely.
func (l *Ledger) Events(ctx context.Context, f Filter) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		s, err := l.span(f)
		m := newMatcher(f)
		var found []stored
		for yielded := 0; err == nil && !s.empty(); {
			if err = ctx.Err(); err != nil {
				break
			}
			size := 0
			found = found[:0]
			err = l.chunk(&s, func(n uint64, raw []byte) (bool, error) {
				may, err := m.may(raw)
				if err != nil || !may {
					return true, err
				}
				found = append(found, stored{n, bytes.Clone(raw)})
				size += len(raw)
				return size < chunkBytes && (f.Limit == 0 || len(found) < f.Limit-yielded || len(m.needles) > 0), nil
			})
			for _, candidate := range found {
				e, decodeErr := decodeStored(candidate.number, candidate.raw)
				if decodeErr != nil {
					yield(Event{}, decodeErr)
					return
				}
				if !m.matches(e) {
					continue
				}
				yielded++
				if !yield(e, nil) || yielded == f.Limit {
					return
				}
			}
		}
		if err != nil {
			yield(Event{}, fmt.Errorf("reading the ledger: %w", err))
		}
	}
}

// Count counts the events that match.
func (l *Ledger) Count(ctx context.Context, f Filter) (count uint64, err error) {
	s, err := l.span(f)
	m := newMatcher(f)
	full := func() bool { return f.Limit > 0 && count == uint64(f.Limit) }
	for err == nil && !s.empty() && !full() {
		if err = ctx.Err(); err != nil {
			break
		}
		err = l.chunk(&s, func(n uint64, raw []byte) (bool, error) {
			matches, err := m.may(raw)
			if err == nil && matches && len(m.needles) > 0 {
				var e Event
				e, err = decodeStored(n, raw)
				matches = m.matches(e)
			}
			if matches {
				count++
			}
			return !full(), err
		})
	}
	if err != nil {
		return 0, fmt.Errorf("counting in the ledger: %w", err)
	}
	return count, nil
}

// findWindow is how many events FindIssue looks at first; the windows double from there.
const findWindow = 256

// FindIssue returns the issue event of a serial number. signed is about when the certificate was signed (its notBefore, say): the search begins
// there and widens in both directions, up to the whole log, so that a clock that jumped costs time and nothing else.
// The error wraps ErrNotFound when the log has no such issue.
func (l *Ledger) FindIssue(ctx context.Context, serial Serial, signed time.Time) (found Event, err error) {
	if err := serial.check(); err != nil {
		return found, fmt.Errorf("looking for a certificate by its serial number: %w", err)
	}
	var head Head
	var middle uint64
	err = l.view(func(tx *bolt.Tx) error {
		if head, err = readHead(tx); err != nil {
			return err
		}
		middle, err = firstAt(tx, head, At(signed))
		return err
	})
	m := newMatcher(Filter{Types: []Type{TypeIssue}, Serial: serial})
	search := func(s span) error {
		for !s.empty() && found.Number == 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			err := l.chunk(&s, func(n uint64, raw []byte) (bool, error) {
				may, err := m.may(raw)
				if err != nil || !may {
					return true, err
				}
				e, err := decodeStored(n, raw)
				if err == nil && m.matches(e) {
					found = e
				}
				return found.Number == 0, err
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
	up, down := middle, middle // [down, up) has been searched
	for window := uint64(findWindow); err == nil && found.Number == 0 && (up <= head.Number || down > head.First); window *= 2 {
		next := min(up+window, head.Number+1)
		if err = search(span{first: up, last: next - 1}); err != nil {
			break
		}
		up = next
		if found.Number == 0 {
			next = max(down-min(window, down), head.First)
			err = search(span{first: next, last: down - 1, newest: true})
			down = next
		}
	}
	if err != nil {
		return Event{}, fmt.Errorf("looking for the serial number %s: %w", serial, err)
	}
	if found.Number == 0 {
		return Event{}, fmt.Errorf("the issue of serial number %s: %w", serial, ErrNotFound)
	}
	return found, nil
}
