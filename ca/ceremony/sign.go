package ceremony

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"kedge/ca"
)

// Signed is the outcome of a ceremony.
type Signed struct {
	DER []byte
	PEM []byte
}

// Sign has the key sign what was prepared, and verifies what came back as any verifier would: that it is what was prepared, to the octet, and the signature.
func (r *Prepared) Sign(key crypto.Signer) (*Signed, error) {
	if r.TBS == nil {
		return nil, errors.New("what is to be signed was prepared without the key: prepare it anew") // a defect
	}
	if !sameKey(r.signer, key.Public()) {
		return nil, errors.New("the key is another one than what was prepared is for")
	}
	der, err := r.sign(key, false)
	if err != nil {
		return nil, err
	}
	if r.list != nil {
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			return nil, fmt.Errorf("reading the signed CRL: %w", err)
		}
		if !r.equalTBS(list.RawTBSRevocationList) {
			return nil, errors.New("what was signed is not what was prepared; nothing is written")
		}
		if err := list.CheckSignatureFrom(r.Issuer); err != nil {
			return nil, fmt.Errorf("the signature of the CRL does not verify; nothing is written: %w", err)
		}
		return &Signed{DER: der, PEM: pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})}, nil
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading the signed certificate: %w", err)
	}
	if !r.equalTBS(cert.RawTBSCertificate) {
		return nil, errors.New("what was signed is not what was prepared; nothing is written")
	}
	issuer := r.Issuer
	if issuer == nil {
		issuer = cert
	}
	if err := cert.CheckSignatureFrom(issuer); err != nil {
		return nil, fmt.Errorf("the signature of the certificate does not verify; nothing is written: %w", err)
	}
	if err := ca.Lint(der); err != nil {
		return nil, fmt.Errorf("the certificate is not as RFC 5280 has it; nothing is written: %w", err)
	}
	return &Signed{DER: der, PEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, nil
}

// Token is what the record says of the token and of the key on it, as the token reports it.
type Token struct {
	URI        string            `json:"uri"` // where it is, without the PIN's source
	Label      string            `json:"label"`
	Serial     string            `json:"serial"`
	Model      string            `json:"model,omitempty"`
	Module     string            `json:"module"`
	KeyMade    bool              `json:"key_made"` // in this ceremony
	Attributes map[string]string `json:"attributes"`
}

// Record is what an auditor keeps.
type Record struct {
	Version    int       `json:"version"` // 1
	Make       string    `json:"make"`
	Purpose    string    `json:"purpose"`
	Operators  []string  `json:"operators"`
	User       string    `json:"user"` // who ran it, as the machine knows them
	Host       string    `json:"host"`
	Program    string    `json:"program"`
	Began      time.Time `json:"began"`
	Ended      time.Time `json:"ended"`
	Plan       string    `json:"plan"` // its text
	PlanSHA256 string    `json:"plan_sha256"`
	Token      Token     `json:"token"`
	PublicKey  string    `json:"public_key_sha256"` // of the SubjectPublicKeyInfo of the key that signed
	TBSSHA256  string    `json:"to_be_signed_sha256"`
	SHA256     string    `json:"sha256"` // of what was signed, in DER
	File       string    `json:"file"`
	Outcome    string    `json:"outcome"` // PEM
}

// Record makes the record. Who, when and where is for the caller to fill in.
func (r *Prepared) Record(s *Signed) (Record, error) {
	spki, err := x509.MarshalPKIXPublicKey(r.signer)
	if err != nil {
		return Record{}, fmt.Errorf("encoding the public key: %w", err)
	}
	file, _ := r.Plan.Files()
	return Record{Version: 1, Make: r.Plan.Make, Purpose: r.Plan.Purpose, Operators: r.Plan.Operators, Plan: string(r.Plan.text), PlanSHA256: sum(r.Plan.text),
		PublicKey: sum(spki), TBSSHA256: sum(r.TBS), SHA256: sum(s.DER), File: file, Outcome: string(s.PEM)}, nil
}

// JSON is the record as it is written.
func (r Record) JSON() ([]byte, error) {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("writing the record: %w", err)
	}
	return append(text, '\n'), nil
}

func sum(data []byte) string {
	digest := sha256.Sum256(data)
	return hex.EncodeToString(digest[:])
}
