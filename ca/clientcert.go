package ca

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

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
	Own    bool // this CA issued it
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
// the keys that count for nothing, see taintedKeys.
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
	c.issuers.Store(next)
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
func (c *ClientCertificates) Verify(ctx context.Context, chain []*x509.Certificate) (ClientCertificate, error) {
	refuse := func(format string, args ...any) (ClientCertificate, error) {
		return ClientCertificate{}, Unauthenticated(fmt.Errorf("client certificate"+format, args...))
	}
	if len(chain) == 0 || len(chain) > maxClientChain {
		return refuse(": there are %d certificates, and 1 to %d are looked at", len(chain), maxClientChain)
	}
	leaf := chain[0]
	id, err := c.checkForm(leaf)
	if err != nil {
		return refuse(" with serial %.130x: %w", leaf.SerialNumber, err)
	}
	serial, now, issuers := ledger.Serial(leaf.SerialNumber.Bytes()), c.now(), c.issuers.Load()
	issuer, err := issuers.find(leaf, now)
	if err != nil {
		return refuse(" %s of %s: %w", serial, id, err)
	}
	revoked, err := c.ledger.Revoked(serial)
	if err != nil {
		return ClientCertificate{}, Unavailable(fmt.Errorf("looking for a revocation of client certificate %s: %w", serial, err))
	}
	if revoked {
		return refuse(" %s of %s is revoked", serial, id)
	}
	proven := ClientCertificate{
		ID: id, Serial: serial, Own: issuer.own,
		Proof:  ledger.Proof{Method: MethodClientCertificate, Issuer: issuer.id.String(), Subject: serial.String(), Time: ledger.At(now)},
		Holder: ledger.Holder{Kind: "lineage", ID: serial.String()},
	}
	if !issuer.own {
		return proven, nil
	}
	return c.lineage(ctx, leaf, proven, issuers.know(issuer.key, ledger.At(leaf.NotBefore)))
}

// issuedBackdate is about how far before its signing a certificate's notBefore lies: a hint for the search in the ledger.
const issuedBackdate = time.Minute

// lineage adds what the ledger knows of a certificate that one of our issuing CAs signed. must says that it knows of every one: what it does not know
// of then was not issued here. An unexpired certificate is never pruned.
func (c *ClientCertificates) lineage(ctx context.Context, leaf *x509.Certificate, proven ClientCertificate, must bool) (ClientCertificate, error) {
	backdate := min(issuedBackdate, leaf.NotAfter.Sub(leaf.NotBefore)/11) // it is a tenth of what comes after it at most, see Profile.Backdate
	event, err := c.ledger.FindIssue(ctx, proven.Serial, leaf.NotBefore.Add(backdate))
	if errors.Is(err, ledger.ErrNotFound) && must {
		return ClientCertificate{}, Unauthenticated(fmt.Errorf("client certificate %s of %s is not in the ledger, which has every certificate of the issuing CA %s: "+
			"somebody else signs with its key, or the data folder was put back to an earlier state. Find out which; a stolen key is for 'kedge authority taint'",
			proven.Serial, proven.ID, proven.Proof.Issuer))
	}
	if errors.Is(err, ledger.ErrNotFound) {
		return proven, nil // of a time, or of somebody, that the ledger knows nothing of
	}
	if err != nil {
		return ClientCertificate{}, Unavailable(fmt.Errorf("looking client certificate %s up in the ledger: %w", proven.Serial, err))
	}
	issue, ok := event.Body.(*ledger.Issue)
	if !ok || issue.Certificate != sha256.Sum256(leaf.Raw) {
		return ClientCertificate{}, Unauthenticated(fmt.Errorf("client certificate %s of %s is not the one that number %d in the ledger records under this serial: "+
			"somebody else signs with the key of an issuing CA; find out who, and replace that CA", proven.Serial, proven.ID, event.Number))
	}
	state, err := c.ledger.IssueState(event.Number)
	if err != nil {
		return ClientCertificate{}, Unavailable(fmt.Errorf("looking up whether client certificate %s is superseded: %w", proven.Serial, err))
	}
	if state.Superseded {
		return ClientCertificate{}, superseded(proven.Serial, proven.ID.String(), event.Number, issue.Token)
	}
	proven.Number, proven.Holder, proven.First = event.Number, issue.Holder, issue.FirstProof
	proven.Proof.Issuer = issue.Authority.String() // of several with one key and name, the one that it was
	// Without a FirstProof the lineage began with this issue, unless that itself was for a certificate of which nothing was known.
	if proven.First == nil && len(issue.Proofs) > 0 && issue.Proofs[0].Method != MethodClientCertificate {
		proven.First = &issue.Proofs[0]
	}
	return proven, nil
}

// superseded is the refusal of a certificate whose single-use join token was redeemed again. A machine redeems it again when it did not get the response: who
// shows that certificate all the same is somebody else, or somebody else redeemed the token.
func superseded(serial ledger.Serial, id string, number uint64, token string) error {
	return Unauthenticated(fmt.Errorf("client certificate %s of %s, number %d in the ledger, is superseded: its join token %q was redeemed again, as by a machine "+
		"that never got it. But somebody has it, so two parties used one token. 'kedge ledger list --type issue --spiffe-id %s' shows what they got and 'kedge ledger show' "+
		"from where; revoke what a stranger has with 'kedge svid revoke --lineage': %w", serial, id, number, token, id, ledger.ErrSuperseded))
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
