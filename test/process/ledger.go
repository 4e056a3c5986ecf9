package process

import (
	"bufio"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"kedge/ca/ledger"
	"kedge/issuer/admin"
)

// Export reads the whole ledger of the running CA, as a SIEM would.
func (k *Kedge) Export(t testing.TB) []admin.Event {
	t.Helper()
	return k.export(t, 0)
}

// export reads it from an event on; 0 is the first that there is.
func (k *Kedge) export(t testing.TB, from uint64) []admin.Event {
	t.Helper()
	var events []admin.Event
	lines := bufio.NewScanner(strings.NewReader(k.Must(t, "ledger", "export", "--from", strconv.FormatUint(from, 10))))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var event admin.Event
		if err := json.Unmarshal(lines.Bytes(), &event); err != nil {
			t.Fatalf("ledger export: %v: %s", err, lines.Text())
		}
		events = append(events, event)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return events
}

// Book is what a reader of a ledger has seen of it so far, who comes back now and then. It begins with event 1, or after First.
type Book struct {
	First    uint64 // the last event that is not looked at
	last     *admin.Event
	recorded map[string]ledger.Hash // certificates by their serials
}

// Last is the number of the last event that was seen.
func (b *Book) Last() uint64 {
	if b.last == nil {
		return b.First
	}
	return b.last.Number
}

// Follow reads on in a book. The numbers have no gap, what was seen before still stands there, no serial is there twice, and each certificate that
// somebody received is recorded as it is.
func (k *Kedge) Follow(t testing.TB, b *Book, received []*x509.Certificate) {
	t.Helper()
	if b.recorded == nil {
		b.recorded = map[string]ledger.Hash{}
	}
	var events []admin.Event
	if b.last == nil {
		events = k.export(t, b.First+1)
	} else {
		if events = k.export(t, b.last.Number); len(events) == 0 || !reflect.DeepEqual(events[0], *b.last) {
			t.Fatalf("event %d is gone, or is another: %+v", b.last.Number, events[:min(len(events), 1)])
		}
		events = events[1:]
	}
	for _, event := range events {
		if event.Number != b.Last()+1 {
			t.Fatalf("event %d follows on %d", event.Number, b.Last())
		}
		b.last = &event
		if event.Issue == nil {
			continue
		}
		serial := event.Issue.Serial.String()
		if _, twice := b.recorded[serial]; twice {
			t.Errorf("serial %s was given twice, the second time as number %d", serial, event.Number)
		}
		b.recorded[serial] = event.Issue.Certificate
	}
	for _, leaf := range received {
		serial := ledger.Serial(leaf.SerialNumber.Bytes()).String()
		switch hash, ok := b.recorded[serial]; {
		case !ok:
			t.Errorf("a client holds the certificate %s (notBefore %s), and the ledger does not know it", serial, leaf.NotBefore)
		case hash != ledger.Hash(sha256.Sum256(leaf.Raw)):
			t.Errorf("the ledger records another certificate under %s than the client holds", serial)
		}
	}
}

// Verify lets the CA verify its whole ledger: the hash chain holds, and the holdings and all other tables equal a recount.
func (k *Kedge) Verify(t testing.TB) (report ledger.VerifyReport) {
	t.Helper()
	out := k.Must(t, "ledger", "verify", "--json")
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatalf("ledger verify: %v: %s", err, out)
	}
	if len(report.Problems) != 0 || report.Events != report.LastNumber-report.FirstNumber+1 {
		t.Errorf("ledger verify: %s", out)
	}
	return report
}

// CheckLedger makes sure of what holds after any crash: each certificate that somebody received is recorded as it is, no serial is there
// twice, the numbers begin at 1 and have no gap, the hash chain holds, and the holdings equal a recount.
func (k *Kedge) CheckLedger(t testing.TB, received []*x509.Certificate) {
	t.Helper()
	b := &Book{}
	k.Follow(t, b, received)
	if report := k.Verify(t); report.FirstNumber != 1 || report.LastNumber < b.Last() {
		t.Errorf("the ledger was exported up to event %d, and verified from %d to %d", b.Last(), report.FirstNumber, report.LastNumber)
	}
}
