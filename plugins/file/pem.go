package file

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"kedge/ca/pemfile"
)

// Files that others wrote.

const (
	crlType   = "X509 CRL"       // RFC 7468 6
	sec1Type  = "EC PRIVATE KEY" // RFC 5915 4
	pkcs1Type = "RSA PRIVATE KEY"
	curveType = "EC PARAMETERS" // what 'openssl ecparam -genkey' writes above the key
)

// decodeCRLs reads a file of certificate revocation lists.
func decodeCRLs(text []byte) ([]*x509.RevocationList, error) {
	blocks, err := pemfile.Blocks(text)
	if err != nil {
		return nil, err
	}
	var all []*x509.RevocationList
	for _, block := range blocks {
		if block.Type != crlType {
			return nil, fmt.Errorf("it holds a PEM block %.40q: only CRLs belong there", block.Type)
		}
		crl, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("its CRL number %d: %w", len(all)+1, err)
		}
		all = append(all, crl)
	}
	return all, nil
}

// decodeAnyKey reads a key in any form that has one on the way to Kedge: PKCS#8, encrypted PKCS#8, SEC1, PKCS#1. The path is only for what to do about it.
func decodeAnyKey(path string, text []byte, p passphrase) (crypto.Signer, error) {
	blocks, err := pemfile.Blocks(text)
	if err != nil {
		return nil, err
	}
	var block *pem.Block
	for _, b := range blocks {
		defer clear(b.Bytes)
		switch {
		case b.Type == curveType:
		case block != nil:
			return nil, errors.New("it holds more than one PEM block: it must hold one key and nothing else")
		default:
			block = b
		}
	}
	if block == nil {
		return nil, errors.New("it holds no PEM block: it must hold the CA's private key")
	}
	if block.Headers["DEK-Info"] != "" || block.Headers["Proc-Type"] != "" { // RFC 1421 4.6.1: without integrity, one round of MD5
		return nil, fmt.Errorf("it is encrypted in the old form of PEM (DEK-Info), which protects it badly: convert it with '%s -in %s -out NEW', and name the passphrase file in the "+
			"configuration", encrypt, path)
	}
	var parsed any
	switch block.Type {
	case clearType, sealedType:
		return openPKCS8(path, block, p)
	case sec1Type:
		parsed, err = x509.ParseECPrivateKey(block.Bytes)
	case pkcs1Type:
		parsed, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		return nil, fmt.Errorf("it is a PEM block %.40q: it must hold the CA's private key", block.Type)
	}
	if err != nil {
		return nil, fmt.Errorf("its %s: %w", block.Type, err)
	}
	if p.path != "" {
		return nil, notEncrypted(path, p)
	}
	return authorityKey(parsed)
}
