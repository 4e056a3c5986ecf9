package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"kedge/ca/ledger"
	"kedge/issuer/admin"
)

// What the log says of who has which trust bundle is there to be read, in both forms.
func TestTheBundleThatAHolderHasIsShown(t *testing.T) {
	issue := func(delivery ledger.Delivery, held uint64) *ledger.Issue {
		return &ledger.Issue{SPIFFEID: "spiffe://cluster.local/ns/default/sa/web", Serial: ledger.Serial{1}, Bundle: 4, Delivery: delivery, Held: held}
	}
	for _, test := range []struct {
		event ledger.Event
		shown string
		json  string
	}{
		{ledger.Event{Type: ledger.TypeConfirm, Body: &ledger.Confirm{Number: 7, Serial: ledger.Serial{1}, How: "sds-ack", Bundle: 3}}, "the holder has number 7 (sds-ack)  and trust bundle 3\n", `"bundle":3`},
		{ledger.Event{Type: ledger.TypeConfirm, Body: &ledger.Confirm{Number: 7, Serial: ledger.Serial{1}, How: "client-certificate"}}, "the holder has number 7 (client-certificate)\n", `"how":"client-certificate"`},
		{ledger.Event{Type: ledger.TypeIssue, Body: issue(ledger.DeliveryResponse, 0)}, "sequence 4\n", `"bundle":4`},
		{ledger.Event{Type: ledger.TypeIssue, Body: issue(ledger.DeliverySDS, 0)}, "sequence 4, by SDS; it was not known yet which one the holder has\n", `"delivery":"sds"`},
		{ledger.Event{Type: ledger.TypeIssue, Body: issue(ledger.DeliverySDS, 3)}, "sequence 4, by SDS; the holder had 3\n", `"held":3`},
	} {
		text, err := json.Marshal(test.event)
		if err != nil || !strings.Contains(string(text), test.json) {
			t.Errorf("%s (%v), want %s", text, err, test.json)
		}
		var event admin.Event // as it travels
		if err := json.Unmarshal(text, &event); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		c := &cobra.Command{}
		c.SetOut(&out)
		if err := showEvent(c, event); err != nil || !strings.Contains(out.String(), test.shown) {
			t.Errorf("%s (%v), want %q", &out, err, test.shown)
		}
	}
}
