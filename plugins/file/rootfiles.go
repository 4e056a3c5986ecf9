package file

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

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
	if err := (ca.Issuers{cert}).Check(r.now()); err != nil {
		return fmt.Errorf("the root certificate %s: %w", path, err)
	}
	switch {
	case len(cert.SubjectKeyId) == 0:
		return fmt.Errorf("the root certificate %s has no subject key identifier (RFC 5280 4.2.1.2): issue it with one", path)
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
	err = inFolder(r.dir, err)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the root in %s has lost its key, restore it from a backup: %w", r.dir, err)
	}
	if err != nil {
		return nil, err
	}
	if !ca.SameKey(key.Public(), r.cert.PublicKey) {
		return nil, fmt.Errorf("the key %s does not belong to the certificate %s: restore the two that belong together from a backup",
			r.path(r.keyName), r.path(certificateFile))
	}
	return key, nil
}

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
