package ca

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// ClientCertificates decides whether a certificate that a caller presents proves who it is. Only issuing CAs are anchors, our
// own and those on a list: were it a root, anybody else's CA under the same root could mint callers.
//
// Its methods may be called at once from several goroutines.
type ClientCertificates struct {
	td      spiffeid.TrustDomain
	ledger  *ledger.Ledger
	now     func() time.Time
	issuers atomic.Pointer[clientIssuers]
	judged  sync.Map // *judged by weak.Pointer[x509.Certificate]: what was found of certificates that somebody still has in memory
}

// judged is what was found of a certificate and does not change while the same issuing CAs count: its form, its signature, and what the ledger recorded of it.
type judged struct {
	proven ClientCertificate // at no particular time
	under  *clientIssuers
	from   time.Time // from which on the certificate and its issuer are valid; they are until proven.Until (RFC 5280 4.1.2.5)
}

// clientIssuers are the CA certificates whose leaves may be callers, and the keys whose signatures prove nothing.
type clientIssuers struct {
	all     []clientIssuer
	tainted map[ledger.Hash]ledger.Hash // by key: the authority whose taint it is
}

// clientIssuer is a CA certificate whose leaves may be callers.
type clientIssuer struct {
	id       ledger.Hash
	key      ledger.Hash
	cert     *x509.Certificate
	anchor   *x509.CertPool // of cert alone
	own      bool
	coverage ledger.Coverage // what the ledger knows of its leaves; of an own one
}

// ClientCertificate is what a good certificate proves.
type ClientCertificate struct {
	ID     spiffeid.ID
	Proof  ledger.Proof
	First  *ledger.Proof // where its lineage began; nil when the ledger does not know
	Holder ledger.Holder // who holds it, and will hold its successor
	Number uint64        // of its Issue event; 0: the ledger has none
	Serial ledger.Serial
	Own    bool      // this CA issued it
	Until  time.Time // when it, or its issuer, expires

	token string // id of the join token that it was issued for; "": none
}

// Limits on what a caller may present.
const (
	maxClientChain   = 10   // certificates, as crypto/x509 has it for paths; beyond the leaf they are not looked at
	maxClientRSABits = 8192 // as crypto/tls has it
	maxSPIFFEID      = 2048 // octets (SPIFFE-ID 2.4)
)

// NewClientCertificates makes a verifier that knows no issuing CA yet.
func NewClientCertificates(td spiffeid.TrustDomain, book *ledger.Ledger, now func() time.Time) *ClientCertificates {
	c := &ClientCertificates{td: td, ledger: book, now: now}
	c.issuers.Store(&clientIssuers{})
	return c
}

// setAuthorities replaces the issuing CAs that count: own ones that are not removed, and others'. One that is both is our own. tainted are
// the keys that count for nothing, see taintedKeys. When all of it is as before, what was found of certificates holds on.
func (c *ClientCertificates) setAuthorities(own []*authority, others []*x509.Certificate, tainted map[ledger.Hash]ledger.Hash) {
	next := &clientIssuers{tainted: tainted}
	add := func(issuer clientIssuer) {
		if slices.ContainsFunc(next.all, func(there clientIssuer) bool { return there.id == issuer.id }) {
			return
		}
		issuer.key, issuer.anchor = keyID(issuer.cert), x509.NewCertPool()
		issuer.anchor.AddCert(issuer.cert)
		next.all = append(next.all, issuer)
	}
	for _, a := range own {
		add(clientIssuer{id: a.record.ID, cert: a.cert, own: true, coverage: a.record.Coverage})
	}
	for _, cert := range others {
		add(clientIssuer{id: AuthorityID(cert), cert: cert})
	}
	if c.issuers.Load().equal(next) { // only the trust bundle changed, and with thousands of streams to verify each certificate anew takes seconds
		return
	}
	c.issuers.Store(next)
}

