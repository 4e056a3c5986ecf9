package ledger

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"
)

// fill makes a ledger with every kind of event, and more of them than Open looks at.
func fill(t *testing.T) *house {
	h := newHouse(t)
	token := &Token{ID: "t", SPIFFEID: "spiffe://cluster.local/vm", Expires: h.clock.at() + 60000, By: "uid=0"}
	spend := func(i *Issue) { i.Token, i.SPIFFEID = "t", token.SPIFFEID }
	n := h.must(h.issue(), token, h.issue(spend), &Revoke{Serial: Serial{5}, NotAfter: h.clock.at() + 60000})
	e, err := h.Event(context.Background(), n)
	if err != nil {
		t.Fatal(err)
	}
	next := h.issue(func(i *Issue) { i.Replaces = n })
	m := h.must(&Confirm{Number: n, Serial: e.Body.(*Issue).Serial, How: "sds-ack"}, next) + 1
	h.must(&Confirm{Number: m, Serial: next.Serial, How: "sds-ack"}, founding("x", RoleIssuing, StatePrepared), bundle(2, 1), h.issue(spend))
	for h.Head().Number < 2*headEvents {
		var bodies []Body
		for range maxDraft {
			bodies = append(bodies, h.issue())
		}
		h.must(bodies...)
	}
	stream := h.issue(func(i *Issue) { i.Delivery = DeliverySDS })
	at := h.must(stream)
	renewed := h.issue(func(i *Issue) { i.Delivery, i.Replaces = DeliverySDS, at })
	h.must(&Confirm{Number: at, Serial: stream.Serial, How: "sds-ack", Bundle: 2}, renewed)
	h.must(&Confirm{Number: at + 2, Serial: renewed.Serial, How: "sds-ack"})
	return h
}

