package ledger

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// AuthorityRecord is an authority as its events left it.
type AuthorityRecord struct {
	ID          Hash   `json:"id"` // SHA-256 of the certificate
	TrustDomain string `json:"trust_domain"`
	Founded
	State   State  `json:"state"`
	Tainted bool   `json:"tainted"`
	Since   Time   `json:"since"`  // when it came into its state
	Number  uint64 `json:"number"` // of the event with which it entered
}

// BundleRecord is a trust bundle with its place in the log.
type BundleRecord struct {
	Bundle
	Time   Time   `json:"time"`
	Number uint64 `json:"number"`
}

// TokenRecord is a join token and how often it was redeemed.
type TokenRecord struct {
	Token
	Redeemed uint64 `json:"redeemed"`        // times
	First    Time   `json:"first,omitempty"` // of the first redemption; 0: none yet
	Last     uint64 `json:"last,omitempty"`  // number of the latest issue that redeemed it; 0: none yet
}

// Holding counts the certificates handed out with one chain, whose holders have one bundle, that expire within one hour, and are not known to be
// replaced. A row stays with the count 0 until its hour is past and Prune drops it.
type Holding struct {
	Chain  Hash   `json:"chain"`  // see ChainHash
	Bundle uint64 `json:"bundle"` // sequence number of what the holders have, or a newer one; 0: nobody knows what they have
	Hour   int64  `json:"hour"`   // notAfter, in hours since 1970, rounded down
	Count  uint64 `json:"count"`
	Latest Time   `json:"latest"` // the latest notAfter that the row ever counted
}

// IssueState says what became of an issue. Of an event that was pruned nothing is known.
type IssueState struct {
	Confirmed  bool `json:"confirmed"`  // its holder was seen to have it
	Retired    bool `json:"retired"`    // its successor was confirmed
	Superseded bool `json:"superseded"` // the join token that it spent was redeemed again
	// Bundle is the sequence number of the trust bundle that its holder has by the latest Confirm that told of a newer one; 0: none did, and the certificate
	// counts under what its event says.
	Bundle uint64 `json:"bundle,omitempty"`
}

const (
	settledConfirmed  = 1
	settledRetired    = 2
	settledSuperseded = 4
)

// The rows of the tables, as they are stored.
type (
	authorityRow struct {
		TrustDomain string  `cbor:"1,keyasint"`
		Founded     Founded `cbor:"2,keyasint"`
		State       State   `cbor:"3,keyasint"`
		Tainted     bool    `cbor:"4,keyasint"`
		Since       Time    `cbor:"5,keyasint"`
		Number      uint64  `cbor:"6,keyasint"`
	}
	bundleRow struct {
		Bundle Bundle `cbor:"1,keyasint"`
		Time   Time   `cbor:"2,keyasint"`
		Number uint64 `cbor:"3,keyasint"`
	}
	tokenRow struct {
		Token    Token  `cbor:"1,keyasint"`
		Redeemed uint64 `cbor:"2,keyasint"`
		First    Time   `cbor:"3,keyasint"`
		Last     uint64 `cbor:"4,keyasint"`
	}
)

func decodeRow[T any](table, value []byte) (row T, err error) {
	if err := decoding.Unmarshal(value, &row); err != nil {
		return row, damaged{fmt.Errorf("a row of the table %q cannot be read: %w", table, err)}
	}
	return row, nil
}

// holdingKey names a row of the holdings.
type holdingKey struct {
	chain  Hash
	bundle uint64
	hour   int64
}

// holdingOf names the row in which an issue counts, or counted when it was retired.
func holdingOf(i *Issue, confirmed uint64) holdingKey {
	key := holdingKey{chain: i.Chain, bundle: i.Bundle, hour: i.hour()}
	if i.Delivery == DeliverySDS {
		key.bundle = i.Held
	}
	if confirmed != 0 { // the newest bundle that a Confirm told of
		key.bundle = confirmed
	}
	return key
}

// hour is that of the end of the certificate, since 1970.
func (i *Issue) hour() int64 { return int64(i.NotAfter) / 3600 }

// end is when nothing that the row counts can be valid any more.
func (k holdingKey) end() Time { return Time((k.hour + 1) * 3600) }

func (k holdingKey) encode() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(bytes.Clone(k.chain[:]), k.bundle), uint64(k.hour))
}

type holdingRow struct {
	count  uint64
	latest Time
}

func (r holdingRow) encode() []byte {
	return binary.BigEndian.AppendUint64(number(r.count), uint64(r.latest))
}

func decodeHolding(key, value []byte) (k holdingKey, r holdingRow, err error) {
	if len(key) != 48 || len(value) != 16 {
		return k, r, damaged{fmt.Errorf("a row of the table %q has %d and %d octets", bucketHoldings, len(key), len(value))}
	}
	k = holdingKey{chain: Hash(key[:32]), bundle: toNumber(key[32:40]), hour: int64(toNumber(key[40:]))}
	return k, holdingRow{count: toNumber(value[:8]), latest: Time(toNumber(value[8:]))}, nil
}

// table returns one of the buckets of the trust domain.
func (l *Ledger) table(tx *bolt.Tx, name []byte) *bolt.Bucket {
	return tx.Bucket(bucketTrustDomains).Bucket([]byte(l.o.TrustDomain)).Bucket(name)
}

