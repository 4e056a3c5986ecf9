package ledger

import (
	"errors"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// A single-use join token that was redeemed may be redeemed again: a machine that lost the response tries with a new key.
const (
	redemptionRetries = 3   // times, after the first
	redemptionWindow  = 300 // seconds after the first
)

// batch is one transaction of the writer: drafts that become one commit of the log.
type batch struct {
	l    *Ledger
	tx   *bolt.Tx
	wall Time // the clock
	now  Time // of the events: the clock, but never earlier than the event before
	head Head // as it will be after the commit

	raws   [][]byte // the events so far
	size   int      // of raws, in octets
	writes int      // into tx so far

	authorities map[Hash]*authorityRow // looked up so far; nil: unknown to the ledger
	holdings    map[holdingKey]holdingRow
	revoked     []Serial // added
	forgotten   [][]byte // revocations that were dropped
	superseded  []superseded
	floor       uint64 // that a bundle set; 0: none did
	leap        bool   // the next bundle may leap: it is a restore's
}

// superseded is a redemption of a spent token, for the log.
type superseded struct {
	token, spiffeID  string
	number, replaces uint64
}

func (l *Ledger) newBatch(tx *bolt.Tx) *batch {
	head := l.Head()
	wall := max(At(l.o.Now()), 0)
	return &batch{
		l: l, tx: tx, wall: wall, now: max(wall, head.Time), head: head,
		authorities: map[Hash]*authorityRow{}, holdings: map[holdingKey]holdingRow{},
	}
}

func (b *batch) domain() *bolt.Bucket {
	return b.tx.Bucket(bucketTrustDomains).Bucket([]byte(b.l.o.TrustDomain))
}
func (b *batch) table(name []byte) *bolt.Bucket { return b.domain().Bucket(name) }

// put writes a row. Its error is the file's.
func (b *batch) put(bucket *bolt.Bucket, key, value []byte) error {
	b.writes++
	if err := bucket.Put(key, value); err != nil {
		return storeError{err}
	}
	return nil
}

// append checks the events of a draft against the tables and writes them. An error that is no storeError refuses the draft;
// if it wrote something before, tx holds a part of the draft and must be given up.
func (b *batch) append(d *draft) (first uint64, err error) {
	first = b.head.Number + 1
	for i, body := range d.bodies {
		switch event := body.(type) {
		case *Issue:
			err = b.issue(event, d.encoded[i])
		case *Confirm:
			err = b.confirm(event)
		case *Authority:
			err = b.authority(event, d.encoded[i])
		case *Bundle:
			err = b.bundle(event)
		case *Token:
			err = b.token(event, d.encoded[i])
		case *Revoke:
			err = b.revoke(event, d.encoded[i])
		case *Waiver:
			_, err = b.store(TypeWaiver, d.encoded[i])
		}
		if err != nil {
			return 0, err
		}
	}
	if d.probe {
		return 0, b.put(b.tx.Bucket(bucketMeta), keyProbe, number(uint64(b.now)))
	}
	return first, nil
}

// store appends one event to the log, after all its checks and before its other writes.
func (b *batch) store(typ Type, encoded []byte) (n uint64, err error) {
	n = b.head.Number + 1
	raw := envelope{version: envelopeVersion, typ: typ, time: b.now, log: b.head.Log, number: n}.seal(encoded)
	events := b.tx.Bucket(bucketEvents)
	events.FillPercent = 1 // keys only ever come at the end
	if err := b.put(events, number(n), raw); err != nil {
		return 0, err
	}
	b.raws = append(b.raws, raw)
	b.size += len(raw)
	b.head.Number, b.head.Time = n, b.now
	return n, nil
}

// reencode encodes a body of which the ledger filled in a part.
func (b *batch) reencode(body Body) ([]byte, error) {
	encoded, err := encoding.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("encoding the %s event: %w", body.Type(), err)
	}
	return encoded, nil
}

// seal completes the commit: the holdings, the link of the hash chain, the head.
func (b *batch) seal() error {
	if len(b.holdings) > 0 {
		table := b.table(bucketHoldings)
		for key, row := range b.holdings {
			if err := b.put(table, key.encode(), row.encode()); err != nil {
				return err
			}
		}
	}
	if len(b.raws) == 0 {
		return nil
	}
	b.head.Hash = commitHash(b.head.Hash, b.raws)
	commits := b.tx.Bucket(bucketCommits)
	commits.FillPercent = 1
	first := b.head.Number - uint64(len(b.raws)) + 1
	if err := b.put(commits, number(first), encodeCommit(len(b.raws), b.head.Hash)); err != nil {
		return err
	}
	return b.put(b.tx.Bucket(bucketMeta), keyHead, encodeHead(b.head))
}

