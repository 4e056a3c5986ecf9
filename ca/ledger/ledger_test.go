package ledger

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

const domain = "cluster.local"

// clock is a wall clock that tests set.
type clock struct{ seconds atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.seconds.Store(time.Date(2026, 9, 1, 12, 0, 0, 0, time.UTC).Unix())
	return c
}
func (c *clock) Now() time.Time          { return time.Unix(c.seconds.Load(), 0) }
func (c *clock) at() Time                { return Time(c.seconds.Load()) }
func (c *clock) advance(d time.Duration) { c.seconds.Add(int64(d / time.Second)) }

// house is a ledger with a root, an active issuing CA and a trust bundle.
type house struct {
	*Ledger
	t     testing.TB
	dir   string
	o     Options
	clock *clock
	root  *Authority
	ca    *Authority
	chain Hash
}

func newHouse(t testing.TB, change ...func(*Options)) *house {
	return newHouseIn(t, t.TempDir(), change...)
}

func newHouseIn(t testing.TB, dir string, change ...func(*Options)) *house {
	t.Helper()
	h := &house{t: t, dir: dir, clock: newClock()}
	h.o = Options{TrustDomain: domain, ProgramVersion: "0.1.0", Now: h.clock.Now}
	for _, f := range change {
		f(&h.o)
	}
	h.root = founding("root", RoleRoot, StateActive)
	h.ca = founding("issuing", RoleIssuing, StateActive)
	h.chain = ChainHash(h.ca.Record.Chain)
	h.open()
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

func (h *house) open() {
	h.t.Helper()
	l, err := Open(h.dir, h.o)
	if err != nil {
		h.t.Fatal(err)
	}
	h.Ledger = l
	if l.Head().Number == 0 {
		h.must(h.root, h.ca, bundle(1, 1))
	}
}

func (h *house) reopen() {
	h.t.Helper()
	if err := h.Close(); err != nil {
		h.t.Fatal(err)
	}
	h.open()
}

func founding(name string, role Role, to State) *Authority {
	der := []byte("certificate of " + name)
	return &Authority{
		ID: sha256.Sum256(der), TrustDomain: domain, To: to, By: "test",
		Record: &Founded{Kind: "x509", Role: role, Certificate: der, Chain: [][]byte{der}, KeyRef: name, Coverage: Coverage{Kind: "complete"}},
	}
}

func move(id Hash, from, to State) *Authority {
	return &Authority{ID: id, TrustDomain: domain, From: from, To: to, By: "test"}
}

func bundle(sequence, floor uint64) *Bundle {
	return &Bundle{TrustDomain: domain, Sequence: sequence, Roots: [][]byte{[]byte("root")}, Floor: floor}
}

func serialOf(n uint64) Serial {
	s := Serial{1, 'a', 'b', 'c'}
	s = binary.BigEndian.AppendUint64(s, n)
	return append(s, 7, 7, 7, 7, 7, 7, 7, 7)
}

var serials atomic.Uint64

// issue makes an Issue that would be accepted now and lives for an hour.
func (h *house) issue(change ...func(*Issue)) *Issue {
	now := h.clock.at()
	i := &Issue{
		Serial: serialOf(serials.Add(1)), Certificate: Hash{1}, SPIFFEID: "spiffe://cluster.local/ns/default/sa/web", Key: Hash{2},
		NotBefore: now - 60, NotAfter: now + 3600, Authority: h.ca.ID, Chain: h.chain, Bundle: 1, Delivery: DeliveryResponse, Profile: "default",
		Proofs: []Proof{{Method: "kubernetes", Issuer: "prod", Subject: "system:serviceaccount:default:web", Time: now}},
		Holder: Holder{Kind: "pod", ID: "0b5e3f6c-7f3e-4a2c-9a8b-2f1f3c9d7e11"}, RequestID: "f3b1c2d4e5f60718", Peer: "10.1.2.3:44532",
	}
	for _, f := range change {
		f(i)
	}
	return i
}

// must appends, and gives the number of the first event.
func (h *house) must(events ...Body) uint64 {
	h.t.Helper()
	n, err := h.Append(context.Background(), events...)
	if err != nil {
		h.t.Fatal(err)
	}
	return n
}

// refused makes sure that appending fails with one of the errors that callers branch on, and leaves no trace.
func (h *house) refused(want error, events ...Body) {
	h.t.Helper()
	before := h.Head()
	n, err := h.Append(context.Background(), events...)
	if !errors.Is(err, want) {
		h.t.Errorf("Append gives event %d and the error %v; want one that is %q", n, err, want)
	}
	if after := h.Head(); after != before {
		h.t.Errorf("a refused append moved the head from %d to %d", before.Number, after.Number)
	}
}

func (h *house) clean() VerifyReport {
	h.t.Helper()
	report, err := h.Verify(context.Background())
	if err != nil {
		h.t.Fatal(err)
	}
	for _, problem := range report.Problems {
		h.t.Errorf("Verify: %s", problem)
	}
	return report
}

// edit changes the file behind the ledger's back.
func (h *house) edit(f func(*bolt.Tx) error) {
	h.t.Helper()
	if err := h.Close(); err != nil {
		h.t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(h.dir, storeFile), 0o600, nil)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := errors.Join(db.Update(f), db.Close()); err != nil {
		h.t.Fatal(err)
	}
	h.open()
}

// awaitLog is a logger that tells when a message comes.
type awaitLog struct {
	message string
	seen    chan struct{} // one element each time
}

func newAwaitLog(message string) *awaitLog {
	return &awaitLog{message: message, seen: make(chan struct{}, 1000)}
}
func (a *awaitLog) Enabled(context.Context, slog.Level) bool { return true }
func (a *awaitLog) WithAttrs([]slog.Attr) slog.Handler       { return a }
func (a *awaitLog) WithGroup(string) slog.Handler            { return a }
func (a *awaitLog) Handle(_ context.Context, r slog.Record) error {
	if r.Message == a.message {
		a.seen <- struct{}{}
	}
	return nil
}

const healed = "the ledger is verified and can be written again"

func TestEventsReadBackAsTheyWereAppended(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	ctx := context.Background()
	token := &Token{ID: "t1", SPIFFEID: "spiffe://cluster.local/vm", Expires: h.clock.at() + 600, By: "uid=0"}
	issue := h.issue(func(i *Issue) {
		i.FirstProof, i.ClampedFrom, i.ClusterID, i.Names = &Proof{Method: "oidc", Time: 5}, 86400, "Kubernetes", []string{"localhost"}
	})
	first := h.must(token, issue, &Revoke{Serial: issue.Serial, NotAfter: issue.NotAfter, By: "uid=0"})
	e, err := h.Event(ctx, first+1)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprintf("%+v", e.Body), fmt.Sprintf("%+v", Body(issue)); e.Type != TypeIssue || e.Number != first+1 || e.Log != h.Head().Log ||
		e.Time != h.clock.at() || len(got) == 0 || *e.Body.(*Issue).FirstProof != *issue.FirstProof || len(got) != len(want) {
		t.Errorf("event %+v\nwant  %s", e, want)
	}
	if _, err := h.Event(ctx, first+9); !errors.Is(err, ErrNotFound) {
		t.Errorf("an event that is not there: %v", err)
	}
	if revoked, err := h.Revoked(issue.Serial); !revoked || err != nil {
		t.Errorf("the revoked serial: %t, %v", revoked, err)
	}
	if revoked, _ := h.Revoked(serialOf(1 << 40)); revoked {
		t.Error("a serial that nobody revoked counts as revoked")
	}
	record, err := h.CurrentBundle()
	if err != nil || record.Sequence != 1 || record.Incarnation != h.Head().Incarnation || record.Number != 3 {
		t.Errorf("bundle %+v, %v", record, err)
	}
	authorities, err := h.Authorities()
	if err != nil || len(authorities) != 2 || authorities[0].ID != h.root.ID || authorities[1].State != StateActive || authorities[1].KeyRef != "issuing" {
		t.Errorf("authorities %+v, %v", authorities, err)
	}
	head := h.Head()
	h.reopen()
	if h.Head() != head {
		t.Errorf("the head is %+v after opening anew, and was %+v", h.Head(), head)
	}
	if revoked, _ := h.Revoked(issue.Serial); !revoked {
		t.Error("the revocation was forgotten")
	}
	h.clean()
}

// An issue event is what there are millions of.
func TestAnIssueEventIsSmall(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	encoded, err := encodeBody(h.issue())
	if err != nil {
		t.Fatal(err)
	}
	if size := len(envelope{version: 1, typ: TypeIssue, time: h.clock.at(), number: 1 << 30}.seal(encoded)); size > 420 {
		t.Errorf("a typical issue event has %d octets", size)
	} else {
		t.Logf("a typical issue event has %d octets", size)
	}
}

func TestNumbersHaveNoGapsUnderManyAppenders(t *testing.T) {
	t.Parallel()
	var commits, events atomic.Int64
	h := newHouse(t, func(o *Options) {
		o.OnCommit = func(c Commit) { commits.Add(1); events.Add(int64(c.Events)) }
	})
	const appenders, each = 32, 25
	var group sync.WaitGroup
	var numbers sync.Map
	for range appenders {
		group.Go(func() {
			for i := range each {
				issue := h.issue()
				bodies := []Body{issue}
				if i%5 == 4 { // some are refused in the middle, after their first event was written
					if _, err := h.Append(context.Background(), h.issue(), h.issue(func(i *Issue) { i.Bundle = 9 })); !errors.Is(err, ErrNotFound) {
						t.Error(err)
					}
					bodies = append(bodies, h.issue())
				}
				n, err := h.Append(context.Background(), bodies...)
				if err != nil {
					t.Error(err)
				}
				for j, body := range bodies {
					if _, twice := numbers.LoadOrStore(n+uint64(j), body.(*Issue).Serial.String()); twice {
						t.Errorf("number %d was given twice", n+uint64(j))
					}
				}
			}
		})
	}
	group.Wait()
	head := h.Head()
	if want := uint64(3 + appenders*each*6/5); head.Number != want {
		t.Errorf("the head is %d, want %d", head.Number, want)
	}
	for e, err := range h.Events(context.Background(), Filter{From: 4}) {
		if err != nil {
			t.Fatal(err)
		}
		if serial, ok := numbers.Load(e.Number); !ok || serial != e.Body.(*Issue).Serial.String() {
			t.Errorf("event %d has the serial %s, its caller was told so for %v", e.Number, e.Body.(*Issue).Serial, serial)
		}
	}
	if events.Load() != int64(head.Number) || commits.Load() > events.Load() {
		t.Errorf("OnCommit counted %d events in %d commits", events.Load(), commits.Load())
	}
	h.clean()
}

// Whatever is appended in whatever order, with the file opened anew in between: the holdings equal a recount made by other means.
func TestHoldingsEqualARecount(t *testing.T) {
	t.Parallel()
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			random := rand.New(rand.NewPCG(seed, 1))
			type live struct {
				issue   *Issue
				number  uint64
				bundle  uint64 // that it counts under
				settled bool
			}
			var issues []*live
			counted := map[Holding]bool{}
			retired := map[uint64]bool{}
			sequence, floor := uint64(1), uint64(1)
			of := func(number uint64) *live {
				for _, one := range issues {
					if one.number == number {
						return one
					}
				}
				return nil
			}
			same := func(a, b *Issue) bool { // one holder has both
				return a.SPIFFEID == b.SPIFFEID && a.Delivery == b.Delivery && (a.Delivery != DeliverySDS || a.Holder == b.Holder)
			}
			issued := func(issue *Issue, number uint64) {
				one := &live{issue: issue, number: number, bundle: issue.Bundle}
				if issue.Delivery == DeliverySDS {
					one.bundle = 0
					if before := of(issue.Replaces); before != nil && same(issue, before.issue) {
						one.bundle = before.bundle
					}
				}
				issues = append(issues, one)
			}
			for range 160 {
				switch pick := random.IntN(24); {
				case pick < 9:
					i := h.issue(func(i *Issue) {
						i.Bundle = floor + random.Uint64N(sequence-floor+1)
						i.NotAfter += Time(random.IntN(4 * 3600))
						i.SPIFFEID = fmt.Sprintf("spiffe://cluster.local/%d", random.IntN(2))
						i.Holder.ID = fmt.Sprint(random.IntN(4) / 3)
						i.Delivery = DeliveryResponse + Delivery(random.IntN(2))
						if len(issues) > 0 && random.IntN(2) == 0 {
							i.Replaces = issues[random.IntN(len(issues))].number
						}
					})
					issued(i, h.must(i))
				case pick < 19 && len(issues) > 0:
					chosen := issues[random.IntN(len(issues))]
					confirm := &Confirm{Number: chosen.number, Serial: chosen.issue.Serial, How: "sds-ack", Bundle: random.Uint64N(sequence + 2)}
					switch {
					case confirm.Bundle > sequence:
						h.refused(ErrNotFound, confirm)
						continue
					case chosen.settled && confirm.Bundle <= chosen.bundle, confirm.Bundle != 0 && confirm.Bundle < chosen.bundle:
						h.refused(ErrAlready, confirm)
						continue
					}
					next := h.issue(func(i *Issue) {
						i.Bundle, i.Replaces, i.SPIFFEID, i.Delivery, i.Holder = sequence, chosen.number, chosen.issue.SPIFFEID, chosen.issue.Delivery, chosen.issue.Holder
					})
					h.must(confirm, next)
					chosen.bundle = max(chosen.bundle, confirm.Bundle)
					if old := of(chosen.issue.Replaces); !chosen.settled && old != nil && same(chosen.issue, old.issue) && old.issue.NotAfter > h.Head().Time {
						retired[old.number] = true
					}
					chosen.settled = true
					issued(next, h.Head().Number)
				case pick == 19 || pick == 20:
					sequence++
					floor = max(floor, sequence-random.Uint64N(2)-1)
					h.must(bundle(sequence, floor))
				case pick == 21:
					h.clock.advance(time.Duration(random.IntN(5000)-1000) * time.Second)
				case pick == 22:
					h.reopen()
				case pick == 23:
					h.refused(ErrNotFound, h.issue(func(i *Issue) { i.Bundle = sequence }), &Confirm{Number: 1, Serial: Serial{1}, How: "x"})
				}
			}
			// The rows keep the latest end of what they ever counted, which the count itself does not tell any more.
			want := map[holdingKey]uint64{}
			for _, i := range issues {
				if !retired[i.number] {
					want[holdingKey{i.issue.Chain, i.bundle, int64(i.issue.NotAfter) / 3600}]++
				}
			}
			rows, err := h.Holdings()
			if err != nil {
				t.Fatal(err)
			}
			for _, row := range rows {
				k := holdingKey{row.Chain, row.Bundle, row.Hour}
				if want[k] != row.Count || counted[row] || int64(row.Latest)/3600 != row.Hour {
					t.Errorf("row %+v, a recount gives %d", row, want[k])
				}
				counted[row] = true
				delete(want, k)
			}
			for k, count := range want {
				t.Errorf("no row for bundle %d, hour %d: a recount gives %d", k.bundle, k.hour, count)
			}
			for _, i := range issues {
				state, err := h.IssueState(i.number)
				if err != nil || state.Confirmed != i.settled || state.Retired != retired[i.number] {
					t.Errorf("issue %d is %+v (%v), want confirmed %t, retired %t", i.number, state, err, i.settled, retired[i.number])
				}
			}
			h.clean()
		})
	}
}

