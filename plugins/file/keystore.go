package file

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"kedge/ca"
	"kedge/ca/atomicfile"
)

// KeyStoreOptions says where keys are kept.
type KeyStoreOptions struct {
	Dir            string // made if need be, mode 0700; one process at a time
	PassphraseFile string // one line; encrypts every key. Empty: keys are written in clear
}

// KeyStore is a ca.KeyStore of one file a key. The name of a key is its id as the ledger writes it: the SHA-256 of the
// SubjectPublicKeyInfo, in hex. So a file that holds another key than its name says is noticed.
type KeyStore struct {
	dir        string
	passphrase passphrase
}

var _ ca.PortableKeyStore = (*KeyStore)(nil)

// OpenKeyStore opens the key store, and makes sure that it can be used: the folder, and the passphrase file when one is named.
func OpenKeyStore(o KeyStoreOptions) (*KeyStore, error) {
	s := &KeyStore{dir: o.Dir, passphrase: passphrase{path: o.PassphraseFile}}
	if o.Dir == "" {
		return nil, errors.New("the key store has no folder: name one")
	}
	if err := prepareFolder(o.Dir); err != nil {
		return nil, err
	}
	if o.PassphraseFile != "" {
		if err := CheckPassphraseFile(o.PassphraseFile); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Create makes a key and returns once its file is on disk.
func (s *KeyStore) Create(ctx context.Context, spec ca.KeySpec) (string, crypto.Signer, error) {
	if err := ctx.Err(); err != nil {
		return "", nil, fmt.Errorf("making a %s key in %s: %w", spec, s.dir, err)
	}
	key, err := ca.GenerateKey(spec)
	if err != nil {
		return "", nil, fmt.Errorf("making a key in %s: %w", s.dir, err)
	}
	ref, err := keyID(key.Public())
	if err != nil {
		return "", nil, fmt.Errorf("making a %s key in %s: %w", spec, s.dir, err)
	}
	if err := ctx.Err(); err != nil { // an RSA key takes seconds to find
		return "", nil, fmt.Errorf("making a %s key in %s: %w", spec, s.dir, err)
	}
	if err := writeKey(s.path(ref), key, s.passphrase); err != nil {
		return "", nil, inFolder(s.dir, err)
	}
	return ref, key, nil
}

// Open reads the key of that name. Without such a key the error wraps fs.ErrNotExist.
func (s *KeyStore) Open(ctx context.Context, ref string) (crypto.Signer, error) {
	if err := s.check(ctx, ref, "opening"); err != nil {
		return nil, err
	}
	key, err := readKey(s.path(ref), s.passphrase)
	if err != nil {
		return nil, inFolder(s.dir, err)
	}
	id, err := keyID(key.Public())
	if err != nil {
		return nil, fmt.Errorf("the key file %s: %w", s.path(ref), err)
	}
	if id != ref {
		return nil, fmt.Errorf("the key file %s holds the key %s: files were swapped; rename it to its key's id, and restore the missing one from a backup",
			s.path(ref), id)
	}
	return key, nil
}

// Delete removes the key's file. What the disk or its backups still hold of it is not overwritten.
func (s *KeyStore) Delete(ctx context.Context, ref string) error {
	if err := s.check(ctx, ref, "deleting"); err != nil {
		return err
	}
	if err := inFolder(s.dir, os.Remove(s.path(ref))); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("deleting the key %s: %w", ref, err)
	}
	return atomicfile.SyncFolder(s.dir)
}

// File returns the key's file as it is on disk. Without such a key the error wraps fs.ErrNotExist.
func (s *KeyStore) File(ctx context.Context, ref string) (ca.KeyFile, error) {
	if err := s.check(ctx, ref, "reading"); err != nil {
		return ca.KeyFile{}, err
	}
	file, err := keyFileOf(s.path(ref))
	return file, inFolder(s.dir, err)
}

// check lets nothing but a key id become a path.
func (s *KeyStore) check(ctx context.Context, ref, doing string) error {
	if id, err := hex.DecodeString(ref); err != nil || len(id) != sha256.Size || hex.EncodeToString(id) != ref {
		return fmt.Errorf("%s the key %.80q in %s: that is no key's name; one has %d lower-case hex digits", doing, ref, s.dir, 2*sha256.Size)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s the key %s in %s: %w", doing, ref, s.dir, err)
	}
	return nil
}

func (s *KeyStore) path(ref string) string { return filepath.Join(s.dir, ref+".pem") }

// keyID is the SHA-256 of the SubjectPublicKeyInfo, in hex.
func keyID(pub crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("encoding its public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}