// lookup finds an authority, nil when the ledger does not know it. Records are large, so that each is read once a commit.
func (b *batch) lookup(id Hash) (*authorityRow, error) {
	if row, known := b.authorities[id]; known {
		return row, nil
	}
	value := b.table(bucketAuthorities).Get(id[:])
	if value == nil {
		b.authorities[id] = nil
		return nil, nil
	}
	row, err := decodeRow[authorityRow](bucketAuthorities, value)
	if err != nil {
		return nil, err
	}
	b.authorities[id] = &row
	return &row, nil
}

// currentBundle returns the sequence number of the latest bundle, and the floor.
func (b *batch) currentBundle() (sequence, floor uint64) {
	key, _ := b.table(bucketBundles).Cursor().Last()
	return toNumber(key), toNumber(b.domain().Get(keyFloor))
}

func (b *batch) holding(key holdingKey) (holdingRow, error) {
	if row, ok := b.holdings[key]; ok {
		return row, nil
	}
	encoded := key.encode()
	value := b.table(bucketHoldings).Get(encoded)
	if value == nil {
		return holdingRow{}, nil
	}
	_, row, err := decodeHolding(encoded, value)
	return row, err
}

// countUp counts one more certificate in a row.
func (b *batch) countUp(key holdingKey, notAfter Time) error {
	row, err := b.holding(key)
	row.count++
	row.latest = max(row.latest, notAfter)
	b.holdings[key] = row
	return err
}

// countDown counts one less. The row has one.
func (b *batch) countDown(key holdingKey) error {
	row, err := b.holding(key)
	row.count--
	b.holdings[key] = row
	return err
}

func (b *batch) putRow(table, key []byte, row any) error {
	value, err := encoding.Marshal(row)
	if err != nil {
		return storeError{fmt.Errorf("encoding a row of the table %q: %w", table, err)}
	}
	return b.put(b.table(table), key, value)
}

// ways are the transitions of an authority, see State.
var ways = map[[2]State]bool{
	{StatePrepared, StateActive}: true, {StateActive, StateRetired}: true, {StateRetired, StateRemoved}: true, {StatePrepared, StateRemoved}: true,
	{StateRetired, StateActive}: true, {StateRemoved, StatePrepared}: true,
}

// rootWays are those of a root besides: one that never signed is given up for a time, in which others' certificates under it end, and may come back.
var rootWays = map[[2]State]bool{{StatePrepared, StateRetired}: true, {StateRetired, StatePrepared}: true}

func (b *batch) authority(event *Authority, encoded []byte) error {
	if event.TrustDomain != b.l.o.TrustDomain {
		return fmt.Errorf("authority %s is of the trust domain %q; this ledger is for %q", event.ID, event.TrustDomain, b.l.o.TrustDomain)
	}
	row, err := b.lookup(event.ID)
	if err != nil {
		return err
	}
	if row == nil && event.From != 0 {
		return fmt.Errorf("authority %s is to go from %s to %s, and this ledger does not know it: %w", event.ID, event.From, event.To, ErrConflict)
	}
	if row != nil && event.From != row.State {
		return fmt.Errorf("authority %s is to go from %s to %s, and it is %s: %w", event.ID, event.From, event.To, row.State, ErrConflict)
	}
	var next authorityRow
	switch {
	case row == nil:
		if err := b.mayEnter(event); err != nil {
			return err
		}
		next = authorityRow{TrustDomain: event.TrustDomain, Founded: *event.Record, Number: b.head.Number + 1}
	case event.From == event.To && !event.Tainted:
		return fmt.Errorf("authority %s is %s already, and the event says nothing new: %w", event.ID, event.To, ErrAlready)
	case event.From == event.To && row.Tainted:
		return fmt.Errorf("authority %s is tainted already: %w", event.ID, ErrAlready)
	case event.From != event.To && !ways[[2]State{event.From, event.To}] && (row.Founded.Role != RoleRoot || !rootWays[[2]State{event.From, event.To}]):
		return fmt.Errorf("authority %s cannot go from %s to %s: the ways are prepared, active, retired, removed, and prepared, removed; and back from retired to active "+
			"and from removed to prepared", event.ID, event.From, event.To)
	case row.Tainted && (event.To == StateActive || event.To == StatePrepared):
		return fmt.Errorf("authority %s is tainted, and cannot go from %s to %s: %w", event.ID, event.From, event.To, ErrConflict)
	default:
		next = *row
	}
	next.follow(event, b.now)
	if _, err := b.store(TypeAuthority, encoded); err != nil {
		return err
	}
	b.authorities[event.ID] = &next
	return b.putRow(bucketAuthorities, event.ID[:], next)
}

