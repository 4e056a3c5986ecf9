package vault

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
)

// key is a version of a Transit key. It may be used from several goroutines at once.
type key struct {
	store *KeyStore
	name  name
	pub   crypto.PublicKey
}

// Public returns the public key, as it was when the key was opened.
func (k *key) Public() crypto.PublicKey { return k.pub }

// Sign has Vault sign a digest of SHA-256, SHA-384 or SHA-512: ECDSA in ASN.1, or RSA by PKCS #1 v1.5, which is what X.509 wants. The signature is
// verified before it is returned. It takes no longer than the store's SignTimeout.
func (k *key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := k.sign(digest, opts)
	if err != nil {
		return nil, fmt.Errorf("signing with the key %s in Vault: %w", k.name, err)
	}
	return signature, nil
}

func (k *key) sign(digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	hash := opts.HashFunc()
	if _, pss := opts.(*rsa.PSSOptions); pss || hashes[hash] == "" || len(digest) != hash.Size() {
		return nil, fmt.Errorf("a %T of %d octets cannot be signed: it signs digests of SHA-256, SHA-384 and SHA-512, and RSA by PKCS #1 v1.5", opts, len(digest))
	}
	order := map[string]any{
		"input": base64.StdEncoding.EncodeToString(digest), "prehashed": true, "hash_algorithm": hashes[hash], "key_version": k.name.version,
	}
	if _, elliptic := k.pub.(*ecdsa.PublicKey); elliptic {
		order["marshaling_algorithm"] = "asn1"
	} else {
		order["signature_algorithm"] = "pkcs1v15"
	}
	var answer struct {
		Data struct {
			Signature string `json:"signature"`
		} `json:"data"`
	}
	s := k.store
	ctx, cancel := context.WithTimeout(s.ctx, s.o.SignTimeout)
	defer cancel()
	if err := s.o.Client.write(ctx, s.o.SignTimeout, s.o.Mount+"/sign/"+k.name.key, order, &answer); err != nil {
		return nil, k.why(ctx, err)
	}
	encoded, err := cut(answer.Data.Signature, k.name.version)
	if err != nil {
		return nil, err
	}
	signature, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return nil, fmt.Errorf("the signature is not in base64: %w", err)
	}
	if !verifies(k.pub, hash, digest, signature) {
		return nil, errors.New("the signature that Vault made is wrong under the key's public key, and is not used: the key was restored from another, or what answers there is no Vault")
	}
	return signature, nil
}

// why asks for the key's state when Vault refuses to sign for another reason than the token and its own health, and says what is wrong with the key.
func (k *key) why(ctx context.Context, err error) error {
	r := refused(err)
	if r == nil || isDenied(err) || isMountGone(r) || r.isBusy() {
		return err
	}
	state, reason := k.store.read(ctx, k.name)
	if reason == nil {
		reason = state.usable(k.name, k.store.path(k.name))
	}
	return cmp.Or(reason, err)
}

func verifies(pub crypto.PublicKey, hash crypto.Hash, digest, signature []byte) bool {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(pub, digest, signature)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(pub, hash, digest, signature) == nil
	}
	return false
}
