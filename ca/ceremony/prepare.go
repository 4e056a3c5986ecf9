package ceremony

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
)

// Prepared is what will be signed.
type Prepared struct {
	Plan   *Plan
	TBS    []byte            // TBSCertificate or TBSCertList (RFC 5280 4.1, 5.1), in DER
	Open   bool              // the key is still to be made: another one stands in TBS for it
	Issuer *x509.Certificate // of the key that signs; nil for a root
	Inputs []Input           // files that the plan names

	template  *x509.Certificate
	list      *x509.RevocationList
	subject   crypto.PublicKey // that is certified
	signer    crypto.PublicKey // that signs
	rehearsed rehearsed
}

// Input is a file that a plan names, as it was read.
type Input struct {
	Key    string `json:"key"` // of the plan
	File   string `json:"file"`
	SHA256 string `json:"sha256"`
}

// rehearsed is a certificate or a CRL, whichever a plan makes, with a signature of no worth.
type rehearsed struct {
	cert *x509.Certificate
	list *x509.RevocationList
}

// shortestSerial is how many bits a new serial number has at least.
const shortestSerial = 64

// Prepare makes what will be signed with the key whose public half is signer, and lints it. All of it follows from the plan, the files that it names and the key. For a root whose key is
// still to be made signer is nil: then a key that is thrown away stands in for it.
func (p *Plan) Prepare(signer crypto.PublicKey, now time.Time) (*Prepared, error) {
	r := &Prepared{Plan: p, signer: signer}
	if signer == nil {
		standIn, err := ca.GenerateKey(p.Key.Create)
		if err != nil {
			return nil, fmt.Errorf("key.create: %w", err)
		}
		r.signer, r.Open = standIn.Public(), true
	}
	if p.Issuer != "" {
		issuer, err := r.certificate("issuer", p.Issuer)
		if err != nil {
			return nil, err
		}
		if !ca.SameKey(issuer.PublicKey, signer) {
			return nil, fmt.Errorf("the key on the token is not that of issuer %s (%s): name the certificate that belongs to the key", p.Issuer, issuer.Subject)
		}
		r.Issuer = issuer
	}
	var err error
	if p.Make == MakeCRL {
		err = r.prepareCRL(now)
	} else {
		err = r.prepareCertificate(now)
	}
	if err != nil {
		return nil, err
	}
	if err := r.rehearse(); err != nil {
		return nil, err
	}
	return r, nil
}

// Digest is the SHA-256 of what will be signed, by which two people can make sure that they speak of the same.
func (r *Prepared) Digest() [32]byte { return sha256.Sum256(r.TBS) }

func (r *Prepared) certificate(key, name string) (*x509.Certificate, error) {
	block, err := r.block(key, name, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(block)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", key, name, err)
	}
	return cert, nil
}

// block reads the first PEM block of a file, which is of that type.
func (r *Prepared) block(key, name, kind string) ([]byte, error) {
	path := r.Plan.path(name)
	text, err := readFile(path, maxInput)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", key, err)
	}
	r.Inputs = append(r.Inputs, Input{key, path, sum(text)})
	block, _ := pem.Decode(text)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s %s does not begin with a PEM block %s", key, name, kind)
	}
	return block.Bytes, nil
}

func (r *Prepared) prepareCertificate(now time.Time) error {
	p := r.Plan
	serial, err := parseSerial("serial", p.Serial, shortestSerial)
	if err != nil {
		return err
	}
	from, err := parseTime("notBefore", p.NotBefore)
	if err != nil {
		return err
	}
	until, err := parseTime("notAfter", p.NotAfter)
	if err != nil {
		return err
	}
	if !from.Before(until) || !now.Before(until) {
		return fmt.Errorf("notAfter %s is not after notBefore %s and after now", p.NotAfter, p.NotBefore)
	}
	t := &x509.Certificate{SerialNumber: serial, Subject: p.Subject.name(), NotBefore: from, NotAfter: until, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true, IsCA: true}
	length := 0
	if p.Make == MakeRoot {
		length = 1
	}
	if p.PathLength != nil {
		length = *p.PathLength
	}
	t.MaxPathLen, t.MaxPathLenZero = length, length == 0
	if p.TrustDomain != "" {
		td, err := spiffeid.TrustDomainFromString(p.TrustDomain)
		if err != nil {
			return fmt.Errorf("trustDomain: %w", err)
		}
		t.URIs = append(t.URIs, td.ID().URL())
	}
	r.template, r.subject = t, r.signer
	if p.Make == MakeIntermediate {
		if err := r.underIssuer(); err != nil {
			return err
		}
	}
	if err := ca.CheckAuthorityKey(r.subject); err != nil {
		return fmt.Errorf("the public key: %w", err)
	}
	if t.SubjectKeyId, err = ca.SubjectKeyID(r.subject); err == nil && p.Make == MakeRoot {
		t.AuthorityKeyId = t.SubjectKeyId // its own (RFC 5280 4.2.1.1 lets it out, and nobody minds it)
	}
	return err
}

