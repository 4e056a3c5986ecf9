package file

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/atomicfile"
)

// The files of a root, in its folder. The key carries its final name only once the ledger has the root, see Recorded:
//
//	new key, no certificate   a first start was cut short; nothing was ever signed with it: a new root is made
//	new key and certificate   a root that was made here, and that no ledger has yet for certain
//	key and certificate       the root
//	only one of the two       something was lost: an error, and never a new root
const (
	certificateFile = "root-cert.pem"
	keyFile         = "root-key.pem"
	newKeyFile      = "root-key.new.pem"
)

const (
	defaultLifetime = 10 * 365 * 24 * time.Hour
	minLifetime     = time.Minute
	backdate        = time.Hour // for verifiers whose clocks are behind
	maxCommonName   = 64        // characters (RFC 5280 A.1, ub-common-name)
	organization    = "Kedge"
)

// RootOptions says where a root is kept, and what it is like if it has to be made.
type RootOptions struct {
	Dir            string           // made if need be, mode 0700; one process at a time
	TrustDomain    string           // name without scheme
	KeySpec        ca.KeySpec       // of a new root's key; default P-256
	Lifetime       time.Duration    // of a new root; default 10 years of 365 days
	PassphraseFile string           // one line; encrypts the key. Empty: it is written in clear
	Now            func() time.Time // default time.Now
	Logger         *slog.Logger     // default: nothing is logged
}

// Root is a ca.Root whose key and certificate are files. Its key is in memory only while OpenRoot compares it with the
// certificate and while Certify signs.
type Root struct {
	dir         string
	trustDomain spiffeid.TrustDomain
	passphrase  passphrase
	now         func() time.Time
	cert        *x509.Certificate
	keyName     string // the key's file, for as long as it is a new one
	created     bool
}

var _ ca.PortableRoot = (*Root)(nil)

// OpenRoot reads the root from its folder, or makes one when there never was any. It returns only once all of it is on disk.
func OpenRoot(o RootOptions) (*Root, error) {
	r := &Root{dir: o.Dir, passphrase: passphrase{o.PassphraseFile}, now: o.Now}
	if r.now == nil {
		r.now = time.Now
	}
	if o.Dir == "" {
		return nil, errors.New("the root has no folder: name one")
	}
	var err error
	if r.trustDomain, err = spiffeid.TrustDomainFromString(o.TrustDomain); err != nil {
		return nil, fmt.Errorf("the trust domain %q of the root in %s: %w", o.TrustDomain, o.Dir, err)
	}
	if err := prepareFolder(o.Dir); err != nil {
		return nil, err
	}
	state, err := r.look()
	if err != nil {
		return nil, err
	}
	r.created = state.newKey || !state.certificate
	r.keyName = keyFile
	if r.created {
		r.keyName = newKeyFile
	}
	if state.certificate {
		err = r.load()
	} else if err = r.create(o); err != nil {
		err = fmt.Errorf("making a root in %s: %w", o.Dir, err)
	}
	if err != nil {
		return nil, err
	}
	if !state.certificate && o.Logger != nil {
		o.Logger.Info("made a root certificate", "file", r.path(certificateFile), "subject", r.cert.Subject.String(),
			"sha256", fmt.Sprintf("%x", sha256.Sum256(r.cert.Raw)), "not_after", r.cert.NotAfter, "key_encrypted", o.PassphraseFile != "")
	}
	return r, nil
}

// Created says whether this root was made here and no ledger had it yet for certain when it was opened: whoever records it now knows every
// certificate that will ever be under it.
func (r *Root) Created() bool { return r.created }

// Recorded gives the key of a root that was made here its final name. It is called once the ledger has the root: a crash before that leaves a root
// that still counts as made here. It is not for use at once with Certify.
func (r *Root) Recorded() error {
	if r.keyName == keyFile {
		return nil
	}
	if err := os.Rename(r.path(newKeyFile), r.path(keyFile)); err != nil {
		return fmt.Errorf("giving the key of the root in %s its name: %w", r.dir, err)
	}
	r.keyName = keyFile
	return atomicfile.SyncFolder(r.dir)
}

// CertificateFile is the path of the root certificate in PEM: what clients of a new CA are given to trust.
func (r *Root) CertificateFile() string { return r.path(certificateFile) }

func (r *Root) path(name string) string { return filepath.Join(r.dir, name) }

// files says which files of a root there are.
type files struct{ certificate, key, newKey bool }

