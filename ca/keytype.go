package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"fmt"
)

// keyType names the type of a public key for people: P-256, RSA-2048, Ed25519.
func keyType(pub crypto.PublicKey) string {
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
