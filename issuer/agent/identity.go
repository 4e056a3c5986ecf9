package agent

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/ca"
	"kedge/ca/pemfile"
	"kedge/issuer/istio"
	"kedge/issuer/sds"
)

const (
	// look is how often the wall clock and the proof are looked at, so that a jump of the clock, a suspend, and a new token are noticed.
	look = 5 * time.Second
	// callLimit is how long a call may take. A CA that is busy keeps callers in a queue, for a minute by default, and to come back costs more than to wait.
	callLimit = 75 * time.Second

	// How soon the CA is asked again when it cannot answer …
	firstRetry, longestRetry = 250 * time.Millisecond, 30 * time.Second
	// … and when it refuses, which something else has to end: a new token, or an admin.
	firstRefusal, longestRefusal = 5 * time.Second, 5 * time.Minute
)

// identity is one workload's: its SVID with its key, and its trust bundle.
type identity struct {
	o   *Options
	w   Workload
	log *slog.Logger
	ask func(ctx context.Context, with shown) (*answer, error) // the CA for an SVID

	consumers   *consumers  // of the trust bundle
	holders     *consumers  // of the SVID
	remembering sync.Mutex  // held while the state is written
	alone       atomic.Bool // it was said that the CA has no SDS

	mu       sync.Mutex
	svid     *held // the latest; it may have expired
	bundle   *bundle
	recalled *sds.SVID              // of an earlier run; nil: there was none
	known    map[*sds.Bundle]uint64 // the latest bundles, by the order in which they were taken
	follows  string                 // see serverRoots
	sum      string                 // of the proof that brought the SVID, or one before it: it is not shown again
	failure  error                  // of the latest call; nil: it was good, or there was none yet
	denied   bool                   // the CA answered, and refused
	faults   map[string]error       // what else is wrong, by what it is about
	failures uint64                 // calls that brought no SVID, since the start
	issued   uint64                 // those that did
	told     uint64                 // sequence number of the bundle that was acknowledged to the CA
	now      *sds.Materials
	changed  chan struct{} // closed when now is another
}

// held is an SVID with when it is due.
type held struct {
	*istio.SVID
	handed  *sds.SVID
	order   uint64 // in which the agent took them; 1 is the first
	arrived bool   // the CA knows that it has arrived

	RenewAt  time.Time     // by the wall clock
	received time.Time     // by the time that has passed
	renew    time.Duration // since then
}

// hold makes an SVID the first.
func hold(svid *istio.SVID) *held {
	leaf := svid.Leaf()
	return &held{SVID: svid, handed: &sds.SVID{ID: svid.ID, Chain: svid.Certificates, Key: svid.Key, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}, order: 1}
}

// bundle is a trust bundle with its place in the order in which the agent took them.
type bundle struct {
	*sds.Bundle
	order uint64
	taken time.Time // monotonic
}

// answer is what the CA answered a CSR with.
type answer struct {
	*istio.SVID
	number sds.Number // of the trust bundle
	asked  time.Time  // monotonic
}

func newIdentity(o *Options, w Workload) *identity {
	i := &identity{o: o, w: w, log: o.Logger.With("workload", w.Name), consumers: newConsumers(o.Grace), holders: newConsumers(o.Grace), known: map[*sds.Bundle]uint64{}, faults: map[string]error{},
		now: &sds.Materials{}, changed: make(chan struct{})}
	i.holders.begun = time.Time{} // what others have of an earlier run counts by itself, unless recall goes on with it
	i.ask = i.askCA
	return i
}

