package process

import (
	"bufio"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"strings"
	"testing"

	"kedge/ca/ledger"
	"kedge/issuer/admin"
)

// Export reads the whole ledger of the running CA, as a SIEM would.
func (k *Kedge) Export(t testing.TB) []admin.Event {
	t.Helper()
	var events []admin.Event
	lines := bufio.NewScanner(strings.NewReader(k.Must(t, "ledger", "export")))
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

// CheckLedger makes sure of what holds after any crash: each certificate that somebody received is recorded as it is, no serial is there
// twice, the numbers begin at 1 and have no gap, the hash chain holds, and the holdings equal a recount.
func (k *Kedge) CheckLedger(t testing.TB, received []*x509.Certificate) {
	t.Helper()
	events := k.Export(t)
	recorded := map[string]ledger.Hash{}
	for i, event := range events {
		if event.Number != uint64(i)+1 {
			t.Fatalf("event %d has the number %d", i+1, event.Number)
		}
		if event.Issue == nil {
			continue
		}
		serial := event.Issue.Serial.String()
		if _, twice := recorded[serial]; twice {
			t.Errorf("serial %s was given twice, the second time as number %d", serial, event.Number)
		}
		recorded[serial] = event.Issue.Certificate
	}
	for _, leaf := range received {
		serial := ledger.Serial(leaf.SerialNumber.Bytes()).String()
		switch hash, ok := recorded[serial]; {
		case !ok:
			t.Errorf("a client holds the certificate %s (notBefore %s), and the ledger does not know it", serial, leaf.NotBefore)
		case hash != ledger.Hash(sha256.Sum256(leaf.Raw)):
			t.Errorf("the ledger records another certificate under %s than the client holds", serial)
		}
	}
	var report ledger.VerifyReport
	out := k.Must(t, "ledger", "verify", "--json")
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatalf("ledger verify: %v: %s", err, out)
	}
	if report.Events < uint64(len(events)) || report.FirstNumber != 1 || report.LastNumber != report.Events || len(report.Problems) != 0 {
		t.Errorf("ledger verify, of %d events or what the CA itself has added since: %s", len(events), out)
	}
}
