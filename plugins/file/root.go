package file

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

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
	r := &Root{dir: o.Dir, passphrase: passphrase{path: o.PassphraseFile}, now: o.Now}
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
	key, err := ca.GenerateKey(spec)
	if err != nil {
		return err
	}
	now := r.now().UTC().Truncate(time.Second)
	if r.cert, err = ca.SignRoot(r.trustDomain, key, now.Add(-backdate), now.Add(lifetime)); err != nil {
		return err
	}
	if err := writeKey(r.path(newKeyFile), key, r.passphrase); err != nil {
		return err
	}
	return atomicfile.Write(r.path(certificateFile), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.cert.Raw}))
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
	text, err := read(path, 0, "")
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
	key, err := r.key()
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil { // an encrypted key takes a while to open
		return nil, err
	}
	return ca.SignIssuing(r.cert, key, request, r.now())
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
	cert, err := read(r.path(certificateFile), 0, "")
	if err != nil {
		return nil, fmt.Errorf("the root certificate: %w", err)
	}
	key, err := keyFileOf(r.path(r.keyName))
	if err != nil {
		return nil, err
	}
	return []ca.KeyFile{{Name: certificateFile, Content: cert}, key}, nil
}