// keep has the SVID issued, and renewed when it is due.
func (i *identity) keep(ctx context.Context) {
	var wait backoff
	var tried string // what was read when the CA refused
	for {
		i.publish() // an SVID may have expired
		wall := i.wall()
		if wait.left() > 0 && tried != "" && i.inputs() != tried { // what was refused has been replaced: that is what everybody waits for
			wait.reset()
		}
		if i.due(wall) && wait.left() == 0 {
			reads := i.inputs()
			tried = ""
			err := i.renew(ctx)
			first, longest := firstRetry, longestRetry
			if staysWrong(err) {
				first, longest, tried = firstRefusal, longestRefusal, reads
			}
			switch {
			case ctx.Err() != nil:
				return
			case err == nil:
				wait.reset()
			default:
				i.log.Warn("there is no good new SVID", "error", err, "server", i.o.Server, "again_in", wait.failed(first, longest).Round(time.Millisecond).String(), "expires", i.expires())
			}
		}
		timer := time.NewTimer(i.rest(wait.left()))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// inputs tells apart what an admin has given.
func (i *identity) inputs() string {
	given, err := i.proof().read()
	roots, rootsErr := pemfile.ReadCertificates(i.o.RootFile)
	return fmt.Sprint(given.sum, err, sumOf(roots), rootsErr)
}

func sumOf(certificates []*x509.Certificate) string {
	var all []byte
	for _, c := range certificates {
		all = append(all, c.Raw...)
	}
	return sum(all)
}

// rest is how long there is nothing to do, if the clock does not jump.
func (i *identity) rest(wait time.Duration) time.Duration {
	wall := i.wall()
	i.mu.Lock()
	defer i.mu.Unlock()
	rest := look
	if s := i.svid; s != nil && !i.dueNow(wall) {
		rest = min(rest, s.RenewAt.Sub(wall), s.renew-time.Since(s.received))
	} else {
		rest = min(rest, wait)
	}
	if s := i.svid; s != nil && !s.expired(wall) {
		rest = min(rest, s.Leaf().NotAfter.Sub(wall))
	}
	return max(rest, time.Millisecond)
}

// wall is the wall clock alone.
func (i *identity) wall() time.Time { return i.o.Now().Round(0) }

func (i *identity) proof() proof { return proof{i.w.TokenFile, i.w.ClientCertificate} }

// expired says whether nobody accepts the SVID any more: by the wall clock, or since all of its life has passed, whatever the clock says.
func (s *held) expired(wall time.Time) bool {
	leaf := s.Leaf()
	return !wall.Before(leaf.NotAfter) || time.Since(s.received) >= leaf.NotAfter.Sub(leaf.NotBefore)
}

func (i *identity) due(wall time.Time) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.dueNow(wall)
}

func (i *identity) dueNow(wall time.Time) bool {
	s := i.svid
	return s == nil || !wall.Before(s.RenewAt) || time.Since(s.received) >= s.renew || s.expired(wall)
}

// schedule says when an SVID that came now is due: at half of the time that it has left, give or take a tenth of that.
func (s *held) schedule(wall time.Time) {
	begins := wall
	if leaf := s.Leaf(); begins.Before(leaf.NotBefore) { // the clock is late
		begins = leaf.NotBefore
	}
	left := max(0, s.Leaf().NotAfter.Sub(begins))
	s.received, s.renew = time.Now(), left/2-left/20+mathrand.N(left/10+1)
	s.RenewAt = begins.Add(s.renew)
}

// errClock: what the CA has just issued has hardly any life left by this machine's clock. It is used as far as it goes; but it is no reason to ask again at once.
var errClock = errors.New("the SVID that has just come has less than half of its life left by this machine's clock: is the clock right?")

// renew has an SVID issued, and hands it out.
func (i *identity) renew(ctx context.Context) error {
	came, with, err := i.obtain(ctx)
	i.mu.Lock()
	i.failure, i.denied = err, isDenial(err)
	if err != nil {
		if ctx.Err() == nil {
			i.failures++
		}
		i.mu.Unlock()
		return err
	}
	wall := i.wall()
	before := i.svid
	i.issued++
	i.svid = hold(came.SVID)
	if before != nil {
		i.svid.order = before.order + 1
	}
	i.svid.schedule(wall)
	if with.sum != "" {
		i.sum = with.sum
	}
	taken := i.takeLocked(came.ID.TrustDomain(), came.Roots, came.BundlePEM, came.number, came.asked)
	fits := taken || verifies(came.SVID, i.bundle.Roots)
	renewal, current := i.svid.RenewAt, i.bundle
	i.mu.Unlock()

	if before != nil && before.ID != came.ID {
		i.log.Warn("the CA gives this workload another identity than before", "before", before.ID.String(), "spiffe_id", came.ID.String())
	}
	i.log.Info("an SVID was issued", "spiffe_id", came.ID.String(), "serial", serialOf(came.Leaf()), "not_after", came.Leaf().NotAfter, "renewal", renewal, "bundle", current.Sequence)
	if !fits {
		i.log.Error("the SVID does not verify under the trust bundle, which is newer than the one that it came with: what does 'kedge doctor' say at the CA?", "bundle", current.Sequence)
	}
	i.publish()
	i.remember()
	leaf := came.Leaf()
	if left := leaf.NotAfter.Sub(wall); left < leaf.NotAfter.Sub(leaf.NotBefore)/2 {
		return fmt.Errorf("%w (it says %s, the SVID ends at %s)", errClock, wall.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// obtain asks the CA. The SVID that is there proves its holder, and what an admin has given is shown when it is another than before: a join token serves once, and
// whoever brings both a token and an SVID is seen to hold the SVID. When the CA does not take that, the other proof is shown, alone; and so it is the next time.
func (i *identity) obtain(ctx context.Context) (came *answer, with shown, err error) {
	own, seen := i.own()
	given, err := i.proof().read()
	if err != nil && own == nil {
		return nil, shown{}, err
	}
	var proofs []shown
	switch {
	case err != nil:
		i.log.Warn("the SVID alone proves its holder, since what was given cannot be read", "error", err)
		proofs = []shown{{certificate: own}}
	case own == nil:
		proofs = []shown{given}
	case given.sum == seen:
		proofs = []shown{{certificate: own}, given}
	case given.token != "":
		proofs = []shown{{token: given.token, certificate: own, sum: given.sum}, given} // alone if it is for another identity
	default:
		proofs = []shown{given, {certificate: own}}
	}
	for n := range proofs {
		with = proofs[n]
		if came, err = i.ask(ctx, with); !isDenial(err) {
			break
		}
		if n+1 < len(proofs) {
			i.log.Warn("the CA does not take this proof, and another one is shown", "error", err)
		}
	}
	if status.Code(err) == codes.Unauthenticated {
		err = fmt.Errorf("%w. %s", err, i.proof().advice())
	}
	return came, with, err
}

// own is the SVID as a client certificate, nil when it proves nothing; and the sum of the proof that brought it.
func (i *identity) own() (*tls.Certificate, string) {
	wall := i.wall()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.svid == nil || i.svid.expired(wall) {
		return nil, ""
	}
	return certificateOf(i.svid.handed), i.sum
}

// certificateOf is an SVID as a client shows it.
func certificateOf(s *sds.SVID) *tls.Certificate {
	certificate := &tls.Certificate{PrivateKey: s.Key, Leaf: s.Chain[0]}
	for _, c := range s.Chain {
		certificate.Certificate = append(certificate.Certificate, c.Raw)
	}
	return certificate
}

// askCA makes a key, and has it certified.
func (i *identity) askCA(ctx context.Context, with shown) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	roots, err := i.serverRoots()
	if err != nil {
		return nil, err
	}
	key, err := istio.NewKey(i.o.KeyType)
	if err != nil {
		return nil, err
	}
	csr, err := istio.NewCSR(key)
	if err != nil {
		return nil, err
	}
	client, err := istio.Dial(i.o.Server, roots, with.certificate)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	client.BundlesBySDS = true
	asked := time.Now()
	signed, err := client.Sign(ctx, csr, with.token, i.o.TTL)
	if errors.Is(err, istio.ErrUntrusted) {
		return nil, fmt.Errorf("%w. Does %s belong to this CA, and is the name among its csr.serverNames?", err, i.o.RootFile)
	}
	if err != nil {
		return nil, err
	}
	svid, err := istio.ReadSVID(key, strings.Join(signed.Chain, ""), signed.Bundle, signedAt(signed.Chain))
	if err != nil {
		return nil, fmt.Errorf("what the CA sent is not used: %w", err)
	}
	came := &answer{SVID: svid, asked: asked}
	if signed.Number != (istio.BundleNumber{}) {
		came.number = sds.NumberOf(&sds.Bundle{Incarnation: signed.Number.Incarnation, Sequence: signed.Number.Sequence})
	}
	return came, nil
}

// signedAt is a moment at which what was just issued is valid: whether the clock is right is looked at elsewhere.
func signedAt(chain []string) time.Time {
	if leaf, err := pemfile.Certificates([]byte(chain[0])); err == nil && len(leaf) > 0 {
		return leaf[0].NotBefore
	}
	return time.Now()
}

// isRefusal says whether the CA answered, and will not issue until something else has changed.
func isRefusal(err error) bool {
	switch status.Code(err) {
	case codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument, codes.FailedPrecondition, codes.Unimplemented:
		return true
	}
	return errors.Is(err, istio.ErrUntrusted)
}

// isDenial says whether the CA does not take what it was shown.
func isDenial(err error) bool {
	return status.Code(err) == codes.Unauthenticated || status.Code(err) == codes.PermissionDenied
}

// staysWrong says whether asking again soon is of no use. What is no status is of this machine, or about an answer that is no good: a certificate that was issued for nothing.
func staysWrong(err error) bool {
	return isRefusal(err) || status.Code(err) == codes.Unknown
}

// serverRoots are those that the CA's server must prove itself under: the certificates of the file. When one of them is in the trust bundle, the file is the CA's own trust
// bundle, as it was on some day: then the bundle of now counts, too, and a root that came since needs no new file on every machine. A file with roots of
// another kind decides alone. follows is the sum of the file that was the CA's own: it is for as long as nobody replaces it, whatever becomes of the trust bundle.
func (i *identity) serverRoots() (*x509.CertPool, error) {
	certificates, err := pemfile.ReadCertificates(i.o.RootFile)
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case err != nil && i.follows == "":
		return nil, fmt.Errorf("reading the roots of the CA's server: %w", err)
	case i.bundle == nil, err != nil: // it may be back soon
	case slices.ContainsFunc(certificates, func(c *x509.Certificate) bool { return slices.ContainsFunc(i.bundle.Roots, c.Equal) }):
		i.follows = sumOf(certificates)
	case i.follows != sumOf(certificates):
		i.follows = ""
	}
	if i.follows != "" && i.bundle != nil {
		certificates = append(certificates, i.bundle.Roots...)
	}
	pool := x509.NewCertPool()
	for _, c := range certificates {
		pool.AddCert(c)
	}
	return pool, nil
}

// verifies says whether whoever holds the roots accepts the SVID.
func verifies(svid *istio.SVID, roots []*x509.Certificate) bool {
	bundle := x509bundle.FromX509Authorities(svid.ID.TrustDomain(), roots)
	_, _, err := x509svid.Verify(svid.Certificates, bundle, x509svid.WithTime(svid.Leaf().NotBefore))
	return err == nil
}

// maxKnown is how many bundles are told apart: of an older one it is not known when it was taken, which counts as before all.
const maxKnown = 64

// takeLocked takes a trust bundle, unless it is the one of now, or an older one. Who numbers its bundles says which is older; of another's one is older that was asked for before the
// one of now came: it may be from before that, too.
func (i *identity) takeLocked(td spiffeid.TrustDomain, roots []*x509.Certificate, text string, number sds.Number, asked time.Time) (taken bool) {
	numbered := number != sds.Number{}
	if now := i.bundle; now != nil && now.TrustDomain == td {
		switch {
		case numbered && number.Incarnation == now.Incarnation && number.Sequence <= now.Sequence:
			return false
		case !numbered && (asked.Before(now.taken) || now.PEM == text):
			return false
		}
	}
	next := &bundle{Bundle: &sds.Bundle{TrustDomain: td, Incarnation: number.Incarnation, Sequence: number.Sequence, Roots: roots, PEM: text}, order: 1, taken: time.Now()}
	if i.bundle != nil {
		next.order = i.bundle.order + 1
	}
	if !numbered { // numbers of this very process
		next.Incarnation, next.Sequence = processID, next.order
	}
	i.bundle = next
	i.known[next.Bundle] = next.order
	for b, order := range i.known {
		if order+maxKnown <= next.order {
			delete(i.known, b)
		}
	}
	return true
}

// processID stands for the incarnation of bundles that come without numbers.
var processID = func() string {
	var octets [16]byte
	rand.Read(octets[:]) // never fails since Go 1.24
	return hex.EncodeToString(octets[:])
}()

// publish makes what is there now what the doors hand out: no SVID that has expired.
func (i *identity) publish() {
	wall := i.wall()
	i.mu.Lock()
	defer i.mu.Unlock()
	next := &sds.Materials{Bundles: i.now.Bundles}
	if i.svid != nil {
		next.ID = i.svid.ID
		if !i.svid.expired(wall) {
			next.SVID = i.svid.handed
		} else if i.now.SVID == i.svid.handed {
			i.log.Error("the SVID has expired, and is not handed out any more", "spiffe_id", i.svid.ID.String(), "not_after", i.svid.Leaf().NotAfter)
		}
	}
	if i.bundle != nil && (len(next.Bundles) == 0 || next.Bundles[0] != i.bundle.Bundle) {
		next.Bundles = []*sds.Bundle{i.bundle.Bundle}
	}
	if next.ID == i.now.ID && next.SVID == i.now.SVID && slices.Equal(next.Bundles, i.now.Bundles) {
		return
	}
	i.now = next
	close(i.changed)
	i.changed = make(chan struct{})
}

// materials are what the doors hand out now.
func (i *identity) materials() (*sds.Materials, <-chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.now, i.changed
}

// missing says why there is no SVID now; nil: there is one.
func (i *identity) missing() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case i.now.SVID != nil:
		return nil
	case i.svid != nil:
		return fmt.Errorf("the SVID has expired at %s: %w", i.svid.Leaf().NotAfter.UTC().Format(time.RFC3339), cmp.Or(i.failure, errWaiting))
	}
	return cmp.Or(i.failure, errWaiting)
}

