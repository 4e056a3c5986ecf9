package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"kedge/ca/ledger"
)

// leaf is what differs from one SVID to the next. Everything else about it is its issuing CA's: see leafMaker.
type leaf struct {
	serial              ledger.Serial
	uri                 string // the SPIFFE ID
	pub                 crypto.PublicKey
	spki                []byte // of pub: its SubjectPublicKeyInfo in DER, as x509.MarshalPKIXPublicKey writes it
	notBefore, notAfter time.Time
}

// leafMaker makes the leaves of one issuing CA (X509-SVID 4; RFC 5280 4.1). It writes what x509.CreateCertificate would, to the octet, and differs in one
// thing: a signature by a key that is in this process is not verified again, which would cost more than to make it. A signature that comes from
// elsewhere is.
type leafMaker struct {
	key       crypto.Signer
	issuer    *x509.Certificate
	scheme    x509.SignatureAlgorithm
	hash      crypto.Hash
	algorithm []byte // AlgorithmIdentifier
	fixed     []byte // extensions of every leaf but keyUsage: extKeyUsage, basicConstraints, authorityKeyIdentifier
	verified  bool   // the key is in this process, or verifies itself what its token signed
}

var (
	oidSHA256WithRSA   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11} // RFC 4055 5
	oidECDSAWithSHA256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}   // RFC 5758 3.2
	oidECDSAWithSHA384 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}

	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15} // RFC 5280 4.2.1
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidAuthorityKeyID   = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidServerAuth       = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1} // RFC 5280 4.2.1.12
	oidClientAuth       = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
)

// newLeafMaker prepares what the leaves of an issuing CA have in common.
func newLeafMaker(issuer *x509.Certificate, key crypto.Signer) (*leafMaker, error) {
	m := &leafMaker{key: key, issuer: issuer, scheme: x509.ECDSAWithSHA256, hash: crypto.SHA256}
	algorithm := pkix.AlgorithmIdentifier{Algorithm: oidECDSAWithSHA256}
	switch pub := issuer.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P384() {
			algorithm.Algorithm, m.scheme, m.hash = oidECDSAWithSHA384, x509.ECDSAWithSHA384, crypto.SHA384
		} else if pub.Curve != elliptic.P256() {
			return nil, fmt.Errorf("an issuing CA with the key %s cannot sign leaves: P-256, P-384 and RSA can", KeyType(pub))
		}
	case *rsa.PublicKey:
		algorithm = pkix.AlgorithmIdentifier{Algorithm: oidSHA256WithRSA, Parameters: asn1.NullRawValue}
		m.scheme = x509.SHA256WithRSA
	default:
		return nil, fmt.Errorf("an issuing CA with the key %s cannot sign leaves: P-256, P-384 and RSA can", KeyType(pub))
	}
	switch key := key.(type) {
	case *ecdsa.PrivateKey, *rsa.PrivateKey:
		m.verified = true
	case interface{ VerifiesSignatures() bool }:
		m.verified = key.VerifiesSignatures()
	}
	var err error
	if m.algorithm, err = asn1.Marshal(algorithm); err != nil {
		return nil, fmt.Errorf("encoding the signature algorithm: %w", err)
	}
	usages, err := asn1.Marshal([]asn1.ObjectIdentifier{oidServerAuth, oidClientAuth})
	if err != nil {
		return nil, fmt.Errorf("encoding the extended key usages: %w", err)
	}
	keyID, err := asn1.Marshal(struct {
		ID []byte `asn1:"optional,tag:0"`
	}{issuer.SubjectKeyId})
	if err != nil {
		return nil, fmt.Errorf("encoding the authority key identifier: %w", err)
	}
	var fixed cryptobyte.Builder
	addExtension(&fixed, oidExtKeyUsage, false, usages)
	addExtension(&fixed, oidBasicConstraints, true, []byte{0x30, 0}) // cA is false by default
	if len(issuer.SubjectKeyId) > 0 {                                // one that others made may have none
		addExtension(&fixed, oidAuthorityKeyID, false, keyID)
	}
	if m.fixed, err = fixed.Bytes(); err != nil {
		return nil, fmt.Errorf("encoding the extensions of leaves: %w", err)
	}
	return m, nil
}

func addExtension(b *cryptobyte.Builder, id asn1.ObjectIdentifier, critical bool, value []byte) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(id)
		if critical {
			b.AddASN1Boolean(true)
		}
		b.AddASN1OctetString(value)
	})
}

// keyUsage of a leaf: digitalSignature, and keyEncipherment for RSA keys only (X509-SVID 4.3, RFC 5280 4.2.1.3).
func keyUsage(pub crypto.PublicKey) []byte {
	if isRSA(pub) {
		return []byte{0x03, 2, 5, 0xa0}
	}
	return []byte{0x03, 2, 7, 0x80}
}

// sign makes the certificate of a leaf, in DER.
func (m *leafMaker) sign(l leaf) ([]byte, error) {
	tbs, err := m.encode(l)
	if err != nil {
		return nil, fmt.Errorf("encoding the certificate: %w", err)
	}
	digest := m.hash.New()
	digest.Write(tbs)
	signature, err := m.key.Sign(rand.Reader, digest.Sum(nil), m.hash)
	if err != nil {
		return nil, err
	}
	if !m.verified {
		if err := m.issuer.CheckSignature(m.scheme, tbs, signature); err != nil {
			return nil, fmt.Errorf("the key's signature is not good: %w", err)
		}
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+len(signature)+len(m.algorithm)+16))
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(m.algorithm)
		b.AddASN1BitString(signature)
	})
	return b.Bytes()
}

// encode writes the TBSCertificate (RFC 5280 4.1): an empty subject, and so a critical subjectAltName (4.2.1.6).
func (m *leafMaker) encode(l leaf) ([]byte, error) {
	if !ascii(l.uri) {
		return nil, errors.New("the SPIFFE ID is not ASCII")
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, 512+len(l.spki)+len(l.uri)))
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.Tag(0).Constructed().ContextSpecific(), func(b *cryptobyte.Builder) { b.AddASN1Int64(2) }) // version 3
		b.AddASN1(cbasn1.INTEGER, func(b *cryptobyte.Builder) { b.AddBytes(l.serial) })
		b.AddBytes(m.algorithm)
		b.AddBytes(m.issuer.RawSubject)
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			addTime(b, l.notBefore)
			addTime(b, l.notAfter)
		})
		b.AddASN1(cbasn1.SEQUENCE, func(*cryptobyte.Builder) {})
		b.AddBytes(l.spki)
		b.AddASN1(cbasn1.Tag(3).Constructed().ContextSpecific(), func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				addExtension(b, oidKeyUsage, true, keyUsage(l.pub))
				b.AddBytes(m.fixed)
				b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1ObjectIdentifier(oidSubjectAltName)
					b.AddASN1Boolean(true)
					b.AddASN1(cbasn1.OCTET_STRING, func(b *cryptobyte.Builder) {
						b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
							b.AddASN1(cbasn1.Tag(6).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(l.uri)) })
						})
					})
				})
			})
		})
	})
	return b.Bytes()
}

// addTime writes UTCTime up to 2049, and GeneralizedTime from then on (RFC 5280 4.1.2.5).
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t = t.UTC(); t.Year() < 2050 {
		b.AddASN1UTCTime(t)
	} else {
		b.AddASN1GeneralizedTime(t)
	}
}

func ascii(text string) bool {
	for i := range len(text) {
		if text[i] >= 0x80 {
			return false
		}
	}
	return true
}
