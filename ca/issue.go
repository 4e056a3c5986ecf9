package ca

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// Request is what a caller asks for besides proving who it is.
type Request struct {
	CSR       []byte          // PEM
	TTL       time.Duration   // 0: the profile's default
	Profile   string          // "": the default one
	Delivery  ledger.Delivery // how the bundle reaches the holder
	RequestID string          // as in the logs
}

// Issue takes a caller through every step of the signing path.
func (c *CA) Issue(ctx context.Context, caller Caller, r Request) (*Issued, error) {
	granted, err := c.Grant(caller, r.Profile)
	if err != nil {
		return nil, err
	}
	requested, err := granted.ReadCSR(r.CSR)
	if err != nil {
		return nil, err
	}
	return requested.Issue(ctx, r)
}

// Issue takes the steps from Prepare on. When the issuing CA is renewed in the middle of them, they are taken once more, with the new one.
func (r *Requested) Issue(ctx context.Context, request Request) (*Issued, error) {
	issued, err := r.issue(ctx, request)
	if errors.Is(err, errOutdated) {
		issued, err = r.issue(ctx, request)
	}
	return issued, err
}

// issue takes the steps that depend on which issuing CA is active.
func (r *Requested) issue(ctx context.Context, request Request) (*Issued, error) {
	prepared, err := r.Prepare(request.TTL)
	if err != nil {
		return nil, err
	}
	signed, err := prepared.Sign(ctx)
	if err != nil {
		return nil, err
	}
	return signed.Record(ctx, request.Delivery, request.RequestID)
}

// Granted is a caller that may have a certificate for its identity. It comes from Grant only.
type Granted struct {
	ca      *CA
	caller  Caller
	profile *Profile
}

// Grant decides whether the caller may have an SVID for its identity under the profile of that name.
func (c *CA) Grant(caller Caller, profile string) (*Granted, error) {
	if caller.ID.IsZero() || len(caller.Proofs) == 0 {
		return nil, Unauthenticated(errors.New("the caller has no proven identity"))
	}
	if !caller.ID.MemberOf(c.td) {
		return nil, Denied(fmt.Errorf("%s is not of the trust domain %s", caller.ID, c.td))
	}
	first, _, _ := strings.Cut(strings.TrimPrefix(caller.ID.Path(), "/"), "/")
	if first == "" || first == reservedSegment {
		return nil, Denied(fmt.Errorf("%s is never granted: an SVID's ID has a path, and /%s is this CA's own", caller.ID, reservedSegment))
	}
	if profile == "" {
		profile = DefaultProfile
	}
	p := c.profiles[profile]
	if p == nil {
		return nil, Invalid(fmt.Errorf("there is no profile %.64q: CertSigner names one of this CA's profiles, or is empty", profile))
	}
	if !p.AllowsIdentity(caller.ID.Path()) {
		return nil, Denied(fmt.Errorf("the profile %q is not for %s", profile, caller.ID))
	}
	if limit := p.MaxLineageAge(); limit > 0 {
		if caller.First == nil {
			return nil, Denied(fmt.Errorf("the profile %q limits how long client certificates renew each other, and it is not known where this one's lineage began", profile))
		}
		if age := c.now().Sub(caller.First.Time.Time()); age > limit {
			return nil, Denied(fmt.Errorf("the lineage of this client certificate began %s ago with a proof by %s; the profile %q allows %s: the caller must show a token again",
				age.Round(time.Second), caller.First.Method, profile, limit))
		}
	}
	return &Granted{ca: c, caller: caller, profile: p}, nil
}

// Requested is a granted identity with the public key that it is for. It comes from ReadCSR and ForKey only.
type Requested struct {
	granted *Granted
	pub     crypto.PublicKey
	spki    []byte // of pub, in DER
}

// ReadCSR takes the public key from a CSR, after the profile allowed it and the CSR's signature proved possession of it.
func (g *Granted) ReadCSR(pem []byte) (*Requested, error) {
	pub, spki, err := parseCSR(pem, g.profile.AllowsKey)
	if err != nil {
		return nil, err
	}
	return &Requested{granted: g, pub: pub, spki: spki}, nil
}