// Authorities returns every authority that the ledger ever had, in the order in which they entered.
func (l *Ledger) Authorities() (records []AuthorityRecord, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		return l.table(tx, bucketAuthorities).ForEach(func(key, value []byte) error {
			row, err := decodeRow[authorityRow](bucketAuthorities, value)
			if err != nil {
				return err
			}
			var id Hash
			copy(id[:], key)
			records = append(records, AuthorityRecord{
				ID: id, TrustDomain: row.TrustDomain, Founded: row.Founded, State: row.State, Tainted: row.Tainted, Since: row.Since, Number: row.Number,
			})
			return nil
		})
	})
	slices.SortFunc(records, func(a, b AuthorityRecord) int { return cmp.Compare(a.Number, b.Number) })
	return records, err
}

// CurrentBundle returns the latest trust bundle. The error wraps ErrNotFound when there is none yet.
func (l *Ledger) CurrentBundle() (record BundleRecord, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		_, value := l.table(tx, bucketBundles).Cursor().Last()
		if value == nil {
			return fmt.Errorf("a trust bundle: %w", ErrNotFound)
		}
		record, err = decodeBundle(value)
		return err
	})
	return record, err
}

// BundleBySequence returns a trust bundle, however old. The error wraps ErrNotFound when there is none with that number.
func (l *Ledger) BundleBySequence(sequence uint64) (record BundleRecord, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		value := l.table(tx, bucketBundles).Get(number(sequence))
		if value == nil {
			return fmt.Errorf("trust bundle %d: %w", sequence, ErrNotFound)
		}
		record, err = decodeBundle(value)
		return err
	})
	return record, err
}

func decodeBundle(value []byte) (BundleRecord, error) {
	row, err := decodeRow[bundleRow](bucketBundles, value)
	return BundleRecord{Bundle: row.Bundle, Time: row.Time, Number: row.Number}, err
}

// Floor returns the sequence number of the oldest bundle that may still be handed out; 0 while there is no bundle. It is answered from memory, and
// cheap enough for every push.
func (l *Ledger) Floor() uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.floor
}

// Holdings returns all rows that are kept, by chain, bundle and hour.
func (l *Ledger) Holdings() (rows []Holding, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		return l.table(tx, bucketHoldings).ForEach(func(key, value []byte) error {
			k, r, err := decodeHolding(key, value)
			rows = append(rows, Holding{Chain: k.chain, Bundle: k.bundle, Hour: k.hour, Count: r.count, Latest: r.latest})
			return err
		})
	})
	return rows, err
}

// Token returns a join token by its id. The error wraps ErrNotFound when it is not known, or was dropped after it expired.
func (l *Ledger) Token(id string) (record TokenRecord, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		value := l.table(tx, bucketTokens).Get([]byte(id))
		if value == nil {
			return fmt.Errorf("join token %q: %w", id, ErrNotFound)
		}
		row, err := decodeRow[tokenRow](bucketTokens, value)
		record = TokenRecord{Token: row.Token, Redeemed: row.Redeemed, First: row.First, Last: row.Last}
		return err
	})
	return record, err
}

// Redeemable says whether an Issue could redeem a join token now: nil, or the error that it would get
// (ErrTokenUnknown, ErrTokenExpired, ErrTokenSpent).
func (l *Ledger) Redeemable(id string) error {
	now := At(l.o.Now())
	return l.view(func(tx *bolt.Tx) error {
		b := batch{l: l, tx: tx, wall: now, now: max(now, l.Head().Time)}
		_, err := b.redeemable(id)
		return err
	})
}

// IssueState says whether an issue was confirmed, retired or superseded, and what its holder acknowledged. The error wraps ErrNotFound when the event is not in the log, or is no issue.
func (l *Ledger) IssueState(n uint64) (s IssueState, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		raw := tx.Bucket(bucketEvents).Get(number(n))
		if raw == nil {
			return fmt.Errorf("event %d: %w", n, ErrNotFound)
		}
		if e, _, err := unseal(raw); err != nil || e.typ != TypeIssue {
			return fmt.Errorf("event %d is no issue: %w", n, ErrNotFound)
		}
		s = decodeSettled(l.table(tx, bucketSettled).Get(number(n)))
		return nil
	})
	return s, err
}

// encode is the row of the table: an octet of marks, and the bundle in eight more when a Confirm told of one.
func (s IssueState) encode() []byte {
	value := make([]byte, 1, 9)
	for _, mark := range []struct {
		set bool
		bit byte
	}{{s.Confirmed, settledConfirmed}, {s.Retired, settledRetired}, {s.Superseded, settledSuperseded}} {
		if mark.set {
			value[0] |= mark.bit
		}
	}
	if s.Bundle != 0 {
		value = binary.BigEndian.AppendUint64(value, s.Bundle)
	}
	return value
}

// decodeSettled reads a row; without one, nothing became of the issue.
func decodeSettled(value []byte) IssueState {
	if len(value) != 1 && len(value) != 9 {
		return IssueState{}
	}
	return IssueState{
		Confirmed: value[0]&settledConfirmed != 0, Retired: value[0]&settledRetired != 0, Superseded: value[0]&settledSuperseded != 0,
		Bundle: toNumber(value[1:]),
	}
}

// Revoked says whether a certificate was revoked. It is answered from memory, and cheap enough for every request.
func (l *Ledger) Revoked(serial Serial) (bool, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	_, revoked := l.revoked[string(serial)]
	return revoked, nil
}