// equal says whether both let the same callers in.
func (issuers *clientIssuers) equal(others *clientIssuers) bool {
	return maps.Equal(issuers.tainted, others.tainted) && slices.EqualFunc(issuers.all, others.all, func(a, b clientIssuer) bool {
		return a.id == b.id && a.own == b.own && a.coverage == b.coverage
	})
}

// taintedKeys finds the keys of tainted authorities, removed ones too, and of all authorities under a tainted root, each with the authority whose
// taint it is. The records are in order of entry: a root comes before what is under it.
func taintedKeys(records []ledger.AuthorityRecord) map[ledger.Hash]ledger.Hash {
	keys, tainted := map[ledger.Hash]ledger.Hash{}, map[ledger.Hash]bool{}
	for _, record := range records {
		switch {
		case record.Tainted:
			keys[record.Key], tainted[record.ID] = record.ID, true
		case tainted[record.Root]:
			keys[record.Key] = record.Root
		}
	}
	return keys
}

// Verify judges the certificate at this moment; errors are ErrUnauthenticated, or ErrUnavailable when the ledger cannot be read. Only the leaf
// counts: what a caller sends along is not looked at. That the caller has the leaf's key is for the TLS handshake to see to.
//
// Of a leaf that is the same variable as at an earlier call, as it is over the life of a TLS connection, the signature is not verified once more: what is
// looked at each time is what may have changed, the time, the issuing CAs that count, revocation and supersession.
func (c *ClientCertificates) Verify(ctx context.Context, chain []*x509.Certificate) (ClientCertificate, error) {
	if len(chain) == 0 || len(chain) > maxClientChain {
		return ClientCertificate{}, unproven(": there are %d certificates, and 1 to %d are looked at", len(chain), maxClientChain)
	}
	leaf, now := chain[0], c.now()
	found := c.recall(leaf, now)
	if found == nil {
		var err error
		if found, err = c.judge(ctx, leaf, now); err != nil {
			return ClientCertificate{}, err
		}
		c.remember(leaf, found)
	}
	if err := c.stands(found.proven); err != nil {
		return ClientCertificate{}, err
	}
	proven := found.proven
	proven.Proof.Time = ledger.At(now)
	return proven, nil
}

// recall finds what was found of a certificate before, if that still holds. It may be nil.
func (c *ClientCertificates) recall(leaf *x509.Certificate, now time.Time) *judged {
	value, ok := c.judged.Load(weak.Make(leaf))
	if !ok {
		return nil
	}
	found := value.(*judged)
	if found.under != c.issuers.Load() || now.Before(found.from) || now.After(found.proven.Until) {
		return nil
	}
	return found
}

// remember keeps what was found of a certificate for as long as somebody has it in memory.
func (c *ClientCertificates) remember(leaf *x509.Certificate, found *judged) {
	key := weak.Make(leaf)
	if _, there := c.judged.Swap(key, found); !there {
		runtime.AddCleanup(leaf, func(key weak.Pointer[x509.Certificate]) { c.judged.Delete(key) }, key)
	}
}

// judge looks at what does not change: form, signature, and what the ledger recorded.
func (c *ClientCertificates) judge(ctx context.Context, leaf *x509.Certificate, now time.Time) (*judged, error) {
	id, err := c.checkForm(leaf)
	if err != nil {
		return nil, unproven(" with serial %.130x: %w", leaf.SerialNumber, err)
	}
	serial, issuers := ledger.Serial(leaf.SerialNumber.Bytes()), c.issuers.Load()
	issuer, err := issuers.find(leaf, now)
	if err != nil {
		return nil, unproven(" %s of %s: %w", serial, id, err)
	}
	found := &judged{
		proven: ClientCertificate{
			ID: id, Serial: serial, Own: issuer.own,
			Proof:  ledger.Proof{Method: MethodClientCertificate, Issuer: issuer.id.String(), Subject: serial.String()},
			Holder: ledger.Holder{Kind: "lineage", ID: serial.String()},
			Until:  earlier(leaf.NotAfter, issuer.cert.NotAfter),
		},
		under: issuers, from: later(leaf.NotBefore, issuer.cert.NotBefore),
	}
	if issuer.own {
		err = c.lineage(ctx, leaf, &found.proven, issuers.know(issuer.key, ledger.At(leaf.NotBefore)))
	}
	return found, err
}

