package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	bolt "go.etcd.io/bbolt"
)

// VerifyReport is what Verify found. The ledger is sound when Problems is empty.
type VerifyReport struct {
	Events      uint64   `json:"events"`
	Commits     uint64   `json:"commits"`
	FirstNumber uint64   `json:"first_number"`
	LastNumber  uint64   `json:"last_number"`
	Problems    []string `json:"problems"` // for people; at most a hundred, then their number
}

const maxProblems = 100

// Verify reads the whole log: the hash chain, the numbers, every envelope and body. It replays all events and compares what follows
// from them with the tables: holdings, authorities, bundles, tokens, revocations. Recording goes on meanwhile. The error is about
// reading only; what is wrong with the content is in the report.
func (l *Ledger) Verify(ctx context.Context) (VerifyReport, error) {
	if err := l.holdFront(ctx); err != nil {
		return VerifyReport{}, fmt.Errorf("verifying the ledger: %w", err)
	}
	defer l.releaseFront()
	r := &replay{
		l: l, holdings: map[holdingKey]holdingRow{}, authorities: map[Hash]*authorityReplay{}, bundles: map[uint64]bool{},
		tokens: map[string]*tokenRow{}, revoked: map[string]Time{}, seen: numberSet{}, gone: numberSet{}, acknowledged: map[uint64]uint64{},
	}
	for !r.done {
		if err := ctx.Err(); err != nil {
			return VerifyReport{}, fmt.Errorf("verifying the ledger: %w", err)
		}
		if err := l.view(r.step); err != nil {
			return VerifyReport{}, fmt.Errorf("verifying the ledger %s: %w", l.path, err)
		}
	}
	report := r.report
	if r.problems > maxProblems {
		report.Problems = append(report.Problems, fmt.Sprintf("and %d more", r.problems-maxProblems))
	}
	return report, nil
}

