package ca_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
)

// madeCA is a CA certificate with its key.
type madeCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// makeCA makes a CA, self-signed when by is nil.
func makeCA(t *testing.T, f *fixture, name string, by *madeCA, change func(*x509.Certificate)) *madeCA {
	t.Helper()
	key, now := newKey(t), f.clock.clock().Wall()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true}
	parent, signer := template, key
	if by != nil {
		template.NotAfter = now.AddDate(0, 6, 0)
		template.MaxPathLenZero = true
		parent, signer = by.cert, by.key
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	return &madeCA{parse(t, der), key}
}

// movingRoot is a root whose anchors and issuing CA a test moves. Of the anchors it has the key of the first.
type movingRoot struct {
	mu      sync.Mutex
	anchors []*madeCA
	brings  []*madeCA // the issuing CA, and what stands between it and the root
	key     crypto.Signer
	err     error
	changed chan struct{}
	asked   int // for its anchors
}

func (r *movingRoot) set(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
}

func (r *movingRoot) Roots(context.Context) (all []*x509.Certificate, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked++
	for _, anchor := range r.anchors {
		all = append(all, anchor.cert)
	}
	return all, r.err
}

func (r *movingRoot) Changed() <-chan struct{} { return r.changed }

func (r *movingRoot) Certify(_ context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return nil, r.err
	}
	by := r.anchors[0]
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(request.PublicKey)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: request.CommonName}, NotBefore: request.NotBefore, NotAfter: request.NotAfter,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
		SubjectKeyId: spki[len(spki)-20:], URIs: []*url.URL{{Scheme: "spiffe", Host: request.TrustDomain}}}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, request.PublicKey, by.key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return []*x509.Certificate{cert}, err
}

func (r *movingRoot) Issuing(context.Context) (chain []*x509.Certificate, key crypto.Signer, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, link := range r.brings {
		chain = append(chain, link.cert)
	}
	return chain, r.key, r.err
}

func (r *movingRoot) bring(links ...*madeCA) {
	r.set(func() {
		r.brings, r.key = links, nil
		if len(links) > 0 {
			r.key = links[0].key
		}
	})
}

// newMoving opens a CA over a root that can be moved.
func newMoving(t *testing.T) (f *fixture, root *movingRoot, anchor *madeCA) {
	t.Helper()
	f = newFixture(t)
	f.foreign = ledger.Coverage{Kind: "complete"}
	anchor = makeCA(t, f, "first root", nil, nil)
	root = &movingRoot{anchors: []*madeCA{anchor}, changed: make(chan struct{}, 1)}
	f.root = root
	return f, root, anchor
}

// chores does what Run does when something changed, and each minute.
func (f *fixture) chores(t *testing.T) {
	t.Helper()
	f.ca.Housekeep(t.Context())
	f.ca.Housekeep(t.Context())
}

func (f *fixture) problemsText() string {
	var all []string
	for _, problem := range f.ca.Problems() {
		all = append(all, problem.Error())
	}
	return strings.Join(all, "\n")
}