// underIssuer takes the public key from the CSR, and makes sure that what is signed fits under its issuer (I3, RFC 5280 6.1).
func (r *Prepared) underIssuer() error {
	der, err := r.block("csr", r.Plan.CSR, "CERTIFICATE REQUEST")
	if err != nil {
		return err
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return fmt.Errorf("csr %s: %w", r.Plan.CSR, err)
	}
	if err := csr.CheckSignature(); err != nil {
		return fmt.Errorf("csr %s: whoever made it does not have its key: %w", r.Plan.CSR, err)
	}
	r.subject = csr.PublicKey
	t, issuer := r.template, r.Issuer
	switch {
	case !issuer.IsCA || issuer.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("issuer %s may not sign certificates", issuer.Subject)
	case t.NotAfter.After(issuer.NotAfter) || t.NotBefore.Before(issuer.NotBefore):
		return fmt.Errorf("the validity from %s to %s is not within the issuer's, from %s to %s", r.Plan.NotBefore, r.Plan.NotAfter, issuer.NotBefore.Format(time.RFC3339),
			issuer.NotAfter.Format(time.RFC3339))
	case issuer.MaxPathLen == 0 && issuer.MaxPathLenZero:
		return fmt.Errorf("issuer %s has the path length constraint 0: no CA can be under it", issuer.Subject)
	case issuer.MaxPathLen > 0 && t.MaxPathLen >= issuer.MaxPathLen:
		return fmt.Errorf("pathLength %d is not less than the issuer's %d", t.MaxPathLen, issuer.MaxPathLen)
	case t.Subject.String() == issuer.Subject.String():
		return errors.New("subject is the issuer's own: verifiers would take the certificate for self-issued (RFC 5280 4.2.1.1)")
	case ca.SameKey(r.subject, issuer.PublicKey):
		return fmt.Errorf("csr %s has the key of the issuer itself", r.Plan.CSR)
	}
	return nil
}

func (s Subject) name() pkix.Name {
	n := pkix.Name{CommonName: s.CommonName}
	for _, part := range []struct {
		text string
		into *[]string
	}{{s.Organization, &n.Organization}, {s.OrganizationalUnit, &n.OrganizationalUnit}, {s.Country, &n.Country}} {
		if part.text != "" {
			*part.into = []string{part.text}
		}
	}
	return n
}

func (r *Prepared) prepareCRL(now time.Time) error {
	c := r.Plan.CRL
	number, ok := new(big.Int).SetString(c.Number, 10)
	if !ok || number.Sign() < 0 || number.BitLen() > 159 {
		return fmt.Errorf("crl.number %q is not a number (RFC 5280 5.2.3)", c.Number)
	}
	from, err := parseTime("crl.thisUpdate", c.ThisUpdate)
	if err != nil {
		return err
	}
	until, err := parseTime("crl.nextUpdate", c.NextUpdate)
	if err != nil {
		return err
	}
	if !from.Before(until) || !now.Before(until) {
		return fmt.Errorf("crl.nextUpdate %s is not after thisUpdate %s and after now", c.NextUpdate, c.ThisUpdate)
	}
	if r.Issuer.KeyUsage&x509.KeyUsageCRLSign == 0 {
		return fmt.Errorf("issuer %s may not sign CRLs (its keyUsage lacks cRLSign)", r.Issuer.Subject)
	}
	r.list = &x509.RevocationList{Number: number, ThisUpdate: from, NextUpdate: until}
	listed := map[string]bool{}
	for i, revoked := range c.Revoked {
		where := fmt.Sprintf("crl.revoked[%d].", i)
		serial, err := parseSerial(where+"serial", revoked.Serial, 0)
		if err != nil {
			return err
		}
		at, err := parseTime(where+"at", revoked.At)
		if err != nil {
			return err
		}
		if at.After(from) {
			return fmt.Errorf("%sat %s is after thisUpdate %s", where, revoked.At, c.ThisUpdate)
		}
		if revoked.Reason < 0 || revoked.Reason > 10 || revoked.Reason == 7 || revoked.Reason == 8 { // 8 is for delta CRLs
			return fmt.Errorf("%sreason %d is none that RFC 5280 5.3.1 has for a CRL that is whole", where, revoked.Reason)
		}
		if listed[serial.String()] {
			return fmt.Errorf("%sserial %s is there twice", where, revoked.Serial)
		}
		listed[serial.String()] = true
		r.list.RevokedCertificateEntries = append(r.list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: serial, RevocationTime: at, ReasonCode: revoked.Reason})
	}
	return r.after(listed)
}

