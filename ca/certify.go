package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// What a Root whose key is a crypto.Signer needs: the certificates of roots and issuing CAs, as this CA wants them.

const caOrganization = "Kedge"

// SignRoot makes the self-signed certificate of a new root, which allows an issuing CA below it and nothing below that.
func SignRoot(td spiffeid.TrustDomain, key crypto.Signer, notBefore, notAfter time.Time) (*x509.Certificate, error) {
	if err := CheckAuthorityKey(key.Public()); err != nil {
		return nil, fmt.Errorf("its public key: %w", err)
	}
	template, err := authorityTemplate(key.Public(), td)
	if err != nil {
		return nil, err
	}
	template.Subject.CommonName = rootName(td, template.SubjectKeyId)
	template.NotBefore, template.NotAfter = notBefore.UTC(), notAfter.UTC()
	template.MaxPathLen = 1 // root → issuing CA → leaf
	return signAuthority(template, template, key.Public(), key)
}

// CheckAuthorityKey allows the public keys that CAs have here: P-256, P-384, and RSA of 2048 to 4096 bits.
func CheckAuthorityKey(pub crypto.PublicKey) error {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P256() || pub.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("its curve is %s: a CA's key is on P-256 or P-384", pub.Curve.Params().Name)
	case *rsa.PublicKey:
		if bits := pub.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return fmt.Errorf("it is an RSA key of %d bits: a CA's has %d to %d", bits, minRSABits, maxRSABits)
		}
		return nil
	case nil:
		return errors.New("there is none")
	}
	return fmt.Errorf("it is a %T: a CA's key is RSA or ECDSA", pub)
}

// signAuthority signs, and reads back what it signed. x509.CreateCertificate makes sure that the key is the issuer's and that the signature is good.
func signAuthority(template, issuer *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, pub, key)
	if err != nil {
		return nil, fmt.Errorf("signing its certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading its certificate back: %w", err)
	}
	return cert, nil
}

// authorityTemplate is what root and issuing certificates have in common (RFC 5280 4.2.1, X509-SVID 3.1 and 4).
func authorityTemplate(pub crypto.PublicKey, td spiffeid.TrustDomain) (*x509.Certificate, error) {
	keyID, err := SubjectKeyID(pub)
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber:          authoritySerial(),
		Subject:               pkix.Name{Organization: []string{caOrganization}},
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          keyID,
		URIs:                  []*url.URL{td.ID().URL()},
	}, nil
}

// authoritySerial is positive, random and of 20 octets (RFC 5280 4.1.2.2).
func authoritySerial() *big.Int {
	octets := make([]byte, 20)
	rand.Read(octets) // never fails: the process ends first
	octets[0] = octets[0]&0x7f | 0x40
	return new(big.Int).SetBytes(octets)
}

// SubjectKeyID is the leftmost 160 bits of the SHA-256 of the public key's bits (RFC 7093 2, method 1).
func SubjectKeyID(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("encoding its public key: %w", err)
	}
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		PublicKey asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &info); err != nil {
		return nil, fmt.Errorf("taking its public key apart: %w", err)
	}
	sum := sha256.Sum256(info.PublicKey.Bytes)
	return sum[:20], nil
}

// rootName tells roots of one trust domain apart, for people and for verifiers that find issuers by name.
func rootName(td spiffeid.TrustDomain, keyID []byte) string {
	name := fmt.Sprintf("%s root %x", td.Name(), keyID[:4])
	if len(name) > maxCommonName {
		name = fmt.Sprintf("Kedge root %x", keyID[:4])
	}
	return name
}