func TestANewRootIsTrustedAtOnceAndSignsOnceEveryHolderHasIt(t *testing.T) {
	f, root, anchor := newMoving(t)
	f.mustOpen(t)
	before := f.mustIssue(t, f.caller("/ns/default/sa/a"), time.Hour)
	next := makeCA(t, f, "second root", nil, nil)
	root.set(func() { root.anchors = []*madeCA{next, anchor} }) // it would certify under the new one from now on
	f.chores(t)
	bundle := f.ca.Bundle()
	if bundle.Sequence != 2 || len(bundle.Roots) != 2 || !bundle.Roots[0].Equal(anchor.cert) || !bundle.Roots[1].Equal(next.cert) {
		t.Fatalf("the bundle is %d with %d roots", bundle.Sequence, len(bundle.Roots))
	}
	if floor := f.ca.Floor(); floor != 2 {
		t.Errorf("the floor is %d", floor)
	}
	f.clock.pass(f.issuing / 2) // an issuing CA is due, and the first certificate has expired
	during := f.mustIssue(t, f.caller("/ns/default/sa/b"), time.Hour)
	if err := f.verify(t, during); err != nil || during.Bundle.Sequence != 2 {
		t.Errorf("in between: bundle %d, %v", during.Bundle.Sequence, err)
	}
	f.chores(t)
	after := f.mustIssue(t, f.caller("/ns/default/sa/c"), time.Hour)
	if after.Authority == before.Authority || !strings.Contains(f.states(t), "active") {
		t.Errorf("the states are %q, and %s signs", f.states(t), after.Authority)
	}
	if err := f.verify(t, after); err != nil {
		t.Error(err)
	}
	// Each verifies the other with the bundle that it was handed.
	for _, one := range []*ca.Issued{during, after} {
		for _, other := range []*ca.Issued{during, after} {
			if err := verifyUnder(one, other.Bundle, f.clock.clock().Wall()); err != nil {
				t.Error(err)
			}
		}
	}
	// What nobody stands for any more goes once nothing is left under it.
	root.set(func() { root.anchors = []*madeCA{next} })
	f.chores(t)
	if got := f.ca.Bundle(); len(got.Roots) != 2 {
		t.Errorf("the old root left the bundle while certificates under it live")
	}
	f.clock.pass(3 * time.Hour)
	f.chores(t)
	f.chores(t) // the root goes once its issuing CA is gone
	if got := f.ca.Bundle(); len(got.Roots) != 1 || got.Sequence != 3 || !got.Roots[0].Equal(next.cert) {
		t.Errorf("the bundle is %d with %d roots", got.Sequence, len(got.Roots))
	}
	if problems := f.problemsText(); problems != "" {
		t.Error(problems)
	}
	report, err := f.ledger.Verify(t.Context())
	if err != nil || len(report.Problems) > 0 {
		t.Errorf("verify: %v %v", report.Problems, err)
	}
}

func TestNoIssuingCASignsUnderARootThatSomebodyDoesNotHave(t *testing.T) {
	f, root, anchor := newMoving(t)
	f.mustOpen(t)
	f.clock.pass(f.issuing/2 - time.Hour)
	holder := f.mustIssue(t, f.caller("/ns/default/sa/a"), 12*time.Hour)
	next := makeCA(t, f, "second root", nil, nil)
	root.set(func() { root.anchors = []*madeCA{next, anchor} })
	f.clock.pass(2 * time.Hour)
	f.chores(t)
	if problems := f.problemsText(); !strings.Contains(problems, "the holders of 1 unexpired certificates have a trust bundle that lacks it") {
		t.Errorf("the problems are %q", problems)
	}
	still := f.mustIssue(t, f.caller("/ns/default/sa/b"), time.Hour)
	if still.Authority != holder.Authority {
		t.Error("another issuing CA signs already")
	}
	if err := verifyUnder(still, holder.Bundle, f.clock.clock().Wall()); err != nil {
		t.Error(err)
	}
	f.clock.pass(11 * time.Hour)
	f.chores(t)
	if problems := f.problemsText(); problems != "" {
		t.Error(problems)
	}
	if now := f.mustIssue(t, f.caller("/ns/default/sa/c"), time.Hour); now.Authority == holder.Authority {
		t.Error("the old issuing CA signs on")
	}
}

// A certificate that went out by SDS says nothing of the bundle, though both were made at the same moment: its holder has to.
func TestNoIssuingCASignsUnderARootBeforeTheStreamsAcknowledgedIt(t *testing.T) {
	f, root, anchor := newMoving(t)
	f.mustOpen(t)
	f.clock.pass(f.issuing/2 - time.Hour)
	caller := f.caller("/ns/default/sa/a")
	one := f.stream(t, caller)
	acknowledged := func(issued *ca.Issued, bundle uint64) {
		t.Helper()
		if err := f.ca.Acknowledged(t.Context(), issued.Number, issued.Serial, bundle); err != nil {
			t.Error(err)
		}
	}
	acknowledged(one, 1)
	next := makeCA(t, f, "second root", nil, nil)
	root.set(func() { root.anchors = []*madeCA{next, anchor} })
	f.clock.pass(2 * time.Hour) // an issuing CA is due
	f.chores(t)
	waiting := func(when string, count int) {
		t.Helper()
		f.chores(t)
		if problems := f.problemsText(); !strings.Contains(problems, fmt.Sprintf("the holders of %d unexpired certificates have a trust bundle that lacks it", count)) {
			t.Errorf("%s: the problems are %q", when, problems)
		}
		if now := f.stream(t, f.caller("/ns/default/sa/b")); now.Authority != one.Authority {
			t.Errorf("%s: another issuing CA signs already", when)
		} else {
			acknowledged(now, 2)
		}
	}
	waiting("the old bundle", 1)
	caller.Replaces = one.Number
	renewed := f.stream(t, caller)
	waiting("renewed, with the new bundle on its way", 2)
	acknowledged(renewed, 0)
	waiting("only the certificate is acknowledged", 1)
	acknowledged(renewed, 2)
	f.chores(t)
	if problems := f.problemsText(); problems != "" {
		t.Error(problems)
	}
	if now := f.stream(t, f.caller("/ns/default/sa/c")); now.Authority == one.Authority {
		t.Error("the old issuing CA signs on")
	}
	report, err := f.ledger.Verify(t.Context())
	if err != nil || len(report.Problems) > 0 {
		t.Errorf("verify: %v %v", report.Problems, err)
	}
}