// after makes sure that a CRL goes on from the one before: its number is greater, and it takes back nothing (RFC 5280 3.3).
func (r *Prepared) after(listed map[string]bool) error {
	name := r.Plan.CRL.Before
	if name == "" {
		return nil
	}
	der, err := r.block("crl.before", name, "X509 CRL")
	if err != nil {
		return err
	}
	before, err := x509.ParseRevocationList(der)
	if err != nil {
		return fmt.Errorf("crl.before %s: %w", name, err)
	}
	if err := before.CheckSignatureFrom(r.Issuer); err != nil {
		return fmt.Errorf("crl.before %s is not of the issuer %s: %w", name, r.Issuer.Subject, err)
	}
	if before.Number != nil && r.list.Number.Cmp(before.Number) <= 0 {
		return fmt.Errorf("crl.number %s is not greater than that of the CRL before, %s", r.list.Number, before.Number)
	}
	for _, entry := range before.RevokedCertificateEntries {
		if !listed[entry.SerialNumber.String()] {
			return fmt.Errorf("the CRL before has revoked the serial %x, and crl.revoked lacks it: a revocation is not taken back", entry.SerialNumber)
		}
	}
	return nil
}

// rehearse makes what will be signed with a throwaway key in the place of the real one, and lints it.
func (r *Prepared) rehearse() error {
	key, err := throwaway(r.signer)
	if err != nil {
		return err
	}
	der, err := r.sign(key, true)
	if err != nil {
		return err
	}
	if r.list != nil {
		if r.rehearsed.list, err = x509.ParseRevocationList(der); err != nil {
			return fmt.Errorf("reading back the CRL: %w", err)
		}
		r.TBS, err = r.rehearsed.list.RawTBSRevocationList, ca.LintCRL(der)
	} else {
		if r.rehearsed.cert, err = x509.ParseCertificate(der); err != nil {
			return fmt.Errorf("reading back the certificate: %w", err)
		}
		r.TBS, err = r.rehearsed.cert.RawTBSCertificate, ca.Lint(der)
	}
	if err != nil {
		return fmt.Errorf("what would be signed is not as RFC 5280 has it: %w", err)
	}
	return nil
}

// throwaway makes a key that signs with the same algorithm.
func throwaway(like crypto.PublicKey) (crypto.Signer, error) {
	switch like := like.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.GenerateKey(like.Curve, rand.Reader)
	case *rsa.PublicKey:
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return nil, fmt.Errorf("the key on the token is a %T: a CA's key is RSA or ECDSA", like)
}

// sign makes the certificate or the CRL. In a rehearsal the key is not the issuer's, and x509 is not to notice.
func (r *Prepared) sign(key crypto.Signer, rehearsal bool) ([]byte, error) {
	if r.list != nil {
		issuer := *r.Issuer
		list := *r.list
		list.SignatureAlgorithm = algorithm(r.signer)
		der, err := x509.CreateRevocationList(rand.Reader, &list, &issuer, key)
		if err != nil {
			return nil, fmt.Errorf("signing the CRL: %w", err)
		}
		return der, nil
	}
	template := *r.template
	template.SignatureAlgorithm = algorithm(r.signer)
	parent := template
	if r.Issuer != nil {
		parent = *r.Issuer
	}
	if rehearsal {
		parent.PublicKey = nil
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &parent, r.subject, key)
	if err != nil {
		return nil, fmt.Errorf("signing the certificate: %w", err)
	}
	return der, nil
}

// algorithm is what a key signs with: its curve's hash, and SHA-256 or, for long RSA keys, SHA-384.
func algorithm(pub crypto.PublicKey) x509.SignatureAlgorithm {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P384() {
			return x509.ECDSAWithSHA384
		}
		return x509.ECDSAWithSHA256
	case *rsa.PublicKey:
		if pub.N.BitLen() > 3072 {
			return x509.SHA384WithRSA
		}
	}
	return x509.SHA256WithRSA
}