// look refuses the states in which something was lost.
func (r *Root) look() (state files, err error) {
	for name, found := range map[string]*bool{certificateFile: &state.certificate, keyFile: &state.key, newKeyFile: &state.newKey} {
		if *found, err = exists(r.path(name)); err != nil {
			return state, err
		}
	}
	switch {
	case state.key && state.newKey:
		return state, fmt.Errorf("the root in %s has two keys, %s and %s: remove the one that does not belong to %s (%s, unless you put the other there)",
			r.dir, keyFile, newKeyFile, certificateFile, newKeyFile)
	case state.key && !state.certificate:
		return state, fmt.Errorf("the root in %s has lost its certificate: %s is there and %s is not. No new root is made, since verifiers trust "+
			"the lost one: restore the file from a backup, or from the trust bundle of any workload", r.dir, keyFile, certificateFile)
	case state.certificate && !state.key && !state.newKey:
		return state, fmt.Errorf("the root in %s has lost its key: %s is there and %s is not. No new root is made, since verifiers trust "+
			"this one: restore the key from a backup", r.dir, certificateFile, keyFile)
	}
	return state, nil
}

// create writes a new key and a self-signed certificate for it.
func (r *Root) create(o RootOptions) error {
	spec, lifetime := o.KeySpec, o.Lifetime
	if spec == "" {
		spec = ca.P256
	}
	if lifetime == 0 {
		lifetime = defaultLifetime
	}
	if lifetime < minLifetime {
		return fmt.Errorf("its lifetime of %s is too short: the least is %s, and years are usual", lifetime, minLifetime)
	}
	key, err := generate(spec)
	if err != nil {
		return err
	}
	keyID, err := subjectKeyID(key.Public())
	if err != nil {
		return err
	}
	now := r.now().UTC().Truncate(time.Second)
	template := authorityTemplate(keyID, r.trustDomain)
	template.Subject.CommonName = rootName(r.trustDomain, keyID)
	template.NotBefore, template.NotAfter = now.Add(-backdate), now.Add(lifetime)
	template.MaxPathLen = 1 // root → issuing CA → leaf
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fmt.Errorf("signing its certificate: %w", err)
	}
	if r.cert, err = x509.ParseCertificate(der); err != nil {
		return fmt.Errorf("reading its certificate back: %w", err)
	}
	if err := writeKey(r.path(newKeyFile), key, r.passphrase); err != nil {
		return err
	}
	return atomicfile.Write(r.path(certificateFile), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// authorityTemplate is what root and issuing certificates have in common (RFC 5280 4.2.1, X509-SVID 3.1 and 4).
func authorityTemplate(keyID []byte, td spiffeid.TrustDomain) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{Organization: []string{organization}},
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          keyID,
		URIs:                  []*url.URL{td.ID().URL()},
	}
}

// serial is positive, random and of 20 octets (RFC 5280 4.1.2.2).
func serial() *big.Int {
	octets := make([]byte, 20)
	rand.Read(octets) // never fails: the process ends first
	octets[0] = octets[0]&0x7f | 0x40
	return new(big.Int).SetBytes(octets)
}

