package ca

import (
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

// MaxCSR is the largest CSR that is read, in octets of PEM. An RSA-4096 one has about 1,700.
const MaxCSR = 16 << 10

// parseCSR reads exactly one PEM block with a PKCS#10 request. Only its public key is ever used (I4): names,
// extensions and attributes are not looked at, however hostile. allow judges the key before its signature is verified,
// since that may be dear. spki is the key in DER, as it will stand in the certificate: as x509.MarshalPKIXPublicKey writes it, however the CSR does.
func parseCSR(text []byte, allow func(crypto.PublicKey) error) (pub crypto.PublicKey, spki []byte, err error) {
	csr, err := decodeCSR(text)
	if err != nil {
		return nil, nil, badCSR(fmt.Errorf("the CSR %w", err))
	}
	if err := allow(csr.PublicKey); err != nil {
		return nil, nil, badCSR(fmt.Errorf("the CSR's key is not allowed: %w", err))
	}
	switch csr.SignatureAlgorithm {
	case x509.MD2WithRSA, x509.MD5WithRSA, x509.SHA1WithRSA, x509.DSAWithSHA1, x509.DSAWithSHA256, x509.ECDSAWithSHA1:
		return nil, nil, badCSR(fmt.Errorf("the CSR is signed with %s: sign it with SHA-256 or better", csr.SignatureAlgorithm))
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, nil, badCSR(fmt.Errorf("the CSR's signature does not prove possession of its key: %w", err))
	}
	if spki, err = x509.MarshalPKIXPublicKey(csr.PublicKey); err != nil {
		return nil, nil, badCSR(fmt.Errorf("the CSR's key cannot be encoded: %w", err))
	}
	return csr.PublicKey, spki, nil
}

func decodeCSR(text []byte) (*x509.CertificateRequest, error) {
	if len(text) == 0 {
		return nil, errors.New("is empty: send one PEM block CERTIFICATE REQUEST")
	}
	if len(text) > MaxCSR {
		return nil, fmt.Errorf("has %d octets, more than the %d that are read", len(text), MaxCSR)
	}
	block, rest := pem.Decode(text)
	if block == nil {
		return nil, errors.New("is not PEM: send one PEM block CERTIFICATE REQUEST")
	}
	if block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" {
		return nil, fmt.Errorf("is a PEM block %.40q: send CERTIFICATE REQUEST", block.Type)
	}
	if strings.TrimSpace(string(rest)) != "" {
		return nil, errors.New("is followed by further data: send exactly one PEM block")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("cannot be parsed as PKCS#10: %.200s", err) // x509 repeats a name that it cannot read
	}
	if csr.PublicKey == nil {
		return nil, errors.New("has a public key of an unknown type: use RSA or ECDSA")
	}
	return csr, nil
}

// isRSA says whether a leaf with this key gets keyEncipherment.
func isRSA(pub crypto.PublicKey) bool {
	_, ok := pub.(*rsa.PublicKey)
	return ok
}
