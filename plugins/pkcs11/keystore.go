package pkcs11

import (
	"context"
	"crypto"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"regexp"

	"kedge/ca"
	"kedge/hsm"
)

// KeyStoreOptions says on which token keys are made.
type KeyStoreOptions struct {
	Token           *hsm.Token
	Label           string // begins the labels of the keys; default "kedge-issuing"
	AllowExportable bool   // see Acceptable
}

// KeyStore is a ca.KeyStore of keys that are made in a token and stay there. A key's name is its CKA_ID, 16 random octets.
type KeyStore struct{ o KeyStoreOptions }

var (
	_ ca.KeyStore = (*KeyStore)(nil)
	_ ca.Reporter = (*KeyStore)(nil)
)

var refForm = regexp.MustCompile(`^pkcs11-([0-9a-f]{32})$`)

// specs are the kinds of keys that tokens make here.
var specs = map[ca.KeySpec]hsm.Spec{ca.P256: hsm.P256, ca.P384: hsm.P384, ca.RSA2048: hsm.RSA2048, ca.RSA3072: hsm.RSA3072, ca.RSA4096: hsm.RSA4096}

// OpenKeyStore asks the token for nothing: one that is away keeps nobody from starting.
func OpenKeyStore(o KeyStoreOptions) (*KeyStore, error) {
	if o.Token == nil {
		return nil, errNoToken
	}
	if o.Label == "" {
		o.Label = "kedge-issuing"
	}
	return &KeyStore{o}, nil
}

// Create makes a key on the token.
func (s *KeyStore) Create(ctx context.Context, spec ca.KeySpec) (string, crypto.Signer, error) {
	kind, known := specs[spec]
	if !known {
		return "", nil, fmt.Errorf("making a key on a token: the key type %.40q is unknown: use %s, %s, %s, %s or %s", spec, ca.P256, ca.P384, ca.RSA2048, ca.RSA3072, ca.RSA4096)
	}
	if err := ctx.Err(); err != nil {
		return "", nil, fmt.Errorf("making a %s key on a token: %w", spec, err)
	}
	id := make([]byte, 16)
	rand.Read(id) // never fails
	signer, key, err := s.o.Token.Generate(ctx, kind, s.o.Label+"-"+hex.EncodeToString(id[:4]), id)
	if err != nil {
		return "", nil, err
	}
	if err := Acceptable(key, s.o.AllowExportable); err != nil {
		return "", nil, errors.Join(err, s.o.Token.Delete(ctx, id))
	}
	return "pkcs11-" + hex.EncodeToString(id), signer, nil
}

// Open finds the key on the token. Without such a key the error wraps fs.ErrNotExist.
func (s *KeyStore) Open(ctx context.Context, ref string) (crypto.Signer, error) {
	id, err := s.id(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("opening a key on a token: %w", err)
	}
	signer, key, err := s.o.Token.FindID(ctx, id)
	if errors.Is(err, hsm.ErrNotFound) {
		return nil, fmt.Errorf("%w: %w", err, fs.ErrNotExist)
	}
	if err != nil {
		return nil, err
	}
	if err := Acceptable(key, s.o.AllowExportable); err != nil {
		return nil, err
	}
	return signer, nil
}

// Delete destroys the key.
func (s *KeyStore) Delete(ctx context.Context, ref string) error {
	id, err := s.id(ctx, ref)
	if err != nil {
		return fmt.Errorf("deleting a key on a token: %w", err)
	}
	return s.o.Token.Delete(ctx, id)
}

// id lets nothing but what Create returned name a key: a token has others, too.
func (s *KeyStore) id(ctx context.Context, ref string) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	form := refForm.FindStringSubmatch(ref)
	if form == nil {
		return nil, fmt.Errorf("%.80q is no name of a key that was made there", ref)
	}
	return hex.DecodeString(form[1])
}

// Problem says why the token cannot be used now.
func (s *KeyStore) Problem() error { return s.o.Token.Problem() }