// subjectKeyID is the leftmost 160 bits of the SHA-256 of the public key's bits (RFC 7093 2, method 1).
func subjectKeyID(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("encoding its public key: %w", err)
	}
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		PublicKey asn1.BitString
	}
	if err := unmarshal(der, &info, "SubjectPublicKeyInfo"); err != nil {
		return nil, err
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

// load reads the certificate, and the key only to see that it belongs to it.
func (r *Root) load() error {
	path := r.path(certificateFile)
	cert, err := readCertificate(path)
	if err != nil {
		return err
	}
	now := r.now()
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return fmt.Errorf("the root certificate %s is not a CA certificate (basicConstraints cA is not true): put the root's certificate there", path)
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("the root certificate %s may not sign certificates (its keyUsage lacks keyCertSign): a root needs it", path)
	case cert.MaxPathLen == 0 && cert.MaxPathLenZero:
		return fmt.Errorf("the root certificate %s has the path length constraint 0, which allows no issuing CA below it: a root needs 1 or more", path)
	case len(cert.SubjectKeyId) == 0:
		return fmt.Errorf("the root certificate %s has no subject key identifier (RFC 5280 4.2.1.2): issue it with one", path)
	case now.After(cert.NotAfter):
		return fmt.Errorf("the root certificate %s expired at %s: every certificate under it did too; start with a new root in another folder",
			path, cert.NotAfter.Format(time.RFC3339))
	case now.Before(cert.NotBefore):
		return fmt.Errorf("the root certificate %s is valid from %s on, and this machine's clock says %s: set the clock",
			path, cert.NotBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case len(cert.URIs) > 1 || len(cert.URIs) == 1 && cert.URIs[0].String() != r.trustDomain.IDString():
		return fmt.Errorf("the root certificate %s is for %s, and the configured trust domain is %s: "+
			"configure the trust domain of the root, or another folder", path, cert.URIs, r.trustDomain)
	}
	if err := cert.CheckSignatureFrom(cert); err != nil {
		return fmt.Errorf("the root certificate %s is not signed by itself: %w", path, err)
	}
	r.cert = cert
	_, err = r.key()
	return err
}

// readCertificate reads a file with one certificate in PEM.
func readCertificate(path string) (*x509.Certificate, error) {
	text, err := read(path, 0, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the root certificate: %w", err)
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("the root certificate %s is not a PEM block CERTIFICATE: "+
			"restore it from a backup, or from the trust bundle of any workload", path)
	}
	if strings.TrimSpace(string(rest)) != "" {
		return nil, fmt.Errorf("the root certificate %s is followed by further data: the file holds one certificate and nothing else", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the root certificate %s: %w", path, err)
	}
	return cert, nil
}

// key reads the root's key and makes sure that it is the one that was certified.
func (r *Root) key() (crypto.Signer, error) {
	key, err := readKey(r.path(r.keyName), r.passphrase)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the root in %s has lost its key, restore it from a backup: %w", r.dir, err)
	}
	if err != nil {
		return nil, err
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(r.cert.PublicKey) {
		return nil, fmt.Errorf("the key %s does not belong to the certificate %s: restore the two that belong together from a backup",
			r.path(r.keyName), r.path(certificateFile))
	}
	return key, nil
}

// Certify reads the root's key, signs the certificate of an issuing CA with it, and drops it. Validity is cut to the root's own.
func (r *Root) Certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	cert, err := r.certify(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("certifying the issuing CA %.80q with the root in %s: %w", request.CommonName, r.dir, err)
	}
	return []*x509.Certificate{cert}, nil
}

func (r *Root) certify(ctx context.Context, request ca.CertifyRequest) (*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if request.TrustDomain != r.trustDomain.Name() {
		return nil, fmt.Errorf("it is for the trust domain %.80q, and this root is for %s", request.TrustDomain, r.trustDomain)
	}
	if utf8.RuneCountInString(request.CommonName) > maxCommonName {
		return nil, fmt.Errorf("its common name is longer than the %d characters of RFC 5280 A.1", maxCommonName)
	}
	if request.CommonName == r.cert.Subject.CommonName {
		return nil, errors.New("it has the root's own name, and verifiers would take it for self-issued (RFC 5280 4.2.1.1): give it another")
	}
	if err := checkKey(request.PublicKey); err != nil {
		return nil, fmt.Errorf("its public key: %w", err)
	}
	if r.now().After(r.cert.NotAfter) {
		return nil, fmt.Errorf("the root expired at %s: prepare a new one", r.cert.NotAfter.Format(time.RFC3339))
	}
	keyID, err := subjectKeyID(request.PublicKey)
	if err != nil {
		return nil, err
	}
	template := authorityTemplate(keyID, r.trustDomain)
	template.Subject.CommonName = request.CommonName
	template.MaxPathLenZero = true
	template.NotBefore, template.NotAfter = request.NotBefore.UTC(), request.NotAfter.UTC().Truncate(time.Second)
	if template.NotBefore.Before(r.cert.NotBefore) {
		template.NotBefore = r.cert.NotBefore
	}
	if template.NotAfter.After(r.cert.NotAfter) {
		template.NotAfter = r.cert.NotAfter
	}
	if !template.NotBefore.Before(template.NotAfter) {
		return nil, fmt.Errorf("no time is left between %s and %s (the root is valid from %s to %s)", request.NotBefore.UTC().Format(time.RFC3339),
			request.NotAfter.UTC().Format(time.RFC3339), r.cert.NotBefore.Format(time.RFC3339), r.cert.NotAfter.Format(time.RFC3339))
	}
	key, err := r.key()
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil { // an encrypted key takes a while to open
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, r.cert, request.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	return x509.ParseCertificate(der)
}

// Roots returns the one root.
func (r *Root) Roots(context.Context) ([]*x509.Certificate, error) {
	return []*x509.Certificate{r.cert}, nil
}

// Changed returns nil: the root stays what it is.
func (r *Root) Changed() <-chan struct{} { return nil }

// Files returns the certificate and the key, as they are on disk.
func (r *Root) Files(ctx context.Context) ([]ca.KeyFile, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("reading the files of the root in %s: %w", r.dir, err)
	}
	cert, err := read(r.path(certificateFile), 0, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the root certificate: %w", err)
	}
	key, err := keyFileOf(r.path(r.keyName))
	if err != nil {
		return nil, err
	}
	return []ca.KeyFile{{Name: certificateFile, Content: cert}, key}, nil
}