func TestAnotherRootAltogetherIsRefused(t *testing.T) {
	f, root, _ := newMoving(t)
	f.mustOpen(t)
	root.set(func() { root.anchors = []*madeCA{makeCA(t, f, "a stranger", nil, nil)} })
	f.chores(t)
	if problems := f.problemsText(); !strings.Contains(problems, "and none that the ledger has") {
		t.Errorf("the problems are %q", problems)
	}
	if got := f.ca.Bundle(); got.Sequence != 1 {
		t.Errorf("the bundle is %d", got.Sequence)
	}
	f.mustIssue(t, f.caller("/ns/default/sa/a"), 0)
	if err := f.ledger.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.open(t); err == nil || !strings.Contains(err.Error(), "and none that the ledger has") {
		t.Errorf("a restart: %v", err)
	}
}

func TestAnIssuingCAThatTheRootBringsSignsAndIsReplacedAndTakenBack(t *testing.T) {
	f, root, anchor := newMoving(t)
	one, two := makeCA(t, f, "intermediate one", anchor, nil), makeCA(t, f, "intermediate two", anchor, nil)
	root.bring(one)
	f.mustOpen(t)
	check := func(by *madeCA, states string) {
		t.Helper()
		issued := f.mustIssue(t, f.caller("/ns/default/sa/a"), 0)
		if issued.Authority != ca.AuthorityID(by.cert) || len(issued.Chain) != 2 {
			t.Errorf("%s signs, and the chain has %d", issued.Authority, len(issued.Chain))
		}
		if err := f.verify(t, issued); err != nil {
			t.Error(err)
		}
		if got := f.states(t); got != states {
			t.Errorf("the states are %q, want %q", got, states)
		}
		if problems := f.problemsText(); problems != "" {
			t.Error(problems)
		}
	}
	check(one, "active")
	status, err := f.ca.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	if c := status[len(status)-1].Coverage; c.Kind != "foreign" || !c.Until.Time().After(f.clock.clock().Wall().Add(f.window-time.Minute)) {
		t.Errorf("its coverage is %+v", c)
	}
	f.reopen(t)
	check(one, "active")
	root.bring(two)
	f.chores(t)
	check(two, "retired active")
	root.bring(one)
	f.chores(t)
	check(one, "active retired")
	f.clock.pass(f.window + 2*time.Hour) // what others may have issued under it has expired
	f.chores(t)
	check(one, "active removed")
	root.bring(two)
	f.chores(t)
	check(two, "retired active")
	report, err := f.ledger.Verify(t.Context())
	if err != nil || len(report.Problems) > 0 {
		t.Errorf("verify: %v %v", report.Problems, err)
	}
}

