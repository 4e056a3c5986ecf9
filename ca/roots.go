package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// errRootAway says that the root, or the anchors besides it, give no trust anchors that could be taken up, though the ledger has some.
var errRootAway = errors.New("nobody says now what is to be trusted")

// takeUpRoots lets the ledger follow what the root and the anchors say is to be trusted. On the first day that begins the ledger; later a new root
// enters the bundle, and one that nobody stands for any more is retired: it stays in the bundle until nothing is left under it, see removeRoots. given is what they say.
func (c *CA) takeUpRoots(ctx context.Context) (given []*x509.Certificate, err error) {
	_, err = c.ledger.CurrentBundle()
	firstDay := errors.Is(err, ledger.ErrNotFound)
	if err != nil && !firstDay {
		return nil, fmt.Errorf("reading the trust bundle from the ledger: %w", err)
	}
	given, own, err := givenRoots(ctx, c.root, c.anchors, c.td, c.now())
	if err != nil && !firstDay {
		return nil, fmt.Errorf("%w: what the ledger knows of it goes on serving: %w", errRootAway, err)
	}
	if err != nil {
		return nil, err
	}
	if firstDay {
		return given, c.recordRoots(ctx, given, own)
	}
	if err := c.lock(ctx); err != nil {
		return nil, err
	}
	defer c.unlock()
	return given, c.followRoots(ctx, given)
}

// givenRoots asks what is to be trusted: the root's own anchors first, so many, and the one that issuing CAs chain to before the others.
func givenRoots(ctx context.Context, root Root, anchors Anchors, td spiffeid.TrustDomain, now time.Time) (given []*x509.Certificate, own int, err error) {
	all, err := root.Roots(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("asking the root for its trust anchors: %w", err)
	}
	if len(all) == 0 {
		return nil, 0, errors.New("the root has no trust anchor")
	}
	named := len(all)
	if anchors != nil {
		more, err := anchors.Anchors(ctx)
		if err != nil {
			return nil, 0, fmt.Errorf("asking for the trust anchors besides the root's: %w", err)
		}
		all = append(all[:len(all):len(all)], more...)
	}
	seen := map[ledger.Hash]bool{}
	for i, cert := range all {
		id := AuthorityID(cert)
		if seen[id] {
			continue
		}
		seen[id] = true
		if err := checkRoot(cert, td, now); err != nil {
			return nil, 0, fmt.Errorf("the root certificate %q cannot be a trust anchor: %w", cert.Subject, err)
		}
		given = append(given, cert)
		if i < named {
			own++
		}
	}
	return given, own, nil
}

// recordRoots begins the ledger: the first bundle holds the roots, and the root's own become active. The anchors besides them are others', and who holds a certificate from before
// this CA may lack them: they are prepared.
func (c *CA) recordRoots(ctx context.Context, roots []*x509.Certificate, own int) error {
	var events []ledger.Body
	bundle := &ledger.Bundle{TrustDomain: c.td.Name(), Sequence: 1, Floor: 1, Reason: "first start"}
	for i, root := range roots {
		state, coverage := ledger.StateActive, c.rootCoverage
		if i >= own {
			state, coverage = ledger.StatePrepared, c.foreign()
		}
		events = append(events, &ledger.Authority{
			ID: AuthorityID(root), TrustDomain: c.td.Name(), To: state, Reason: "first start", By: "kedge",
			Record: &ledger.Founded{Kind: "x509", Role: ledger.RoleRoot, Key: keyID(root), Certificate: root.Raw, Coverage: coverage},
		})
		bundle.Roots = append(bundle.Roots, root.Raw)
	}
	bundle.SHA256 = hashText(encodePEM(bundle.Roots...))
	if _, err := c.ledger.Append(ctx, append(events, bundle)...); err != nil {
		return fmt.Errorf("recording the root in the ledger: %w", err)
	}
	return nil
}