// holdFront keeps the front of the log from moving: one at a time verifies or prunes.
func (l *Ledger) holdFront(ctx context.Context) error {
	select {
	case l.maintenance <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *Ledger) releaseFront() { <-l.maintenance }

// replay recomputes the tables from the events.
type replay struct {
	l        *Ledger
	report   VerifyReport
	problems int
	done     bool

	started bool
	first   uint64 // of the file
	anchor  Hash   // before it
	next    uint64 // to be read
	hash    Hash   // of the commits so far
	time    Time   // of the last event
	horizon Time   // rows that ended until then may have been dropped

	log         LogID  // of the events that are being read; zero before the first
	incarnation Hash   // of the store then; zero when that is not known, as in the first log of the file
	restored    Event  // the latest restore; its number is 0 when there was none
	sequence    uint64 // of the latest trust bundle; 0: none was read

	holdings           map[holdingKey]holdingRow
	authorities        map[Hash]*authorityReplay
	bundles            map[uint64]bool // sequence numbers that were seen
	tokens             map[string]*tokenRow
	revoked            map[string]Time
	confirmed, retired uint64 // marks that the table must have
	superseded         uint64
	seen, gone         numberSet         // issues that were confirmed, and that were retired
	acknowledged       map[uint64]uint64 // by issue: the newest bundle that a Confirm told of, where that is newer than what its event says
}

// numberSet is a set of numbers that lie close to each other: 64 of them in a word.
type numberSet map[uint64]uint64

func (s numberSet) has(n uint64) bool { return s[n/64]&(1<<(n%64)) != 0 }
func (s numberSet) add(n uint64)      { s[n/64] |= 1 << (n % 64) }

type authorityReplay struct {
	row     authorityRow
	entered bool // its first event is in the log, so that row is complete
}

func (r *replay) problem(format string, args ...any) {
	if r.problems++; r.problems <= maxProblems {
		r.report.Problems = append(r.report.Problems, fmt.Sprintf(format, args...))
	}
}

// step reads on in one transaction. The one that reaches the end of the log compares the tables: they belong to that end.
func (r *replay) step(tx *bolt.Tx) error {
	head, err := readHead(tx)
	if err != nil {
		return err
	}
	if !r.started {
		meta := tx.Bucket(bucketMeta)
		r.started, r.first, r.next = true, head.First, head.First
		r.hash, r.horizon = Hash(meta.Get(keyAnchor)[8:]), Time(toNumber(meta.Get(keyHorizon)))
		r.anchor = r.hash
		r.report.FirstNumber, r.report.LastNumber = head.First, head.First-1
		if key, _ := tx.Bucket(bucketEvents).Cursor().First(); key != nil && toNumber(key) < head.First {
			r.problem("event %d lies before the first of the log, %d", toNumber(key), head.First)
		}
	}
	commits, events := tx.Bucket(bucketCommits).Cursor(), tx.Bucket(bucketEvents).Cursor()
	key, value := commits.Seek(number(r.next))
	eventKey, raw := events.Seek(number(r.next))
	for read := uint64(0); key != nil && read < chunkRecords; key, value = commits.Next() {
		first := toNumber(key)
		count, hash, err := decodeCommit(value)
		if err != nil || count == 0 || first+count < first {
			r.problem("the commit at event %d cannot be read", first)
			continue
		}
		if first != r.next {
			r.problem("a commit begins at event %d, where one is expected at %d", first, r.next)
			if first < r.next {
				continue
			}
			eventKey, raw = events.Seek(number(first))
		}
		if first > head.Number || count > head.Number-first+1 {
			r.problem("the commit of the %d events from %d on goes beyond the head of the log, %d", count, first, head.Number)
			count = head.Number - min(first, head.Number)
		}
		var raws [][]byte
		for n := first; n < first+count; n++ {
			for eventKey != nil && toNumber(eventKey) < n {
				r.problem("event %d stands where no commit has it", toNumber(eventKey))
				eventKey, raw = events.Next()
			}
			if toNumber(eventKey) != n {
				r.problem("event %d is missing", n)
				continue
			}
			raws = append(raws, raw)
			r.event(tx, n, raw)
			eventKey, raw = events.Next()
		}
		if got := commitHash(r.hash, raws); got != hash {
			r.problem("the commit of the events %d to %d does not match the hash chain", first, first+count-1)
		}
		r.hash = hash // what follows is verified on its own
		r.next = first + count
		r.report.Commits++
		r.report.Events += uint64(len(raws))
		r.report.LastNumber = r.next - 1
		read += count
	}
	if key != nil {
		return nil
	}
	r.done = true
	if r.log == (LogID{}) { // no event is left
		r.log = head.Log
	}
	r.endLog(head.Log, head.Incarnation, "the head")
	if r.next != head.Number+1 {
		r.problem("the commits end with event %d, and the head says %d", r.next-1, head.Number)
	}
	if r.hash != head.Hash {
		r.problem("the hash of the head is not that of the last commit")
	}
	if eventKey != nil {
		r.problem("event %d lies after the last of the log, %d", toNumber(eventKey), head.Number)
	}
	return r.compare(tx)
}

// event checks one event and applies it.
func (r *replay) event(tx *bolt.Tx, n uint64, raw []byte) {
	e, err := DecodeEvent(raw)
	if err != nil {
		r.problem("event %d cannot be read: %v", n, err)
		return
	}
	if body, ok := e.Body.(*Restore); ok && n == r.next { // anywhere else it begins no log
		r.restore(e, body)
	} else if r.log == (LogID{}) {
		r.log = e.Log
	}
	if e.Number != n || e.Log != r.log {
		r.problem("event %d says that it is event %d of log %s", n, e.Number, e.Log)
	}
	if e.Time < r.time {
		r.problem("event %d is earlier (%s) than the one before it (%s)", n, e.Time, r.time)
	}
	r.time = e.Time
	switch body := e.Body.(type) {
	case *Issue:
		r.issue(tx, n, e.Time, body)
	case *Confirm:
		r.confirm(tx, n, body)
	case *Authority:
		r.authority(n, e.Time, body)
	case *Bundle:
		r.bundle(tx, n, e.Time, body)
	case *Token:
		r.tokens[body.ID] = &tokenRow{Token: *body}
	case *Revoke:
		r.revoked[string(body.Serial)] = body.NotAfter
	}
}

// restore lets a new log begin: it must go on from where the one before ended.
func (r *replay) restore(e Event, body *Restore) {
	if r.log == (LogID{}) { // the log before was pruned
		r.log = body.Log
	}
	about := fmt.Sprintf("the restore of event %d", e.Number)
	r.endLog(body.Log, body.Incarnation, about)
	if body.Number != e.Number-1 || body.Hash != r.hash {
		r.problem("%s goes on from event %d with the hash %s, and before it is event %d with %s", about, body.Number, body.Hash, e.Number-1, r.hash)
	}
	r.log, r.incarnation, r.restored = e.Log, body.Next, e
	for _, a := range r.authorities {
		a.row.cut(e.Time)
	}
	clear(r.tokens)
}

// endLog compares the log that ends with what is said of it, and the beginning of the file with its incarnation if it began there.
func (r *replay) endLog(log LogID, incarnation Hash, says string) {
	if r.log != log {
		r.problem("the events up to %d are of log %s, and %s says %s", r.next-1, r.log, says, log)
	}
	if !r.incarnation.IsZero() && r.incarnation != incarnation {
		r.problem("the events up to %d are of the incarnation %s, and %s says %s", r.next-1, r.incarnation, says, incarnation)
	}
	if r.restored.Number == 0 && r.first == 1 && r.anchor != genesisHash(incarnation, log) {
		r.problem("the log does not begin with the hash of its incarnation")
	}
}

func (r *replay) issue(tx *bolt.Tx, n uint64, at Time, issue *Issue) {
	r.countUp(holdingOf(issue, 0), issue.NotAfter)
	if issue.Held != 0 {
		r.held(tx, n, issue)
	}
	if a := r.authorities[issue.Authority]; a != nil && (a.row.State != StateActive || a.row.Tainted) {
		r.problem("event %d issues under the authority %s, which was not active then", n, issue.Authority)
	}
	token := r.tokens[issue.Token]
	if issue.Supersedes != 0 {
		r.supersede(tx, n, issue, token)
	}
	if token != nil {
		token.redeem(n, at)
	}
}

// supersede checks that an issue supersedes the one that its token got before. token is nil when its event was pruned.
func (r *replay) supersede(tx *bolt.Tx, n uint64, issue *Issue, token *tokenRow) {
	if token != nil && (token.Token.Reusable || token.Last != issue.Supersedes) {
		r.problem("event %d supersedes issue %d, and the join token %q got %d before", n, issue.Supersedes, issue.Token, token.Last)
	}
	if issue.Supersedes < r.first {
		return
	}
	r.superseded++
	before, err := (&batch{l: r.l, tx: tx}).findIssue(issue.Supersedes)
	if err != nil || before == nil || issue.Supersedes >= n || before.Token != issue.Token {
		r.problem("event %d supersedes issue %d, which is no such issue", n, issue.Supersedes)
	}
	if !(&batch{l: r.l, tx: tx}).settled(issue.Supersedes).Superseded {
		r.problem("event %d supersedes issue %d, and the table does not say so", n, issue.Supersedes)
	}
}

// held checks what an issue says of the bundle that its holder had already.
func (r *replay) held(tx *bolt.Tx, n uint64, issue *Issue) {
	if issue.Replaces < r.first && issue.Replaces != 0 { // pruned
		return
	}
	before, err := (&batch{l: r.l, tx: tx}).findIssue(issue.Replaces)
	if err != nil || before == nil || issue.Replaces >= n || issue.Delivery != DeliverySDS || !follows(issue, before) ||
		issue.Held != holdingOf(before, r.acknowledged[issue.Replaces]).bundle {
		r.problem("event %d says that its holder has trust bundle %d already, and the certificate that it replaces (event %d) does not count so", n, issue.Held, issue.Replaces)
	}
}

// countUp counts one more certificate in a row, unless that may have been dropped.
func (r *replay) countUp(key holdingKey, notAfter Time) {
	if key.end() <= r.horizon {
		return
	}
	row := r.holdings[key]
	row.count++
	row.latest = max(row.latest, notAfter)
	r.holdings[key] = row
}

// countDown counts one less, and says whether there was one.
func (r *replay) countDown(key holdingKey) bool {
	if key.end() <= r.horizon {
		return true
	}
	row := r.holdings[key]
	if row.count == 0 {
		return false
	}
	row.count--
	r.holdings[key] = row
	return true
}

func (r *replay) confirm(tx *bolt.Tx, n uint64, confirm *Confirm) {
	b := batch{l: r.l, tx: tx}
	if confirm.Number >= r.first {
		issue, err := b.findIssue(confirm.Number)
		if err != nil || issue == nil || confirm.Number >= n || !bytes.Equal(issue.Serial, confirm.Serial) {
			r.problem("event %d confirms issue %d, which is no such issue", n, confirm.Number)
		} else {
			r.confirmIssue(&b, n, confirm, issue)
		}
	}
	if confirm.Retires < r.first {
		return
	}
	r.retired++
	if !b.settled(confirm.Retires).Retired {
		r.problem("event %d retires issue %d, and the table does not say so", n, confirm.Retires)
	}
	issue, err := b.findIssue(confirm.Retires)
	if err != nil || issue == nil {
		r.problem("event %d retires issue %d, which is no issue", n, confirm.Retires)
		return
	}
	if r.gone.has(confirm.Retires) || !r.countDown(holdingOf(issue, r.acknowledged[confirm.Retires])) {
		r.problem("event %d retires issue %d, and no such holding is left", n, confirm.Retires)
	}
	r.gone.add(confirm.Retires)
}

// confirmIssue applies the confirmation of an issue that the log has.
func (r *replay) confirmIssue(b *batch, n uint64, confirm *Confirm, issue *Issue) {
	again := r.seen.has(confirm.Number)
	r.seen.add(confirm.Number)
	if !again {
		r.confirmed++
	}
	if !b.settled(confirm.Number).Confirmed {
		r.problem("event %d confirms issue %d, and the table does not say so", n, confirm.Number)
	}
	if confirm.Retires != 0 && (again || confirm.Retires != issue.Replaces) {
		r.problem("event %d retires issue %d, where %d is replaced", n, confirm.Retires, issue.Replaces)
	}
	from, to := holdingOf(issue, r.acknowledged[confirm.Number]), holdingOf(issue, confirm.Bundle)
	if confirm.Bundle <= from.bundle {
		if again || confirm.Bundle != 0 && confirm.Bundle < from.bundle {
			r.problem("event %d confirms issue %d with trust bundle %d, where it counts under %d already", n, confirm.Number, confirm.Bundle, from.bundle)
		}
		return
	}
	if b.table(bucketBundles).Get(number(confirm.Bundle)) == nil {
		r.problem("event %d says that the holder of issue %d has trust bundle %d, and there is none", n, confirm.Number, confirm.Bundle)
	}
	r.acknowledged[confirm.Number] = confirm.Bundle
	switch {
	case r.gone.has(confirm.Number): // it counts nowhere
	case r.countDown(from):
		r.countUp(to, issue.NotAfter)
	default:
		r.problem("event %d says that the holder of issue %d has trust bundle %d, and no holding with trust bundle %d is left", n, confirm.Number, confirm.Bundle, from.bundle)
	}
}
func (r *replay) authority(n uint64, at Time, event *Authority) {
	a := r.authorities[event.ID]
	switch {
	case event.From == 0 && (a != nil || event.Record == nil):
		r.problem("event %d lets the authority %s enter a second time, or without its record", n, event.ID)
		return
	case event.From == 0:
		a = &authorityReplay{row: authorityRow{TrustDomain: event.TrustDomain, Founded: *event.Record, Number: n}, entered: true}
	case a == nil && r.first == 1:
		r.problem("event %d changes the authority %s, which did not enter", n, event.ID)
		return
	case a == nil: // it entered before the log begins
		a = &authorityReplay{row: authorityRow{TrustDomain: event.TrustDomain, State: event.From}}
	case a.row.State != event.From:
		r.problem("event %d takes the authority %s from %s to %s, and it was %s", n, event.ID, event.From, event.To, a.row.State)
	}
	a.row.follow(event, at)
	r.authorities[event.ID] = a
}

func (r *replay) bundle(tx *bolt.Tx, n uint64, at Time, event *Bundle) {
	leap := r.restored.Number == n-1
	if r.sequence != 0 && event.Sequence != r.sequence+1 && !(leap && event.Sequence > r.sequence) {
		r.problem("trust bundle %d of event %d does not follow on %d", event.Sequence, n, r.sequence)
	}
	r.sequence = event.Sequence
	r.bundles[event.Sequence] = true
	want, err := encoding.Marshal(bundleRow{Bundle: *event, Time: at, Number: n})
	if err != nil || !bytes.Equal(want, r.l.table(tx, bucketBundles).Get(number(event.Sequence))) {
		r.problem("trust bundle %d of event %d is not the one in the table", event.Sequence, n)
	}
}

// compare holds the tables against what the events say.
func (r *replay) compare(tx *bolt.Tx) error {
	for _, table := range []struct {
		name    []byte
		compare func(key, value []byte) error
	}{
		{bucketHoldings, r.compareHolding}, {bucketAuthorities, r.compareAuthority}, {bucketBundles, r.compareBundle},
		{bucketTokens, r.compareToken}, {bucketRevoked, r.compareRevoked}, {bucketSettled, r.compareSettled},
	} {
		err := r.l.table(tx, table.name).ForEach(func(key, value []byte) error {
			err := table.compare(key, value)
			if isDamaged(err) {
				r.problem("%v", err)
				return nil
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	for key, row := range r.holdings {
		r.problem("the table has no holdings of chain %s with bundle %d that expire in hour %d: a recount gives %d", key.chain, key.bundle, key.hour, row.count)
	}
	for id := range r.authorities {
		r.problem("the table has no authority %s", id)
	}
	for sequence := range r.bundles {
		r.problem("the table has no trust bundle %d", sequence)
	}
	for id, row := range r.tokens {
		if row.Token.Expires > r.horizon {
			r.problem("the table has no join token %q", id)
		}
	}
	for serial, notAfter := range r.revoked {
		if notAfter > r.horizon {
			r.problem("the table has no revocation of the serial %s", Serial(serial))
		}
	}
	for n, bundle := range r.acknowledged {
		r.problem("the table does not say that the holder of issue %d has trust bundle %d", n, bundle)
	}
	if r.confirmed != 0 || r.retired != 0 || r.superseded != 0 {
		r.problem("the marks of confirmed, retired and superseded issues are not those of the log: %d, %d and %d differ",
			int64(r.confirmed), int64(r.retired), int64(r.superseded))
	}
	var floor uint64
	if _, value := r.l.table(tx, bucketBundles).Cursor().Last(); value != nil {
		if row, err := decodeRow[bundleRow](bucketBundles, value); err == nil {
			floor = row.Bundle.Floor
		}
	}
	if have, err := r.floor(tx); err != nil || have != floor {
		r.problem("the floor is %d, and the latest trust bundle says %d", have, floor)
	}
	return nil
}

func (r *replay) floor(tx *bolt.Tx) (uint64, error) {
	value := tx.Bucket(bucketTrustDomains).Bucket([]byte(r.l.o.TrustDomain)).Get(keyFloor)
	if len(value) != 8 {
		return 0, damaged{errors.New("the floor cannot be read")}
	}
	return toNumber(value), nil
}

func (r *replay) compareHolding(key, value []byte) error {
	k, row, err := decodeHolding(key, value)
	if err != nil || k.end() <= r.horizon {
		return err
	}
	want, ok := r.holdings[k]
	delete(r.holdings, k)
	if !ok || want != row {
		r.problem("holdings of chain %s with bundle %d that expire in hour %d: the table says %d until %s, a recount gives %d until %s",
			k.chain, k.bundle, k.hour, row.count, row.latest, want.count, want.latest)
	}
	return nil
}

func (r *replay) compareAuthority(key, value []byte) error {
	row, err := decodeRow[authorityRow](bucketAuthorities, value)
	if err != nil {
		return err
	}
	var id Hash
	copy(id[:], key)
	a := r.authorities[id]
	delete(r.authorities, id)
	switch {
	case a == nil && row.Number >= r.first:
		r.problem("authority %s is in the table, and did not enter in the log", id)
	case a == nil:
	case a.entered:
		if want, err := encoding.Marshal(a.row); err != nil || !bytes.Equal(want, value) {
			r.problem("authority %s is %s in the table (tainted: %t), and %s after its events (tainted: %t), or its record differs",
				id, row.State, row.Tainted, a.row.State, a.row.Tainted)
		}
	case a.row.State != row.State || (a.row.Tainted && !row.Tainted):
		r.problem("authority %s is %s in the table, and %s after its events", id, row.State, a.row.State)
	}
	if c := row.Founded.Coverage; row.Number < r.restored.Number && row.State != StateRemoved && c.Knows(r.restored.Time) {
		r.problem("authority %s is covered %s since %s in the table, and not before the restore of event %d", id, c.Kind, c.Since, r.restored.Number)
	}
	return nil
}

func (r *replay) compareBundle(key, value []byte) error {
	row, err := decodeRow[bundleRow](bucketBundles, value)
	if err != nil {
		return err
	}
	sequence := toNumber(key)
	if row.Bundle.Sequence != sequence || (row.Number >= r.first && !r.bundles[sequence]) {
		r.problem("trust bundle %d is in the table, and not in the log", sequence)
	}
	delete(r.bundles, sequence)
	return nil
}

func (r *replay) compareToken(key, value []byte) error {
	row, err := decodeRow[tokenRow](bucketTokens, value)
	if err != nil || row.Token.Expires <= r.horizon {
		return err
	}
	want := r.tokens[string(key)]
	delete(r.tokens, string(key))
	if want == nil || *want != row {
		r.problem("join token %q was redeemed %d times according to the table, and is not so in the log", key, row.Redeemed)
	}
	return nil
}

func (r *replay) compareRevoked(serial, value []byte) error {
	notAfter := Time(toNumber(value))
	if notAfter <= r.horizon {
		return nil
	}
	if want, ok := r.revoked[string(serial)]; !ok || want != notAfter {
		r.problem("the revocation of the serial %s is in the table, and not so in the log", Serial(serial))
	}
	delete(r.revoked, string(serial))
	return nil
}

// compareSettled counts the marks down: every single one was looked for when its event was replayed.
func (r *replay) compareSettled(key, value []byte) error {
	if toNumber(key) < r.first {
		return nil
	}
	n, state := toNumber(key), decodeSettled(value)
	if !bytes.Equal(value, state.encode()) {
		return damaged{fmt.Errorf("the marks of issue %d cannot be read", n)}
	}
	if want := r.acknowledged[n]; state.Bundle != want {
		r.problem("the holder of issue %d has trust bundle %d according to the table, and %d according to the log", n, state.Bundle, want)
	}
	delete(r.acknowledged, n)
	if state.Confirmed {
		r.confirmed--
	}
	if state.Retired {
		r.retired--
	}
	if state.Superseded {
		r.superseded--
	}
	if state.Superseded && state.Confirmed {
		r.problem("issue %d is superseded, and was confirmed", n)
	}
	return nil
}
