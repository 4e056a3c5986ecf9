package ceremony

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"time"

	"kedge/ca"
)

// Signed is the outcome of a ceremony.
type Signed struct {
	DER []byte
	PEM []byte
}

// Sign has the key sign what was prepared, and verifies what came back.
func (r *Prepared) Sign(key crypto.Signer) (*Signed, error) {
	if r.Open {
		return nil, errors.New("what is to be signed was prepared without the key: prepare it anew") // a defect
	}
	if !ca.SameKey(r.signer, key.Public()) {
		return nil, errors.New("the key is another one than what was prepared is for")
	}
	der, err := r.sign(key, false)
	if err != nil {
		return nil, err
	}
	signed, err := r.verify(der)
	if err != nil {
		return nil, fmt.Errorf("nothing is written: %w", err)
	}
	return signed, nil
}

// verify does what any verifier would with what was signed, and makes sure that it is what was prepared, to the octet.
func (r *Prepared) verify(der []byte) (*Signed, error) {
	if r.list != nil {
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			return nil, fmt.Errorf("reading the signed CRL: %w", err)
		}
		if !bytes.Equal(list.RawTBSRevocationList, r.TBS) {
			return nil, errOther
		}
		if err := list.CheckSignatureFrom(r.Issuer); err != nil {
			return nil, fmt.Errorf("the signature of the CRL does not verify: %w", err)
		}
		if err := ca.LintCRL(der); err != nil {
			return nil, fmt.Errorf("the CRL is not as RFC 5280 has it: %w", err)
		}
		return &Signed{DER: der, PEM: pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})}, nil
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading the signed certificate: %w", err)
	}
	if !bytes.Equal(cert.RawTBSCertificate, r.TBS) {
		return nil, errOther
	}
	issuer := r.Issuer
	if issuer == nil {
		issuer = cert
	}
	if err := cert.CheckSignatureFrom(issuer); err != nil {
		return nil, fmt.Errorf("the signature of the certificate does not verify: %w", err)
	}
	if err := ca.Lint(der); err != nil {
		return nil, fmt.Errorf("the certificate is not as RFC 5280 has it: %w", err)
	}
	return &Signed{DER: der, PEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, nil
}

var errOther = errors.New("what was signed is not what was prepared")

// Token is what the record says of the token and of the key on it, as the token reports it.
type Token struct {
	URI          string            `json:"uri"` // where it is, without the PIN's source
	Label        string            `json:"label"`
	Serial       string            `json:"serial"`
	Manufacturer string            `json:"manufacturer"`
	Model        string            `json:"model"`
	Firmware     string            `json:"firmware"`
	Module       string            `json:"module"`
	Library      string            `json:"library"` // what the module calls itself
	KeyLabel     string            `json:"key_label"`
	KeyID        string            `json:"key_id"` // hex
	KeyType      string            `json:"key_type"`
	KeyMade      bool              `json:"key_made"` // in this ceremony
	Attributes   map[string]string `json:"attributes"`
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
	Inputs     []Input   `json:"inputs,omitempty"`
	Token      Token     `json:"token"`
	PublicKey  string    `json:"public_key_sha256"` // of the SubjectPublicKeyInfo of the key that signed
	TBSSHA256  string    `json:"to_be_signed_sha256"`
	SHA256     string    `json:"sha256"` // of what was signed, in DER
	File       string    `json:"file"`
	FileSHA256 string    `json:"file_sha256"`
	Outcome    string    `json:"outcome"` // what is in the file
}

// Record completes a record in which the caller has said who, when and where, and returns its text in JSON.
func (r *Prepared) Record(record *Record, s *Signed) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(r.signer)
	if err != nil {
		return nil, fmt.Errorf("encoding the public key: %w", err)
	}
	record.Version, record.Make, record.Purpose, record.Operators = 1, r.Plan.Make, r.Plan.Purpose, r.Plan.Operators
	record.Plan, record.PlanSHA256, record.Inputs = string(r.Plan.text), sum(r.Plan.text), r.Inputs
	record.PublicKey, record.TBSSHA256, record.SHA256 = sum(spki), sum(r.TBS), sum(s.DER)
	record.File, _ = r.Plan.Files()
	record.FileSHA256, record.Outcome = sum(s.PEM), string(s.PEM)
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false) // the plan is to be legible, with the & of its URI
	if err := encoder.Encode(record); err != nil {
		return nil, fmt.Errorf("writing the record: %w", err)
	}
	return text.Bytes(), nil
}

// Left is the record of a run of this plan that ended between writing its record and writing the outcome; nil when there is neither. Anything else that is in the way is an error.
func (p *Plan) Left() (*Record, error) {
	file, recordFile := p.Files()
	taken := func(path string) bool {
		_, err := os.Lstat(path)
		return err == nil
	}
	inTheWay := func(path string) error {
		return fmt.Errorf("%s is there already, and nothing is overwritten: name another file in the plan, or move it away", path)
	}
	if taken(file) {
		return nil, inTheWay(file)
	}
	if !taken(recordFile) {
		return nil, nil
	}
	text, err := readFile(recordFile, maxInput)
	var left Record
	if err != nil || json.Unmarshal(text, &left) != nil || left.PlanSHA256 != sum(p.text) {
		return nil, inTheWay(recordFile)
	}
	return &left, nil
}

// Complete verifies the outcome that a record has, as Sign does.
func (r *Prepared) Complete(left *Record) (*Signed, error) {
	block, _ := pem.Decode([]byte(left.Outcome))
	if block == nil {
		return nil, errors.New("the record has no outcome in PEM")
	}
	return r.verify(block.Bytes)
}

func sum(data []byte) string {
	digest := sha256.Sum256(data)
	return hex.EncodeToString(digest[:])
}