// follow applies a transition to the row.
func (r *authorityRow) follow(event *Authority, now Time) {
	if event.From != event.To {
		r.Since = now
	}
	r.State = event.To
	r.Tainted = r.Tainted || event.Tainted
}

// mayEnter: authorities enter prepared. A root may enter active, and so may an issuing CA while there is no other active one.
func (b *batch) mayEnter(event *Authority) error {
	switch {
	case event.Tainted:
		return fmt.Errorf("authority %s cannot enter tainted", event.ID)
	case event.To == StatePrepared || (event.To == StateActive && event.Record.Role == RoleRoot):
		return nil
	case event.To != StateActive:
		return fmt.Errorf("authority %s cannot enter as %s: it enters as prepared", event.ID, event.To)
	}
	return b.table(bucketAuthorities).ForEach(func(_, value []byte) error {
		row, err := decodeRow[authorityRow](bucketAuthorities, value)
		if err == nil && row.Founded.Role == RoleIssuing && row.State == StateActive {
			err = fmt.Errorf("authority %s cannot enter as active while another issuing CA is active (since %s): %w", event.ID, row.Since, ErrConflict)
		}
		return err
	})
}

func (b *batch) bundle(event *Bundle) error {
	current, floor := b.currentBundle()
	switch {
	case event.TrustDomain != b.l.o.TrustDomain:
		return fmt.Errorf("the trust bundle is of the trust domain %q; this ledger is for %q", event.TrustDomain, b.l.o.TrustDomain)
	case event.Sequence != current+1 && !(b.leap && event.Sequence > current):
		return fmt.Errorf("trust bundle %d does not follow on %d: %w", event.Sequence, current, ErrConflict)
	case event.Floor < floor:
		return fmt.Errorf("trust bundle %d would let the floor fall from %d to %d: %w", event.Sequence, floor, event.Floor, ErrConflict)
	case event.Floor > event.Sequence:
		return fmt.Errorf("trust bundle %d would be below its own floor %d: %w", event.Sequence, event.Floor, ErrConflict)
	}
	filled := *event
	filled.Incarnation = b.head.Incarnation
	encoded, err := b.reencode(&filled)
	if err != nil {
		return err
	}

	n, err := b.store(TypeBundle, encoded)
	if err != nil {
		return err
	}
	if err := b.putRow(bucketBundles, number(event.Sequence), bundleRow{Bundle: filled, Time: b.now, Number: n}); err != nil {
		return err
	}
	b.floor = event.Floor
	return b.put(b.domain(), keyFloor, number(event.Floor))
}

func (b *batch) token(event *Token, encoded []byte) error {
	if b.table(bucketTokens).Get([]byte(event.ID)) != nil {
		return fmt.Errorf("join token %q: %w", event.ID, ErrAlready)
	}
	if _, err := b.store(TypeToken, encoded); err != nil {
		return err
	}
	return b.putRow(bucketTokens, []byte(event.ID), tokenRow{Token: *event})
}

func (b *batch) revoke(event *Revoke, encoded []byte) error {
	table := b.table(bucketRevoked)
	if table.Get(event.Serial) != nil {
		return fmt.Errorf("revoking the serial %s: %w", event.Serial, ErrAlready)
	}
	if _, err := b.store(TypeRevoke, encoded); err != nil {
		return err
	}
	b.revoked = append(b.revoked, slices.Clone(event.Serial))
	return b.put(table, event.Serial, number(uint64(max(event.NotAfter, 0))))
}

// refused says whether an error refuses a draft, rather than telling of a fault of the file.
func refused(err error) bool {
	var broken storeError
	return !errors.As(err, &broken)
}
