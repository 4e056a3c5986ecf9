package ceremony

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.yaml.in/yaml/v2"

	"kedge/ca"
)

// maxPlan is how many octets a plan may have, and maxInput a file that it names.
const (
	maxPlan  = 1 << 20
	maxInput = 16 << 20
)

// What a plan can make.
const (
	MakeRoot         = "root"
	MakeIntermediate = "intermediate"
	MakeCRL          = "crl"
)

// Plan is what a ceremony does. Paths in it begin at its own folder.
type Plan struct {
	Make      string   `yaml:"make"`      // root, intermediate or crl
	Purpose   string   `yaml:"purpose"`   // for the record
	Operators []string `yaml:"operators"` // who is there, for the record
	Key       Key      `yaml:"key"`       // that signs
	Issuer    string   `yaml:"issuer"`    // intermediate, crl: PEM file of the certificate of the key that signs
	CSR       string   `yaml:"csr"`       // intermediate: PEM file of its CSR; only the public key is taken from it
	Subject   Subject  `yaml:"subject"`   // root, intermediate
	// TrustDomain is the name that stands as spiffe://NAME in the certificate (X509-SVID 3.1); "": none, as for a root of several trust domains.
	TrustDomain string `yaml:"trustDomain"`
	Serial      string `yaml:"serial"`     // root, intermediate: hex
	NotBefore   string `yaml:"notBefore"`  // root, intermediate: RFC 3339
	NotAfter    string `yaml:"notAfter"`   // root, intermediate: RFC 3339
	PathLength  *int   `yaml:"pathLength"` // root, intermediate: how many CAs may stand between it and a leaf's issuer; none given: 1 for a root, 0 for an intermediate
	CRL         CRL    `yaml:"crl"`        // crl
	Out         Out    `yaml:"out"`

	text   []byte
	folder string
}

// Key is the key that signs, and how its token is spoken to.
type Key struct {
	URI              string        `yaml:"uri"`              // of the token and the key on it
	Create           ca.KeySpec    `yaml:"create"`           // root: the kind of key that is made on the token; "": it is there already
	ModuleParameters string        `yaml:"moduleParameters"` // what the token's module is initialised with, for those that want it
	Timeout          time.Duration `yaml:"timeout"`          // of a call of the module; 0: DefaultTimeout
	AllowExportable  bool          `yaml:"allowExportable"`  // sign although the token says that the key can be exported, or was not made on it
}

// DefaultTimeout is long: a ceremony is not in a hurry.
const DefaultTimeout = 30 * time.Second

// Subject is a name (RFC 5280 4.1.2.6).
type Subject struct {
	CommonName         string `yaml:"commonName"`
	Organization       string `yaml:"organization"`
	OrganizationalUnit string `yaml:"organizationalUnit"`
	Country            string `yaml:"country"`
}

// CRL is a certificate revocation list (RFC 5280 5).
type CRL struct {
	Number     string    `yaml:"number"`     // decimal; greater than that of every one before
	ThisUpdate string    `yaml:"thisUpdate"` // RFC 3339
	NextUpdate string    `yaml:"nextUpdate"` // RFC 3339
	Revoked    []Revoked `yaml:"revoked"`
	Before     string    `yaml:"before"` // PEM file of the CRL before this one; "": there is none
}

// Revoked is a certificate on a CRL.
type Revoked struct {
	Serial string `yaml:"serial"` // hex
	At     string `yaml:"at"`     // RFC 3339
	Reason int    `yaml:"reason"` // RFC 5280 5.3.1; 0: unspecified
}

// Out is what is written. Nothing is overwritten.
type Out struct {
	File   string `yaml:"file"`   // the certificate or the CRL, in PEM
	Record string `yaml:"record"` // the record of the ceremony, in JSON
}