// stands looks at what may change: a certificate may be revoked or superseded at any moment.
func (c *ClientCertificates) stands(proven ClientCertificate) error {
	revoked, err := c.ledger.Revoked(proven.Serial)
	if err != nil {
		return Unavailable(fmt.Errorf("looking for a revocation of client certificate %s: %w", proven.Serial, err))
	}
	if revoked {
		return unproven(" %s of %s is revoked", proven.Serial, proven.ID)
	}
	if proven.Number == 0 {
		return nil // the ledger has no record of it
	}
	state, err := c.ledger.IssueState(proven.Number)
	if err != nil {
		return Unavailable(fmt.Errorf("looking up whether client certificate %s is superseded: %w", proven.Serial, err))
	}
	if state.Superseded {
		return superseded(proven)
	}
	return nil
}

func unproven(format string, args ...any) error {
	return Unauthenticated(fmt.Errorf("client certificate"+format, args...))
}

// issuedBackdate is about how far before its signing a certificate's notBefore lies: a hint for the search in the ledger.
const issuedBackdate = time.Minute

// lineage adds what the ledger knows of a certificate that one of our issuing CAs signed. must says that it knows of every one: what it does not know
// of then was not issued here. An unexpired certificate is never pruned.
func (c *ClientCertificates) lineage(ctx context.Context, leaf *x509.Certificate, proven *ClientCertificate, must bool) error {
	backdate := min(issuedBackdate, leaf.NotAfter.Sub(leaf.NotBefore)/11) // it is a tenth of what comes after it at most, see Profile.Backdate
	event, err := c.ledger.FindIssue(ctx, proven.Serial, leaf.NotBefore.Add(backdate))
	if errors.Is(err, ledger.ErrNotFound) && must {
		return unproven(" %s of %s is not in the ledger, which has every certificate of the issuing CA %s: "+
			"somebody else signs with its key, or the data folder was put back to an earlier state. Find out which; a stolen key is for 'kedge authority taint'",
			proven.Serial, proven.ID, proven.Proof.Issuer)
	}
	if errors.Is(err, ledger.ErrNotFound) {
		return nil // of a time, or of somebody, that the ledger knows nothing of
	}
	if err != nil {
		return Unavailable(fmt.Errorf("looking client certificate %s up in the ledger: %w", proven.Serial, err))
	}
	issue, ok := event.Body.(*ledger.Issue)
	if !ok || issue.Certificate != sha256.Sum256(leaf.Raw) {
		return unproven(" %s of %s is not the one that number %d in the ledger records under this serial: "+
			"somebody else signs with the key of an issuing CA; find out who, and replace that CA", proven.Serial, proven.ID, event.Number)
	}
	proven.Number, proven.Holder, proven.First, proven.token = event.Number, issue.Holder, issue.FirstProof, issue.Token
	proven.Proof.Issuer = issue.Authority.String() // of several with one key and name, the one that it was
	// Without a FirstProof the lineage began with this issue, unless that itself was for a certificate of which nothing was known.
	if proven.First == nil && len(issue.Proofs) > 0 && issue.Proofs[0].Method != MethodClientCertificate {
		proven.First = &issue.Proofs[0]
	}
	return nil
}

// superseded is the refusal of a certificate whose single-use join token was redeemed again. A machine redeems it again when it did not get the response: who
// shows that certificate all the same is somebody else, or somebody else redeemed the token.
func superseded(c ClientCertificate) error {
	return unproven(" %s of %s, number %d in the ledger, is superseded: its join token %q was redeemed again, as by a machine "+
		"that never got it. But somebody has it, so two parties used one token. 'kedge ledger list --type issue --spiffe-id %s' shows what they got and 'kedge ledger show' "+
		"from where; revoke what a stranger has with 'kedge svid revoke --lineage': %w", c.Serial, c.ID, c.Number, c.token, c.ID, ledger.ErrSuperseded)
}