// followRoots records what changed about the roots since the ledger was told last.
func (c *CA) followRoots(ctx context.Context, given []*x509.Certificate) error {
	records, err := c.ledger.Authorities()
	if err != nil {
		return fmt.Errorf("reading the authorities from the ledger: %w", err)
	}
	current, err := c.ledger.CurrentBundle()
	if err != nil {
		return fmt.Errorf("reading the trust bundle from the ledger: %w", err)
	}
	known, stands, signed := map[ledger.Hash]ledger.AuthorityRecord{}, map[ledger.Hash]bool{}, map[ledger.Hash]bool{}
	common := false
	for _, root := range given {
		stands[AuthorityID(root)] = true
	}
	for _, record := range records {
		if record.Role != ledger.RoleRoot {
			signed[record.Root] = true // none enters under a root that may not be active
			continue
		}
		known[record.ID] = record
		common = common || stands[record.ID] && record.State != ledger.StateRemoved
	}
	if !common {
		return fmt.Errorf("the configured root has the trust anchor %s, and none that the ledger has: workloads trust those of the ledger, and this CA would leave them "+
			"behind. Put the root back that belongs to this data folder, or begin with a new data folder; to go over to another root, let both be trust anchors for a while, the old one in the file root.anchorsFile", AuthorityID(given[0]))
	}
	next := current.Bundle
	next.Sequence, next.Roots, next.Reason = current.Sequence+1, append([][]byte(nil), current.Roots...), ""
	var events []ledger.Body
	transition := func(id ledger.Hash, from, to ledger.State, reason string) *ledger.Authority {
		event := &ledger.Authority{ID: id, TrustDomain: c.td.Name(), From: from, To: to, Reason: reason, By: "kedge"}
		events = append(events, event)
		return event
	}
	for _, root := range given {
		id := AuthorityID(root)
		switch record, there := known[id]; {
		case !there:
			transition(id, 0, ledger.StatePrepared, "a new trust anchor").Record = &ledger.Founded{Kind: "x509", Role: ledger.RoleRoot, Key: keyID(root),
				Certificate: root.Raw, Coverage: c.foreign()}
		case record.State == ledger.StateRemoved:
			transition(id, record.State, ledger.StatePrepared, "a trust anchor again")
		case record.State == ledger.StateRetired && signed[id]:
			transition(id, record.State, ledger.StateActive, "a trust anchor again")
			continue
		case record.State == ledger.StateRetired: // it never signed, and may do so only once every holder has it
			transition(id, record.State, ledger.StatePrepared, "a trust anchor again")
			continue
		default:
			continue
		}
		next.Roots, next.Floor, next.Reason = append(next.Roots, root.Raw), next.Sequence, "a new trust anchor"
	}
	for _, record := range known {
		trusted := record.State == ledger.StateActive || record.State == ledger.StatePrepared
		if trusted && !stands[record.ID] && !c.signsUnder(record.ID) {
			transition(record.ID, record.State, ledger.StateRetired, "the root no longer names it")
		}
	}
	if next.Reason != "" {
		next.SHA256 = hashText(encodePEM(next.Roots...))
		events = append(events, &next)
	}
	if len(events) == 0 {
		return nil
	}
	if _, err := c.ledger.Append(ctx, events...); err != nil {
		return fmt.Errorf("recording that the trust anchors changed: %w", errors.Join(err, c.reload(context.WithoutCancel(ctx))))
	}
	c.log.Info("the trust anchors changed", "bundle", next.Sequence, "roots", len(next.Roots))
	return c.reload(ctx)
}

// foreign is the coverage of what others sign under, too.
func (c *CA) foreign() ledger.Coverage {
	return ledger.Coverage{Kind: "foreign", Until: ledger.At(c.now().Add(c.foreignWindow))}
}

// signsUnder says whether the active issuing CA chains to the root.
func (c *CA) signsUnder(root ledger.Hash) bool {
	t := c.trust.Load()
	return t != nil && t.active != nil && t.active.record.Root == root
}

