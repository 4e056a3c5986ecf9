// Package memory keeps signing keys in the memory of this process, and nowhere else: a restart begins with none, so the CA makes a new issuing CA
// then. That is for a root in a token or in Vault, which can certify one at any time: no copy of a signing key is ever on a disk.
package memory

import (
	"context"
	"crypto"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io/fs"
	"sync"

	"kedge/ca"
)

// KeyStore is a ca.KeyStore. The zero value is empty and ready. Its methods may be called at once from several goroutines.
type KeyStore struct {
	mu   sync.Mutex
	keys map[string]crypto.Signer
}

var _ ca.KeyStore = (*KeyStore)(nil)

// Create makes a key.
func (s *KeyStore) Create(ctx context.Context, spec ca.KeySpec) (string, crypto.Signer, error) {
	key, err := ca.GenerateKey(spec)
	if err == nil {
		err = ctx.Err() // an RSA key takes seconds to find
	}
	if err != nil {
		return "", nil, fmt.Errorf("making a key in memory: %w", err)
	}
	var id [16]byte
	rand.Read(id[:]) // never fails
	ref := "memory-" + hex.EncodeToString(id[:])
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys == nil {
		s.keys = map[string]crypto.Signer{}
	}
	s.keys[ref] = key
	return ref, key, nil
}

// Open returns the key of that name. After a restart there is none: the error wraps fs.ErrNotExist.
func (s *KeyStore) Open(ctx context.Context, ref string) (crypto.Signer, error) {
	if err := s.check(ctx, ref); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key, ok := s.keys[ref]
	if !ok {
		return nil, fmt.Errorf("the key %s was in the memory of another run of the program: %w", ref, fs.ErrNotExist)
	}
	return key, nil
}

// Delete forgets the key.
func (s *KeyStore) Delete(ctx context.Context, ref string) error {
	if err := s.check(ctx, ref); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.keys, ref)
	return nil
}

func (s *KeyStore) check(ctx context.Context, ref string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if id, ok := bytesOf(ref); !ok || len(id) != 16 {
		return fmt.Errorf("%.80q is no name of a key in memory", ref)
	}
	return nil
}

func bytesOf(ref string) ([]byte, bool) {
	const prefix = "memory-"
	if len(ref) != len(prefix)+32 || ref[:len(prefix)] != prefix {
		return nil, false
	}
	id, err := hex.DecodeString(ref[len(prefix):])
	return id, err == nil && hex.EncodeToString(id) == ref[len(prefix):]
}