// checkForm checks that a certificate is an X.509-SVID leaf (X509-SVID 2, 4 and 5.2) for client authentication, and of our trust domain.
// Time and signature are for findIssuer.
func (c *ClientCertificates) checkForm(leaf *x509.Certificate) (id spiffeid.ID, err error) {
	if key, ok := leaf.PublicKey.(*rsa.PublicKey); ok && (key.N.BitLen() < minRSABits || key.N.BitLen() > maxClientRSABits) {
		return id, fmt.Errorf("its key is RSA of %d bits, and %d to %d are allowed", key.N.BitLen(), minRSABits, maxClientRSABits)
	}
	switch {
	case leaf.SerialNumber.Sign() <= 0:
		return id, errors.New("its serial number is not positive (RFC 5280 4.1.2.2)")
	case leaf.IsCA:
		return id, errors.New("it is a CA certificate, and a leaf's cA is false (X509-SVID 4.1)")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return id, errors.New("its keyUsage lacks digitalSignature, or has keyCertSign or cRLSign (X509-SVID 4.3)")
	case !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth):
		return id, errors.New("its extKeyUsage lacks clientAuth (X509-SVID 4.4)")
	case len(leaf.URIs) != 1:
		return id, fmt.Errorf("it has %d URI SANs, and an SVID has exactly one (X509-SVID 2)", len(leaf.URIs))
	}
	text := leaf.URIs[0].String()
	if len(text) > maxSPIFFEID {
		return id, fmt.Errorf("its URI SAN has %d octets, and a SPIFFE ID has at most %d (SPIFFE-ID 2.4)", len(text), maxSPIFFEID)
	}
	if id, err = spiffeid.FromString(text); err != nil {
		return spiffeid.ID{}, fmt.Errorf("its URI SAN %.100q is not a SPIFFE ID: %w", text, err)
	}
	if !id.MemberOf(c.td) || id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("its SPIFFE ID %s is not that of a workload of the trust domain %s", id, c.td)
	}
	return id, nil
}

// find finds the issuing CA that signed the leaf itself. When its key is tainted the leaf is refused: nobody can tell who made it.
func (issuers *clientIssuers) find(leaf *x509.Certificate, now time.Time) (*clientIssuer, error) {
	why := fmt.Errorf("its issuer %.200q is none of the issuing CAs that count", leaf.Issuer.String())
	for i := range issuers.all {
		issuer := &issuers.all[i]
		if !bytes.Equal(issuer.cert.RawSubject, leaf.RawIssuer) {
			continue
		}
		// With one anchor and no intermediates the path is the leaf and the anchor. Both must be valid now, and the anchor's
		// constraints on names and usages hold (RFC 5280 6.1).
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: issuer.anchor, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
			why = fmt.Errorf("it does not verify under the issuing CA %s: %w", issuer.id, err)
			continue
		}
		if by, tainted := issuers.tainted[issuer.key]; tainted {
			if by == issuer.id {
				return nil, fmt.Errorf("the issuing CA %s that signed it is tainted", by)
			}
			return nil, fmt.Errorf("the key that signed it is that of the issuing CA %s, and the authority %s is tainted", issuer.id, by)
		}
		return issuer, nil // our own come first
	}
	return nil, why
}

// know says whether the ledger knows every certificate that was signed with a key at that time: under each of our issuing CAs that have it.
func (issuers *clientIssuers) know(key ledger.Hash, signed ledger.Time) bool {
	for _, issuer := range issuers.all {
		if issuer.key == key && issuer.own && !issuer.coverage.Knows(signed) {
			return false
		}
	}
	return true
}
