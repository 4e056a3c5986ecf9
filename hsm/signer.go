package hsm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/big"
	"time"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// Signer is a private key on a token. It outlives the module, the child and the login: whatever happens to them, the key is found again by its public half (and by the id or the label that named it), and a signature
// that was waiting is asked for once more. Every signature is verified before it is returned.
type Signer struct {
	token  *Token
	public crypto.PublicKey
	asked  findRequest // for public, in DER, and for the label or the id by which it was found
	name   string      // of what is asked
	key    Key
}

var _ crypto.Signer = (*Signer)(nil)

// Public returns the public key.
func (s *Signer) Public() crypto.PublicKey { return s.public }

// Key is what the token said of the key when it was found.
func (s *Signer) Key() Key { return s.key }

// VerifiesSignatures says that what Sign returns was verified, so that nobody needs to do so again.
func (s *Signer) VerifiesSignatures() bool { return true }

// Sign signs a digest: ECDSA in ASN.1, or RSA as opts says (PKCS#1 v1.5, or PSS with a salt as long as the hash). It takes no longer than Options.Deadline and SignWait together.
func (s *Signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), s.token.o.Deadline+SignWait)
	defer cancel()
	return s.SignContext(ctx, digest, opts)
}

// SignWait is how long Sign waits for its turn and, once a call of the module has hung, for a new generation: those who wait for a signature have limits of their own.
const SignWait = 3 * time.Second

// SignContext is Sign with a limit of the caller's own. When a generation fails under it, it asks once more, whatever is signed: leaf, issuing CA, or what a ceremony makes. The digest is the same, and with it
// each octet that it stands for, a serial or a CRL's number among them: of two signatures over it one was lost, and were it found, it would certify nothing else.
func (s *Signer) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	request, err := s.request(digest, opts)
	if err != nil {
		return nil, err
	}
	var signature []byte
	err = s.token.do(ctx, func(g *generation) error {
		reference, err := s.reference(ctx, g)
		if err != nil {
			return err
		}
		own := request
		own.reference = reference
		leave, err := g.enter(ctx)
		if err != nil {
			return err
		}
		raw, err := g.ask(ctx, kindSign, digest, own.encode(), s.token.o.Deadline)
		leave()
		if err != nil {
			return err
		}
		signature, err = s.verified(own, digest, raw)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("signing with the %s on the token %s: %w", s.key, s.token.name(), err)
	}
	return signature, nil
}

func (s *Signer) request(digest []byte, opts crypto.SignerOpts) (r signRequest, err error) {
	r.hash = opts.HashFunc()
	if !r.hash.Available() || len(digest) != r.hash.Size() {
		return r, fmt.Errorf("signing with the %s: a digest of %d octets is not one of %v", s.key, len(digest), r.hash)
	}
	switch s.public.(type) {
	case *ecdsa.PublicKey:
		r.mechanism = mechanismECDSA
	case *rsa.PublicKey:
		r.mechanism = mechanismPKCS1
		if pss, ok := opts.(*rsa.PSSOptions); ok {
			r.mechanism, r.salt = mechanismPSS, uint16(r.hash.Size())
			if n := pss.SaltLength; n != rsa.PSSSaltLengthAuto && n != rsa.PSSSaltLengthEqualsHash && n != r.hash.Size() {
				return r, fmt.Errorf("signing with the %s: a PSS salt of %d octets: tokens take one as long as the hash, %d", s.key, n, r.hash.Size())
			}
		}
	default:
		return r, fmt.Errorf("signing with the %s: keys of this kind do not sign here", s.key)
	}
	return r, nil
}

// reference finds the key in a generation, once for all who ask, and makes sure that it is the same.
func (s *Signer) reference(ctx context.Context, g *generation) (uint32, error) {
	g.mu.Lock()
	f, there := g.found[s.name]
	if !there {
		f = &foundReference{done: make(chan struct{})}
		g.found[s.name] = f
	}
	g.mu.Unlock()
	if !there {
		go func() { // it is for all who wait, however long the first of them does
			f.reply, f.err = askFor[findReply](context.WithoutCancel(ctx), g, kindFind, s.asked, findLimit)
			if f.err == nil && !bytes.Equal(f.reply.Key.PublicDER, s.asked.Public) {
				f.err = errors.New("the child found another key than the one that was asked for")
			}
			if f.err != nil { // whoever comes later asks anew
				g.mu.Lock()
				delete(g.found, s.name)
				g.mu.Unlock()
			}
			close(f.done)
		}()
	}
	select {
	case <-f.done:
		return f.reply.Reference, f.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// errBadSignature says that a signature does not verify: the token, the module or the way between is broken.
var errBadSignature = errors.New("the signature that came back does not verify")

// verified turns what a module returns into what Go has, and verifies it.
func (s *Signer) verified(r signRequest, digest, raw []byte) ([]byte, error) {
	switch pub := s.public.(type) {
	case *ecdsa.PublicKey:
		octets := (pub.Curve.Params().BitSize + 7) / 8
		if len(raw) != 2*octets {
			return nil, fmt.Errorf("%w: it has %d octets instead of %d", errBadSignature, len(raw), 2*octets)
		}
		var b cryptobyte.Builder
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1BigInt(new(big.Int).SetBytes(raw[:octets]))
			b.AddASN1BigInt(new(big.Int).SetBytes(raw[octets:]))
		})
		signature, err := b.Bytes()
		if err != nil {
			return nil, err
		}
		if !ecdsa.VerifyASN1(pub, digest, signature) {
			return nil, errBadSignature
		}
		return signature, nil
	case *rsa.PublicKey:
		var err error
		if r.mechanism == mechanismPSS {
			err = rsa.VerifyPSS(pub, r.hash, digest, raw, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		} else {
			err = rsa.VerifyPKCS1v15(pub, r.hash, digest, raw)
		}
		if err != nil {
			return nil, errBadSignature
		}
		return raw, nil
	}
	return nil, errBadSignature
}

// prove signs something of no meaning.
func (s *Signer) prove(ctx context.Context) error {
	digest := sha256.Sum256([]byte("kedge: a key proves itself"))
	_, err := s.SignContext(ctx, digest[:], crypto.SHA256)
	return err
}