// Load reads a plan. An unknown key, or one that stands there twice, is an error.
func Load(path string) (*Plan, error) {
	text, err := readFile(path, maxPlan)
	if err != nil {
		return nil, fmt.Errorf("reading the plan: %w", err)
	}
	folder, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("finding the folder of the plan %s: %w", path, err)
	}
	p := &Plan{text: text, folder: folder}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.SetStrict(true)
	if err := decoder.Decode(p); err != nil {
		return nil, fmt.Errorf("reading the plan %s: %w", path, err)
	}
	if err := decoder.Decode(new(any)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading the plan %s: it has a second document, and nothing of it would be used", path)
	}
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("the plan %s: %w", path, err)
	}
	p.Key.Timeout = cmp.Or(p.Key.Timeout, DefaultTimeout)
	return p, nil
}

// check says everything that is missing, or is for something else.
func (p *Plan) check() error {
	var errs []error
	refuse := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	certificate := p.Make == MakeRoot || p.Make == MakeIntermediate
	if !certificate && p.Make != MakeCRL {
		return fmt.Errorf("make is %q: write %s, %s or %s", p.Make, MakeRoot, MakeIntermediate, MakeCRL)
	}
	need := func(name, value string, needed bool) {
		switch {
		case needed && value == "":
			refuse("%s is missing: a %s needs it", name, p.Make)
		case !needed && value != "":
			refuse("%s is given, and a %s has none", name, p.Make)
		}
	}
	need("purpose", p.Purpose, true)
	need("key.uri", p.Key.URI, true)
	need("out.file", p.Out.File, true)
	need("out.record", p.Out.Record, true)
	need("issuer", p.Issuer, p.Make != MakeRoot)
	need("csr", p.CSR, p.Make == MakeIntermediate)
	need("subject.commonName", p.Subject.CommonName, certificate)
	need("serial", p.Serial, certificate)
	need("notBefore", p.NotBefore, certificate)
	need("notAfter", p.NotAfter, certificate)
	need("crl.number", p.CRL.Number, p.Make == MakeCRL)
	need("crl.thisUpdate", p.CRL.ThisUpdate, p.Make == MakeCRL)
	need("crl.nextUpdate", p.CRL.NextUpdate, p.Make == MakeCRL)
	if len(p.Operators) == 0 {
		refuse("operators is missing: name who is there")
	}
	if p.Key.Create != "" && p.Make != MakeRoot {
		refuse("key.create is given, and only a root's key is made in a ceremony")
	}
	if p.Key.Timeout != 0 && p.Key.Timeout < time.Second {
		refuse("key.timeout %s is less than a second: write it with its unit, like 30s", p.Key.Timeout)
	}
	if p.PathLength != nil && (!certificate || *p.PathLength < 0 || *p.PathLength > 10) {
		refuse("pathLength is for root and intermediate, from 0 to 10")
	}
	if p.Out.File != "" && p.path(p.Out.File) == p.path(p.Out.Record) {
		refuse("out.file and out.record are the same file")
	}
	return errors.Join(errs...)
}

// path is where a file of the plan is.
func (p *Plan) path(name string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(p.folder, name)
}

// Files are where the outcome and the record are to be.
func (p *Plan) Files() (file, record string) { return p.path(p.Out.File), p.path(p.Out.Record) }

func readFile(path string, most int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close() // it was only read
	text, err := io.ReadAll(io.LimitReader(file, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(text)) > most {
		return nil, fmt.Errorf("%s has more than %d octets", path, most)
	}
	return text, nil
}

func parseTime(name, text string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return t, fmt.Errorf("%s %q is not a time like 2027-01-31T00:00:00Z", name, text)
	}
	return t.UTC(), nil
}

// parseSerial reads a serial number in hex: positive, of at most 20 octets (RFC 5280 4.1.2.2). One that is made for a new certificate has at least 8 octets that
// nobody can guess.
func parseSerial(name, text string, least int) (*big.Int, error) {
	n, ok := new(big.Int).SetString(strings.ReplaceAll(text, ":", ""), 16)
	switch {
	case !ok:
		return nil, fmt.Errorf("%s %q is not a number in hex", name, text)
	case n.Sign() <= 0 || n.BitLen() > 159:
		return nil, fmt.Errorf("%s %q is not a positive number of at most 20 octets (RFC 5280 4.1.2.2)", name, text)
	case n.BitLen() < least:
		return nil, fmt.Errorf("%s %q is short: give 16 random octets, like those of 'openssl rand -hex 16'", name, text)
	}
	return n, nil
}