// ForKey takes a key that this CA made for the caller, as for an SDS stream: possession is known, so that there is no CSR. The profile judges it as it
// does the key of a CSR. One that it does not allow is ErrDenied: no caller can do anything about it.
func (g *Granted) ForKey(pub crypto.PublicKey) (*Requested, error) {
	if err := g.profile.AllowsKey(pub); err != nil {
		return nil, Denied(fmt.Errorf("the key that this CA makes is not allowed: %v", err)) // %v: of one kind only
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("the key that this CA made cannot be encoded: %w", err) // a defect, so of no kind
	}
	return &Requested{granted: g, pub: pub, spki: spki}, nil
}

// Prepared is a certificate that may be signed. It comes from Prepare only.
type Prepared struct {
	requested *Requested
	trust     *trust
	authority *authority
	ttl       time.Duration
	asked     time.Duration // when more than was granted; else 0
}

// Prepare settles the validity: what was asked for, within the profile, and never beyond the end of the chain (I3). When
// the chain leaves less than the profile's minimum the answer is ErrUnavailable, never an ever shorter leaf.
func (r *Requested) Prepare(asked time.Duration) (*Prepared, error) {
	c, profile := r.granted.ca, r.granted.profile
	ttl, clamped, err := profile.Lifetime(asked)
	if err != nil {
		return nil, err
	}
	t := c.trust.Load()
	active, left, err := t.signer(c.now(), profile.MinTTL())
	if err != nil {
		return nil, err
	}
	ttl = min(ttl, left)
	p := &Prepared{requested: r, trust: t, authority: active, ttl: ttl}
	if clamped {
		p.asked = asked
	}
	return p, nil
}

// Signed is a certificate that is not recorded yet. It comes from Sign only, and does not give the certificate away.
type Signed struct {
	prepared  *Prepared
	serial    ledger.Serial
	der       []byte
	notBefore time.Time
	notAfter  time.Time
	recorded  bool
}

// Sign makes the certificate, each time with a new serial.
func (p *Prepared) Sign(ctx context.Context) (*Signed, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c, a, r := p.requested.granted.ca, p.authority, p.requested
	serial := newSerial(c.ledger.Head().Log)
	now := c.now().UTC().Truncate(time.Second)
	notBefore := now.Add(-r.granted.profile.Backdate(p.ttl))
	if notBefore.Before(a.cert.NotBefore) {
		notBefore = a.cert.NotBefore
	}
	notAfter := earlier(now.Add(p.ttl), a.notAfter)
	der, err := a.leaves.sign(leaf{serial: serial, uri: r.granted.caller.ID.String(), pub: r.pub, spki: r.spki, notBefore: notBefore, notAfter: notAfter})
	if err != nil {
		c.didNotSign()
		return nil, Unavailable(fmt.Errorf("signing with the issuing CA %s: %w", a.short(), err))
	}
	return &Signed{prepared: p, serial: serial, der: der, notBefore: notBefore, notAfter: notAfter}, nil
}

// Issued is a certificate that is durably in the ledger, and may leave.
type Issued struct {
	Number      uint64        // of its event in the ledger
	Serial      ledger.Serial //
	ID          spiffeid.ID   // zero for a serving certificate
	DER         []byte        // the leaf
	Chain       []string      // PEM, one certificate an element: the leaf, then what leads to a root, without the root
	Bundle      *Bundle       // to be handed over with it
	NotBefore   time.Time     //
	NotAfter    time.Time     //
	ClampedFrom time.Duration // what was asked for, when more than granted; else 0
	Authority   ledger.Hash   // that signed
}

// Record appends the certificate's event to the ledger. Only when that is durable is there an Issued (I1). The ledger refuses it if
// meanwhile the authority stopped signing, the bundle fell below the floor, the join token was spent, or the client certificate was revoked or superseded.
func (s *Signed) Record(ctx context.Context, delivery ledger.Delivery, requestID string) (*Issued, error) {
	if s.recorded {
		return nil, errors.New("a signed certificate is recorded once") // a defect, so of no kind
	}
	s.recorded = true
	r := s.prepared.requested
	caller, c := r.granted.caller, r.granted.ca
	event := s.event(delivery, requestID)
	event.SPIFFEID, event.Key, event.Profile = caller.ID.String(), sha256.Sum256(r.spki), r.granted.profile.Name()
	event.Proofs, event.Holder, event.Replaces, event.Token = caller.Proofs, caller.Holder, caller.Replaces, caller.JoinToken
	event.Peer, event.ClusterID = caller.Peer, caller.ClusterID
	event.ClampedFrom = int64(s.prepared.asked / time.Second)
	if caller.First != nil && *caller.First != caller.Proofs[0] {
		event.FirstProof = caller.First
	}
	number, err := c.appendIssue(ctx, event, caller.Presented, s.prepared.trust)
	if err != nil {
		return nil, err
	}
	if !caller.IssuedAt.IsZero() {
		c.guarded.Corroborate(caller.IssuedAt)
	}
	issued := s.issued(number)
	issued.ID = caller.ID
	return issued, nil
}