var errWaiting = errors.New("the CA has not answered yet")

// problems lists what is wrong though the agent goes on.
func (i *identity) problems() []ca.Problem {
	i.mu.Lock()
	defer i.mu.Unlock()
	var all []ca.Problem
	if i.failure != nil && i.now.SVID != nil {
		all = append(all, ca.Problem{About: "renewal of " + i.w.Name, Err: i.failure})
	}
	for about, err := range i.faults {
		all = append(all, ca.Problem{About: about + " of " + i.w.Name, Err: err})
	}
	slices.SortFunc(all, func(a, b ca.Problem) int { return strings.Compare(a.About, b.About) })
	return all
}

// note says what is wrong with a part, or that nothing is. It returns whether that is news.
func (i *identity) note(about string, err error) (news bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	before := i.faults[about]
	delete(i.faults, about)
	if err != nil {
		i.faults[about] = err
	}
	return (err == nil) != (before == nil)
}

// expires is when the SVID does, for logs.
func (i *identity) expires() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.svid == nil {
		return "there is none"
	}
	return i.svid.Leaf().NotAfter.UTC().Format(time.RFC3339)
}

// serialOf is a serial number as the CA writes it.
func serialOf(c *x509.Certificate) string { return hex.EncodeToString(c.SerialNumber.Bytes()) }