func TestAWaitingAppendCanBeWithdrawn(t *testing.T) {
	t.Parallel()
	release, entered := make(chan struct{}), make(chan struct{})
	var hold atomic.Bool
	h := newHouse(t, func(o *Options) {
		o.MaxQueue = 1
		o.OnCommit = func(Commit) {
			if hold.CompareAndSwap(true, false) {
				close(entered)
				<-release
			}
		}
	})
	hold.Store(true)
	inCommit, waiting := make(chan error, 1), make(chan error, 1)
	go func() { _, err := h.Append(context.Background(), h.issue()); inCommit <- err }()
	<-entered // the writer is busy with that commit
	ctx, cancel := context.WithCancel(context.Background())
	go func() { _, err := h.Append(ctx, h.issue()); waiting <- err }()
	for len(h.queue) == 0 {
		if _, err := h.Event(context.Background(), 1); err != nil { // let the other goroutine run
			t.Fatal(err)
		}
	}
	h.refused(ErrBusy, h.issue())
	cancel()
	if err := <-waiting; !errors.Is(err, context.Canceled) {
		t.Errorf("the withdrawn append gives %v", err)
	}
	close(release)
	if err := <-inCommit; err != nil {
		t.Error(err)
	}
	if err := h.Probe(context.Background()); err != nil {
		t.Error(err)
	}
	if n := h.Head().Number; n != 4 {
		t.Errorf("the head is %d: a withdrawn event was recorded, or one was lost", n)
	}
}

func TestCloseRefusesWhatWaits(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			for {
				_, err := h.Append(context.Background(), h.issue())
				if errors.Is(err, ErrClosed) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for h.Head().Number < 50 {
		if err := h.Probe(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	group.Wait()
	if _, err := h.Event(context.Background(), 1); !errors.Is(err, ErrClosed) {
		t.Errorf("reading after Close gives %v", err)
	}
	head := h.Head()
	h.open()
	if h.Head() != head {
		t.Errorf("the head was %d, and is %d", head.Number, h.Head().Number)
	}
	h.clean()
}

func TestTheTimeOfEventsNeverGoesBack(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	before := h.clock.at()
	h.clock.advance(-24 * time.Hour)
	n := h.must(h.issue())
	e, err := h.Event(context.Background(), n)
	if err != nil || e.Time != before {
		t.Errorf("event %d is of %s (%v), the one before of %s", n, e.Time, err, before)
	}
	h.clean()
}
