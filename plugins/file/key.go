package file

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"kedge/ca"
	"kedge/ca/atomicfile"
)

// The PEM types of a key file (RFC 7468 10 and 11).
const (
	clearType  = "PRIVATE KEY"
	sealedType = "ENCRYPTED PRIVATE KEY"
)

// encrypt is the command that encrypts a key as writeKey does.
var encrypt = fmt.Sprintf("openssl pkcs8 -topk8 -v2 aes-256-cbc -v2prf hmacWithSHA256 -iter %d", iterations)

// writeKey puts a key into a file, encrypted when there is a passphrase.
func writeKey(path string, key crypto.Signer, p passphrase) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encoding the key for %s: %w", path, err)
	}
	defer clear(der)
	block := &pem.Block{Type: clearType, Bytes: der}
	if p.path != "" {
		phrase, err := p.read()
		if err != nil {
			return err
		}
		defer clear(phrase)
		encrypted, err := seal(der, phrase, iterations)
		if err != nil {
			return fmt.Errorf("encrypting the key for %s: %w", path, err)
		}
		block = &pem.Block{Type: sealedType, Bytes: encrypted}
	}
	text := pem.EncodeToMemory(block)
	defer clear(text)
	return atomicfile.Write(path, text)
}

// readKey reads a key file.
func readKey(path string, p passphrase) (crypto.Signer, error) {
	text, err := read(path, 0o077, chmod(path))
	if err != nil {
		return nil, fmt.Errorf("the key file: %w", err)
	}
	defer clear(text)
	key, err := decodeKey(path, text, p)
	if err != nil {
		return nil, fmt.Errorf("the key file %s: %w", path, err)
	}
	return key, nil
}

// keyFileOf reads a key file without looking into it.
func keyFileOf(path string) (ca.KeyFile, error) {
	text, err := read(path, 0o077, chmod(path))
	if err != nil {
		return ca.KeyFile{}, fmt.Errorf("the key file: %w", err)
	}
	block, _ := pem.Decode(text)
	encrypted := block != nil && block.Type == sealedType
	if block != nil {
		clear(block.Bytes)
	}
	return ca.KeyFile{Name: filepath.Base(path), Content: text, Clear: !encrypted}, nil
}

// decodeKey reads the text of a key file. The path is only for what to do about it.
func decodeKey(path string, text []byte, p passphrase) (crypto.Signer, error) {
	block, rest := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("it is not PEM: restore it from a backup")
	}
	defer clear(block.Bytes)
	if strings.TrimSpace(string(rest)) != "" {
		return nil, errors.New("its PEM block is followed by further data: it must hold one key and nothing else")
	}
	if block.Type != clearType && block.Type != sealedType {
		return nil, fmt.Errorf("it is a PEM block %.40q: convert it with 'openssl pkcs8 -topk8 -nocrypt -in %s -out NEW', "+
			"or without -nocrypt to encrypt it", block.Type, path)
	}
	return openPKCS8(path, block, p)
}

// openPKCS8 reads a key out of a PEM block of PKCS#8, encrypted or not.
func openPKCS8(path string, block *pem.Block, p passphrase) (crypto.Signer, error) {
	der := block.Bytes
	switch {
	case block.Type == clearType && p.path != "":
		return nil, notEncrypted(path, p)
	case block.Type == sealedType && p.path == "":
		return nil, errors.New("it is encrypted and no passphrase file is configured: name the passphrase file in the configuration")
	case block.Type == sealedType:
		s, err := parseSealed(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: encrypt it anew with 'openssl pkey -in %s -passin file:%s | %s -passout file:%s -out NEW', and move NEW to its place", err, path, p.path, encrypt, p.path)
		}
		phrase, err := p.read()
		if err != nil {
			return nil, err
		}
		defer clear(phrase)
		if der, err = s.open(phrase); err != nil {
			return nil, fmt.Errorf("with the passphrase of %s: %w", p.path, err)
		}
		defer clear(der)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		if block.Type == sealedType {
			return nil, fmt.Errorf("with the passphrase of %s: %w", p.path, errPassphrase) // one wrong passphrase in 256 gives a valid padding
		}
		return nil, fmt.Errorf("it holds no PKCS#8 key: %w", err)
	}
	return authorityKey(parsed)
}

// notEncrypted refuses a key that is in clear though the configuration says that keys are not.
func notEncrypted(path string, p passphrase) error {
	return fmt.Errorf("it is not encrypted although a passphrase file is configured: encrypt it with '%s -in %s -passout file:%s -out NEW', move NEW to its place, and wipe the old one",
		encrypt, path, p.path)
}

// authorityKey makes sure that a CA can have the key.
func authorityKey(parsed any) (crypto.Signer, error) {
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("its key (%T) cannot sign", parsed)
	}
	if err := ca.CheckAuthorityKey(key.Public()); err != nil {
		return nil, fmt.Errorf("its key cannot be used: %w", err)
	}
	return key, nil
}