// event is what the ledger keeps of the certificate itself.
func (s *Signed) event(delivery ledger.Delivery, requestID string) *ledger.Issue {
	a := s.prepared.authority
	return &ledger.Issue{
		Serial: s.serial, Certificate: sha256.Sum256(s.der), NotBefore: ledger.At(s.notBefore), NotAfter: ledger.At(s.notAfter),
		Authority: a.record.ID, Chain: a.hash, Bundle: s.prepared.trust.bundle.Sequence, Delivery: delivery, RequestID: requestID,
	}
}

func (s *Signed) issued(number uint64) *Issued {
	a := s.prepared.authority
	return &Issued{
		Number: number, Serial: s.serial, DER: s.der, Chain: append([]string{encodePEM(s.der)}, a.chainPEM...), Bundle: s.prepared.trust.bundle,
		NotBefore: s.notBefore, NotAfter: s.notAfter, ClampedFrom: s.prepared.asked, Authority: a.record.ID,
	}
}

// appendIssue appends an issue, and with it the confirmation of the certificate that its caller presented, if that is news.
func (c *CA) appendIssue(ctx context.Context, event *ledger.Issue, presented *Presented, signedUnder *trust) (number uint64, err error) {
	if presented != nil {
		state, err := c.ledger.IssueState(presented.Number)
		if err != nil {
			return 0, Unavailable(fmt.Errorf("reading issue %d from the ledger: %w", presented.Number, err))
		}
		if !state.Confirmed {
			confirm := &ledger.Confirm{Number: presented.Number, Serial: presented.Serial, How: MethodClientCertificate}
			first, err := c.ledger.Append(ctx, confirm, event)
			if err == nil {
				return first + 1, nil
			}
			if !errors.Is(err, ledger.ErrAlready) { // somebody else confirmed it in the meantime
				return 0, c.appendError(ctx, err, signedUnder)
			}
		}
	}
	number, err = c.ledger.Append(ctx, event)
	if err != nil {
		return 0, c.appendError(ctx, err, signedUnder)
	}
	return number, nil
}

// errOutdated says that the authority or the bundle changed between signing and recording, and that the change is taken up now.
var errOutdated = errors.New("what this was signed with is no longer in use")

// appendError says of which kind a refused append is.
func (c *CA) appendError(ctx context.Context, err error, signedUnder *trust) error {
	switch {
	case errors.Is(err, ledger.ErrTokenSpent), errors.Is(err, ledger.ErrTokenUnknown), errors.Is(err, ledger.ErrTokenExpired):
		return Unauthenticated(fmt.Errorf("the ledger refuses the join token: %w", err))
	case errors.Is(err, ledger.ErrRevoked), errors.Is(err, ledger.ErrSuperseded): // since it was verified
		return Unauthenticated(fmt.Errorf("the ledger refuses the client certificate: %w", err))
	case errors.Is(err, ledger.ErrNotActive), errors.Is(err, ledger.ErrBelowFloor):
		return Unavailable(errors.Join(fmt.Errorf("%w: %w", errOutdated, err), c.takeUp(ctx, signedUnder)))
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return Unavailable(fmt.Errorf("recording the certificate in the ledger: %w", err))
}

// takeUp makes sure that the trust is a newer one than stale. Of many callers that find it stale, the first reloads.
func (c *CA) takeUp(ctx context.Context, stale *trust) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	if c.trust.Load() != stale {
		return nil
	}
	return c.reload(ctx)
}

func hashText(text string) ledger.Hash { return sha256.Sum256([]byte(text)) }