func TestABadIssuingCAIsRefusedAndTheOldOneGoesOn(t *testing.T) {
	f, root, anchor := newMoving(t)
	good := makeCA(t, f, "intermediate", anchor, nil)
	root.bring(good)
	f.mustOpen(t)
	stranger := makeCA(t, f, "another root", nil, nil)
	for reason, bad := range map[string]func() (chain []*madeCA, key crypto.Signer){
		"is not the one in the certificate": func() ([]*madeCA, crypto.Signer) { return []*madeCA{makeCA(t, f, "x", anchor, nil)}, newKey(t) },
		"outlives its issuer": func() ([]*madeCA, crypto.Signer) {
			c := makeCA(t, f, "x", anchor, func(x *x509.Certificate) { x.NotAfter = anchor.cert.NotAfter.Add(time.Hour) })
			return []*madeCA{c}, c.key
		},
		"does not lead to a trust anchor": func() ([]*madeCA, crypto.Signer) {
			c := makeCA(t, f, "x", stranger, nil)
			return []*madeCA{c}, c.key
		},
		"it expired at": func() ([]*madeCA, crypto.Signer) {
			c := makeCA(t, f, "x", anchor, func(x *x509.Certificate) { x.NotAfter = x.NotBefore.Add(time.Minute) })
			return []*madeCA{c}, c.key
		},
		"not a CA's": func() ([]*madeCA, crypto.Signer) {
			c := makeCA(t, f, "x", anchor, func(x *x509.Certificate) { x.IsCA, x.MaxPathLenZero = false, false })
			return []*madeCA{c}, c.key
		},
		"its URI SAN is": func() ([]*madeCA, crypto.Signer) {
			c := makeCA(t, f, "x", anchor, func(x *x509.Certificate) { x.URIs = []*url.URL{{Scheme: "spiffe", Host: "elsewhere"}} })
			return []*madeCA{c}, c.key
		},
		"the vault is sealed": nil,
	} {
		root.set(func() {
			if bad == nil {
				root.err = errors.New("the vault is sealed")
				return
			}
			root.brings, root.key = bad()
		})
		f.chores(t)
		if problems := f.problemsText(); !strings.Contains(problems, reason) {
			t.Errorf("the problems are %q, want one about %q", problems, reason)
		}
		if issued := f.mustIssue(t, f.caller("/ns/default/sa/a"), 0); issued.Authority != ca.AuthorityID(good.cert) {
			t.Errorf("%s: %s signs", reason, issued.Authority)
		}
		root.set(func() { root.err = nil })
		root.bring(good)
		f.chores(t)
		if problems := f.problemsText(); problems != "" {
			t.Error(problems)
		}
	}
}

func TestARestartWithoutTheKeyThatTheRootBringsServesOnAndHeals(t *testing.T) {
	f, root, anchor := newMoving(t)
	root.bring(makeCA(t, f, "intermediate", anchor, nil))
	f.mustOpen(t)
	root.set(func() { root.err = errors.New("the Secret is not mounted") })
	f.reopen(t)
	if err := f.ca.Ready(t.Context()); err == nil {
		t.Error("it says that it is ready")
	}
	if problems := f.problemsText(); !strings.Contains(problems, "the Secret is not mounted") {
		t.Errorf("the problems are %q", problems)
	}
	root.set(func() { root.err = nil })
	f.chores(t)
	if err := f.ca.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	if problems := f.problemsText(); problems != "" {
		t.Error(problems)
	}
}

func TestATaintedIssuingCAThatTheRootBringsNeverSignsAgain(t *testing.T) {
	f, root, anchor := newMoving(t)
	one := makeCA(t, f, "intermediate", anchor, nil)
	root.bring(one)
	f.mustOpen(t)
	if err := f.ca.Taint(t.Context(), ca.AuthorityID(one.cert), "copied", "uid 0"); err == nil || !strings.Contains(err.Error(), "is tainted: it never signs again") {
		t.Errorf("tainting: %v", err)
	}
	if _, err := f.issue(t, f.caller("/ns/default/sa/a"), 0); !errors.Is(err, ca.ErrUnavailable) {
		t.Errorf("issuing: %v", err)
	}
	root.bring(makeCA(t, f, "its successor", anchor, nil))
	f.chores(t)
	f.mustIssue(t, f.caller("/ns/default/sa/a"), 0)
}

// somebodysAnchors are trust anchors besides the root's.
type somebodysAnchors struct {
	mu      sync.Mutex
	all     []*x509.Certificate
	changed chan struct{}
}

func (a *somebodysAnchors) Anchors(context.Context) ([]*x509.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.all, nil
}

func (a *somebodysAnchors) Changed() <-chan struct{} { return a.changed }

func TestFurtherTrustAnchorsComeAndGo(t *testing.T) {
	f, _, anchor := newMoving(t)
	other := makeCA(t, f, "the next mesh", nil, nil)
	anchors := &somebodysAnchors{}
	f.anchors = anchors
	f.mustOpen(t)
	expect := func(sequence uint64, roots ...*madeCA) {
		t.Helper()
		bundle := f.ca.Bundle()
		if bundle.Sequence != sequence || len(bundle.Roots) != len(roots) {
			t.Fatalf("the bundle is %d with %d roots", bundle.Sequence, len(bundle.Roots))
		}
		for i, root := range roots {
			if !bundle.Roots[i].Equal(root.cert) {
				t.Errorf("root %d is %s", i, bundle.Roots[i].Subject)
			}
		}
	}
	expect(1, anchor)
	anchors.all = []*x509.Certificate{other.cert, anchor.cert} // one that the root names, too
	f.chores(t)
	expect(2, anchor, other)
	f.reopen(t)
	expect(2, anchor, other)
	anchors.all = nil
	f.chores(t)
	expect(2, anchor, other)
	f.clock.pass(f.window + 2*time.Hour)
	f.chores(t)
	expect(3, anchor)
	anchors.all = []*x509.Certificate{other.cert}
	f.chores(t)
	expect(4, anchor, other)
}