func TestVerifyFindsWhatWasTamperedWith(t *testing.T) {
	t.Parallel()
	flip := func(b []byte, at int) []byte {
		b = bytes.Clone(b)
		b[at] ^= 1
		return b
	}
	inTable := func(name []byte, change func(b *bolt.Bucket, key, value []byte) error) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketTrustDomains).Bucket([]byte(domain)).Bucket(name)
			key, value := b.Cursor().First()
			return change(b, bytes.Clone(key), bytes.Clone(value))
		}
	}
	// inMark changes the first mark that has a bundle.
	inMark := func(change func(value []byte) []byte) func(*bolt.Tx) error {
		return inTable(bucketSettled, func(b *bolt.Bucket, _, _ []byte) error {
			cursor := b.Cursor()
			for key, value := cursor.First(); key != nil; key, value = cursor.Next() {
				if len(value) > 1 {
					return b.Put(bytes.Clone(key), change(bytes.Clone(value)))
				}
			}
			return errors.New("there is none")
		})
	}
	remove := func(b *bolt.Bucket, key, _ []byte) error { return b.Delete(key) }
	tests := []struct {
		name   string
		tamper func(tx *bolt.Tx) error
		want   string
	}{
		{"nothing", func(tx *bolt.Tx) error { return nil }, ""},
		{"a flipped bit in an event", func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketEvents)
			return b.Put(number(4), flip(b.Get(number(4)), 60))
		}, "does not match the hash chain"},
		{"a flipped bit in an envelope", func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketEvents)
			return b.Put(number(9), flip(b.Get(number(9)), 0))
		}, "event 9 cannot be read"},
		{"two events exchanged", func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketEvents)
			four, six := bytes.Clone(b.Get(number(4))), bytes.Clone(b.Get(number(6)))
			if err := b.Put(number(4), six); err != nil {
				return err
			}
			return b.Put(number(6), four)
		}, "event 4 says that it is event 6"},
		{"a removed event", func(tx *bolt.Tx) error { return tx.Bucket(bucketEvents).Delete(number(6)) }, "event 6 is missing"},
		{"an added event", func(tx *bolt.Tx) error { return tx.Bucket(bucketEvents).Put(number(0), []byte{1}) }, "before the first"},
		{"a removed commit", func(tx *bolt.Tx) error { return tx.Bucket(bucketCommits).Delete(number(4)) }, "is expected at 4"},
		{"a changed commit hash", func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketCommits)
			return b.Put(number(4), flip(b.Get(number(4)), 20))
		}, "does not match the hash chain"},
		{"a changed anchor", func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketMeta)
			return b.Put(keyAnchor, flip(b.Get(keyAnchor), 20))
		}, "does not begin with the hash"},
		{"a raised holdings row", inTable(bucketHoldings, func(b *bolt.Bucket, key, value []byte) error { return b.Put(key, flip(value, 7)) }), "a recount gives"},
		{"a removed holdings row", inTable(bucketHoldings, remove), "the table has no holdings"},
		{"an added holdings row", inTable(bucketHoldings, func(b *bolt.Bucket, key, value []byte) error { return b.Put(flip(key, 0), value) }), "a recount gives 0"},
		{"an authority made active", inTable(bucketAuthorities, func(b *bolt.Bucket, _, _ []byte) error {
			return b.ForEach(func(key, value []byte) error {
				row, err := decodeRow[authorityRow](bucketAuthorities, value)
				if err != nil || row.State != StatePrepared {
					return err
				}
				row.State = StateActive
				changed, err := encoding.Marshal(row)
				if err != nil {
					return err
				}
				return b.Put(bytes.Clone(key), changed)
			})
		}), "is active in the table"},
		{"a removed authority", inTable(bucketAuthorities, remove), "the table has no authority"},
		{"a changed bundle", inTable(bucketBundles, func(b *bolt.Bucket, key, value []byte) error {
			return b.Put(key, bytes.Replace(value, []byte("root"), []byte("r00t"), 1))
		}), "is not the one in the table"},
		{"a token made unspent", inTable(bucketTokens, func(b *bolt.Bucket, key, value []byte) error {
			row, err := decodeRow[tokenRow](bucketTokens, value)
			if err != nil {
				return err
			}
			row.Redeemed = 0
			changed, err := encoding.Marshal(row)
			if err != nil {
				return err
			}
			return b.Put(key, changed)
		}), `join token "t"`},
		{"a removed revocation", inTable(bucketRevoked, remove), "no revocation of the serial 05"},
		{"an added revocation", inTable(bucketRevoked, func(b *bolt.Bucket, _, value []byte) error { return b.Put([]byte{6}, value) }), "revocation of the serial 06"},
		{"a removed mark", inTable(bucketSettled, remove), "the table does not say so"},
		{"an added mark", inTable(bucketSettled, func(b *bolt.Bucket, _, _ []byte) error { return b.Put(number(1000), []byte{3}) }), "marks of confirmed"},
		{"a superseded certificate made good", inTable(bucketSettled, func(b *bolt.Bucket, _, _ []byte) error { return b.Delete(number(6)) }),
			"supersedes issue 6, and the table does not say so"},
		{"a good certificate made superseded", inTable(bucketSettled, func(b *bolt.Bucket, _, _ []byte) error {
			return b.Put(number(1000), []byte{settledSuperseded})
		}), "marks of confirmed, retired and superseded"},
		{"a superseded certificate made confirmed", inTable(bucketSettled, func(b *bolt.Bucket, _, _ []byte) error {
			return b.Put(number(6), []byte{settledSuperseded | settledConfirmed})
		}), "issue 6 is superseded, and was confirmed"},
		{"another acknowledged bundle", inMark(func(value []byte) []byte { return flip(value, 8) }), "has trust bundle 3 according to the table, and 2"},
		{"a removed acknowledged bundle", inMark(func(value []byte) []byte { return value[:1] }), "has trust bundle 0 according to the table, and 2"},
		{"a mark that is too long", inMark(func(value []byte) []byte { return append(value, 0) }), "cannot be read"},
		{"an added acknowledged bundle", inTable(bucketSettled, func(b *bolt.Bucket, key, value []byte) error {
			return b.Put(key, append(value, number(2)...))
		}), "has trust bundle 2 according to the table, and 0"},
		{"a holder put under another bundle", inTable(bucketHoldings, func(b *bolt.Bucket, _, _ []byte) error {
			cursor := b.Cursor()
			for key, value := cursor.First(); key != nil; key, value = cursor.Next() {
				if k, row, err := decodeHolding(key, value); err == nil && k.bundle == 2 {
					k.bundle++
					return errors.Join(b.Delete(bytes.Clone(key)), b.Put(k.encode(), row.encode()))
				}
			}
			return errors.New("there is none")
		}), "with bundle 2 that expire in hour"},
		{"a lowered floor", func(tx *bolt.Tx) error {
			return tx.Bucket(bucketTrustDomains).Bucket([]byte(domain)).Put(keyFloor, number(0))
		}, "the floor is 0"},
	}
	original := fill(t)
	if err := original.Close(); err != nil {
		t.Fatal(err)
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(original.dir)); err != nil {
				t.Fatal(err)
			}
			h := newHouseIn(t, dir)
			h.edit(test.tamper)
			report, err := h.Verify(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			found := strings.Join(report.Problems, "\n")
			if (test.want == "") != (found == "") || !strings.Contains(found, test.want) {
				t.Errorf("Verify found:\n%s\nwant: %s", found, test.want)
			}
		})
	}
}

func TestVerifyWorksWhileEventsAreAppended(t *testing.T) {
	t.Parallel()
	h := fill(t)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				h.must(h.issue())
			}
		}
	}()
	for range 5 {
		h.clean()
	}
	close(stop)
	<-stopped
	if report := h.clean(); report.LastNumber != h.Head().Number || report.Events != report.LastNumber || report.FirstNumber != 1 {
		t.Errorf("%+v, and the head is %d", report, h.Head().Number)
	}
}
