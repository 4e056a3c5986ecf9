package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
)

// GenerateKey makes a signing key in this process. The error names the kinds that there are.
func GenerateKey(spec KeySpec) (crypto.Signer, error) {
	switch spec {
	case P256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case P384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	case RSA3072:
		return rsa.GenerateKey(rand.Reader, 3072)
	case RSA4096:
		return rsa.GenerateKey(rand.Reader, 4096)
	}
	return nil, fmt.Errorf("the key type %.40q is unknown: use %s, %s, %s, %s or %s", spec, P256, P384, RSA2048, RSA3072, RSA4096)
}

// SpecOf is the kind of a public key; "" for one that authorities do not have.
func SpecOf(pub crypto.PublicKey) KeySpec {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		switch pub.Curve {
		case elliptic.P256():
			return P256
		case elliptic.P384():
			return P384
		}
	case *rsa.PublicKey:
		switch pub.N.BitLen() {
		case 2048:
			return RSA2048
		case 3072:
			return RSA3072
		case 4096:
			return RSA4096
		}
	}
	return ""
}

// KeyType names the type of a public key for people: P-256, RSA-2048, Ed25519.
func KeyType(pub crypto.PublicKey) string {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return k.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA-%d", k.N.BitLen())
	case ed25519.PublicKey:
		return "Ed25519"
	}
	if kind := fmt.Sprintf("%T", pub); kind != "*dsa.PublicKey" { // crypto/dsa is deprecated
		return kind
	}
	return "DSA"
}