// removeRoots lets go of roots that nobody stands for any more, and under which no issuing CA is left. What others issued under it, and the ledger does not
// know, has expired by then as well. The clock is the guarded one (I8).
func (c *CA) removeRoots(ctx context.Context, given []*x509.Certificate) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	t, now := c.trust.Load(), c.guarded.Now()
	stands, busy := map[ledger.Hash]bool{}, map[ledger.Hash]bool{}
	for _, root := range given {
		stands[AuthorityID(root)] = true
	}
	for _, a := range t.issuing {
		busy[a.record.Root] = true
	}
	next := t.bundle.record.Bundle
	next.Sequence, next.Roots, next.Reason = next.Sequence+1, nil, "a trust anchor was given up"
	var events []ledger.Body
	for _, root := range t.roots {
		end := c.unseen(root)
		if root.record.Coverage.Kind == "foreign" { // others may have signed under it for as long as it was named
			end = later(end, earlier(root.record.Since.Time().Add(c.foreignWindow), root.notAfter))
		}
		if stands[root.record.ID] || busy[root.record.ID] || root.record.State != ledger.StateRetired || now.Before(end.Add(removalMargin)) {
			next.Roots = append(next.Roots, root.cert.Raw)
			continue
		}
		events = append(events, &ledger.Authority{ID: root.record.ID, TrustDomain: c.td.Name(), From: root.record.State, To: ledger.StateRemoved,
			Reason: "the root no longer names it, and nothing is left under it", By: "kedge"})
	}
	if len(events) == 0 {
		return nil
	}
	next.SHA256 = hashText(encodePEM(next.Roots...))
	if _, err := c.ledger.Append(ctx, append(events, &next)...); err != nil {
		return fmt.Errorf("removing roots from the trust bundle: %w", errors.Join(err, c.reload(context.WithoutCancel(ctx))))
	}
	c.log.Info("trust anchors were given up", "bundle", next.Sequence, "roots", len(next.Roots))
	return c.reload(ctx)
}

// unseen is when the last certificate under an authority has ended that the ledger does not know; zero: it knows all of them. Of an issuing CA that was made here and came with
// a restore that is its own end.
func (c *CA) unseen(a *authority) time.Time {
	coverage := a.record.Coverage
	switch {
	case coverage.Complete():
		return time.Time{}
	case coverage.Kind == "foreign" && coverage.Until == 0, coverage.Kind == "since" && a.record.Role != ledger.RoleRoot:
		return a.notAfter
	}
	end := coverage.Until.Time()
	if coverage.Since != 0 { // a restore, or a root that was there before: who signed up to then had this configuration
		window := c.foreignWindow
		for _, profile := range c.profiles {
			window = max(window, profile.MaxTTL())
		}
		end = later(end, coverage.Since.Time().Add(window))
	}
	return earlier(end, a.notAfter)
}

// activationMargin is for verifiers whose clocks are behind.
const activationMargin = 5 * time.Minute

// mayActivate says whether issuing CAs under a root may sign (I2): every holder of an unexpired certificate must have the root. Holders with a bundle that lacks it do
// not, until they acknowledge a newer one, nor those of whom none is known (bundle 0); and what holders have that the ledger does not know, nobody can tell.
func (c *CA) mayActivate(root *authority) error {
	if root.record.State != ledger.StatePrepared {
		return nil
	}
	rows, err := c.ledger.Holdings()
	if err != nil {
		return fmt.Errorf("reading the holdings: %w", err)
	}
	var count uint64
	var last time.Time
	now, lacks := c.guarded.Now(), map[uint64]bool{}
	for _, row := range rows {
		if row.Count == 0 || !now.Before(row.Latest.Time().Add(activationMargin)) {
			continue
		}
		lack, judged := lacks[row.Bundle]
		if !judged {
			bundle, err := c.ledger.BundleBySequence(row.Bundle)
			if err != nil && !errors.Is(err, ledger.ErrNotFound) {
				return fmt.Errorf("reading trust bundle %d from the ledger: %w", row.Bundle, err)
			}
			lack = !slices.ContainsFunc(bundle.Roots, func(der []byte) bool { return bytes.Equal(der, root.cert.Raw) })
			lacks[row.Bundle] = lack
		}
		if lack {
			count += row.Count
			last = later(last, row.Latest.Time())
		}
	}
	t := c.trust.Load()
	for _, a := range slices.Concat(t.issuing, t.roots) {
		if end := c.unseen(a); a != root && now.Before(end.Add(activationMargin)) {
			last = later(last, end)
		}
	}
	if last.IsZero() {
		return nil
	}
	return fmt.Errorf("no issuing CA signs under the new root %s yet, and the old one goes on: the holders of %d unexpired certificates have a trust bundle that lacks it, "+
		"or did not acknowledge any, and there may be others that this ledger does not know; the last of them ends at %s", root.short(), count, last.UTC().Format(time.RFC3339))
}

// mayCertify says whether an issuing CA that is certified now could sign, before the root is asked for one: Roots names first what Certify chains to.
func (c *CA) mayCertify(ctx context.Context, t *trust) error {
	named, err := c.root.Roots(ctx)
	if err != nil || len(named) == 0 {
		return nil // Certify says what is wrong
	}
	for _, root := range t.roots {
		if root.cert.Equal(named[0]) {
			return c.mayActivate(root)
		}
	}
	return nil
}