// rootState is what the ledger has of a root.
func (f *fixture) rootState(t *testing.T, root *madeCA) ledger.AuthorityRecord {
	t.Helper()
	records, err := f.ledger.Authorities()
	if err != nil {
		t.Fatal(err)
	}
	for _, record := range records {
		if record.ID == ca.AuthorityID(root.cert) {
			return record
		}
	}
	t.Fatalf("the ledger lacks %s", root.cert.Subject)
	return ledger.AuthorityRecord{}
}

// An anchor of the first day is somebody else's whatever the root is: who got a certificate from before this CA lacks it.
func TestAnAnchorOfTheFirstDayIsForeignAndSignsOnlyOnceEveryHolderHasIt(t *testing.T) {
	f, root, anchor := newMoving(t)
	f.foreign = ledger.Coverage{Kind: "foreign", Until: ledger.At(f.clock.clock().Wall().Add(f.window))}
	next := makeCA(t, f, "the next root", nil, nil)
	f.anchors = &somebodysAnchors{all: []*x509.Certificate{next.cert}}
	f.mustOpen(t)
	if record := f.rootState(t, next); record.State != ledger.StatePrepared || record.Coverage.Kind != "foreign" {
		t.Errorf("the anchor is %s, with coverage %s", record.State, record.Coverage.Kind)
	}
	intermediate := makeCA(t, f, "an intermediate of the next root", next, nil)
	root.set(func() { root.anchors = []*madeCA{next, anchor} })
	root.bring(intermediate)
	f.chores(t)
	if err := f.ca.RenewIssuing(t.Context()); err == nil || !strings.Contains(err.Error(), "no issuing CA signs under the new root") {
		t.Errorf("it signs under a root that holders from before this CA lack: %v", err)
	}
	f.clock.pass(f.window + time.Hour)
	if err := f.ca.RenewIssuing(t.Context()); err != nil {
		t.Error(err)
	}
}

// Others sign under an anchor for as long as it is named: what they signed last lives on for the whole window after that.
func TestAnAnchorThatIsGivenUpStaysUntilWhatOthersSignedUnderItHasEnded(t *testing.T) {
	f, root, anchor := newMoving(t)
	other := makeCA(t, f, "others' root", nil, nil)
	anchors := &somebodysAnchors{}
	f.anchors = anchors
	f.mustOpen(t)
	anchors.all = []*x509.Certificate{other.cert}
	f.chores(t)
	f.clock.pass(10 * f.window)
	anchors.all = nil
	f.chores(t)
	if got := f.rootState(t, other).State; got != ledger.StateRetired || len(f.ca.Bundle().Roots) != 2 {
		t.Fatalf("an anchor that was just given up is %s, and the bundle has %d roots", got, len(f.ca.Bundle().Roots))
	}
	anchors.all = []*x509.Certificate{other.cert} // a file that was cut short, and is whole again
	f.chores(t)
	if got := f.rootState(t, other).State; got != ledger.StatePrepared || len(f.ca.Bundle().Roots) != 2 {
		t.Fatalf("an anchor that is named again and never signed is %s, and the bundle has %d roots", got, len(f.ca.Bundle().Roots))
	}
	anchors.all = nil
	f.chores(t)
	f.clock.pass(f.window + 2*time.Hour)
	f.chores(t)
	if roots := f.ca.Bundle().Roots; len(roots) != 1 || !roots[0].Equal(anchor.cert) || root.anchors[0] != anchor {
		t.Errorf("after the window the bundle has %d roots", len(roots))
	}
}

// A root may be a server that is far away.
func TestEachTickAsksTheRootOnce(t *testing.T) {
	f, root, _ := newMoving(t)
	f.mustOpen(t)
	root.set(func() { root.asked = 0 })
	for range 3 {
		f.ca.Housekeep(t.Context())
	}
	if root.asked != 3 {
		t.Errorf("three ticks asked it %d times", root.asked)
	}
}
