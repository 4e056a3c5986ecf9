package file

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"hash"
	"unsafe"
)

// Encrypted PKCS#8 (RFC 5958 3, EncryptedPrivateKeyInfo) with PBES2 (RFC 8018 6.2): PBKDF2 and AES-CBC.

// The cost of guessing a passphrase, as it is written (OWASP's number for PBKDF2 with HMAC-SHA-256) and as it is read:
// SP 800-132 wants at least a thousand; above the maximum a hostile file would only keep the CPU busy.
const (
	iterations    = 600_000
	minIterations = 1_000
	maxIterations = 10_000_000
)

// The lengths of a salt in octets, as read. 16 are written; openssl before 3.2 writes 8.
const (
	saltLength = 16
	minSalt    = 8
	maxSalt    = 128
)

// errPassphrase says that the decrypted octets are no key.
var errPassphrase = errors.New("the passphrase is wrong, or the file is damaged")

var (
	oidPBES2  = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}
	oidPBKDF2 = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}
)

// pseudoRandom are the functions that PBKDF2 may use (RFC 8018 B.1.2). HMAC does not suffer from SHA-1's collisions.
var pseudoRandom = []struct {
	oid  asn1.ObjectIdentifier
	name string
	hash func() hash.Hash
}{
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 9}, "hmacWithSHA256", sha256.New},
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 7}, "hmacWithSHA1", sha1.New}, // the DEFAULT when a file names none
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 8}, "hmacWithSHA224", sha256.New224},
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 10}, "hmacWithSHA384", sha512.New384},
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 11}, "hmacWithSHA512", sha512.New},
}

// ciphers are the encryption schemes (RFC 8018 B.2.5).
var ciphers = []struct {
	oid       asn1.ObjectIdentifier
	name      string
	keyLength int
}{
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}, "aes-256-cbc", 32},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 22}, "aes-192-cbc", 24},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 2}, "aes-128-cbc", 16},
}

type encryptedPrivateKeyInfo struct {
	Algorithm pkix.AlgorithmIdentifier
	Data      []byte
}

type pbes2Params struct {
	KeyDerivation pkix.AlgorithmIdentifier
	Encryption    pkix.AlgorithmIdentifier
}

type pbkdf2Params struct {
	Salt       []byte
	Iterations int
	KeyLength  int                      `asn1:"optional"`
	PRF        pkix.AlgorithmIdentifier `asn1:"optional"`
}

// sealed is an encrypted key that was taken apart and whose parameters are within bounds.
type sealed struct {
	salt       []byte
	iterations int
	hash       func() hash.Hash
	keyLength  int
	iv         []byte
	data       []byte
}

// parseSealed takes an EncryptedPrivateKeyInfo apart.
func parseSealed(der []byte) (*sealed, error) {
	var info encryptedPrivateKeyInfo
	if err := unmarshal(der, &info, "EncryptedPrivateKeyInfo"); err != nil {
		return nil, err
	}
	if !info.Algorithm.Algorithm.Equal(oidPBES2) {
		return nil, fmt.Errorf("it is encrypted with the scheme %s, and only PBES2 is read", info.Algorithm.Algorithm)
	}
	var params pbes2Params
	if err := unmarshal(info.Algorithm.Parameters.FullBytes, &params, "PBES2-params"); err != nil {
		return nil, err
	}
	if !params.KeyDerivation.Algorithm.Equal(oidPBKDF2) {
		return nil, fmt.Errorf("its key derivation is %s, and only PBKDF2 is read", params.KeyDerivation.Algorithm)
	}
	var kdf pbkdf2Params
	if err := unmarshal(params.KeyDerivation.Parameters.FullBytes, &kdf, "PBKDF2-params"); err != nil {
		return nil, err
	}
	s := &sealed{salt: kdf.Salt, iterations: kdf.Iterations, data: info.Data}
	for _, c := range ciphers {
		if c.oid.Equal(params.Encryption.Algorithm) {
			s.keyLength = c.keyLength
		}
	}
	if s.keyLength == 0 {
		return nil, fmt.Errorf("its cipher is %s, and only AES in CBC mode is read", params.Encryption.Algorithm)
	}
	if err := unmarshal(params.Encryption.Parameters.FullBytes, &s.iv, "the cipher's initialization vector"); err != nil {
		return nil, err
	}
	if kdf.PRF.Algorithm == nil {
		s.hash = sha1.New
	}
	for _, f := range pseudoRandom {
		if f.oid.Equal(kdf.PRF.Algorithm) {
			s.hash = f.hash
		}
	}
	switch {
	case s.hash == nil:
		return nil, fmt.Errorf("its PBKDF2 uses %s, and only HMAC with SHA-1 or SHA-2 is read", kdf.PRF.Algorithm)
	case kdf.KeyLength != 0 && kdf.KeyLength != s.keyLength:
		return nil, fmt.Errorf("its PBKDF2 derives %d octets for a cipher that takes %d", kdf.KeyLength, s.keyLength)
	case s.iterations < minIterations || s.iterations > maxIterations:
		return nil, fmt.Errorf("its PBKDF2 has %d iterations, and %d to %d are read", s.iterations, minIterations, maxIterations)
	case len(s.salt) < minSalt || len(s.salt) > maxSalt:
		return nil, fmt.Errorf("its PBKDF2 has a salt of %d octets, and %d to %d are read", len(s.salt), minSalt, maxSalt)
	case len(s.iv) != aes.BlockSize:
		return nil, fmt.Errorf("its initialization vector has %d octets instead of %d", len(s.iv), aes.BlockSize)
	case len(s.data) == 0 || len(s.data)%aes.BlockSize != 0:
		return nil, fmt.Errorf("its encrypted data has %d octets, which is no multiple of %d", len(s.data), aes.BlockSize)
	}
	return s, nil
}

// unmarshal reads exactly one DER value.
func unmarshal(der []byte, value any, what string) error {
	rest, err := asn1.Unmarshal(der, value)
	if err != nil {
		return fmt.Errorf("reading its %s: %w", what, err)
	}
	if len(rest) != 0 {
		return fmt.Errorf("reading its %s: %d octets too many", what, len(rest))
	}
	return nil
}

// open decrypts. What it returns is the key, and the caller's to wipe; errPassphrase when the padding is wrong. CBC proves
// nothing else: whoever uses the key compares it with what it should be.
func (s *sealed) open(phrase []byte) ([]byte, error) {
	block, err := deriveCipher(phrase, s.salt, s.iterations, s.hash, s.keyLength)
	if err != nil {
		return nil, err
	}
	clearText := make([]byte, len(s.data))
	cipher.NewCBCDecrypter(block, s.iv).CryptBlocks(clearText, s.data)
	padding := int(clearText[len(clearText)-1]) // RFC 8018 6.1.1: n octets of value n
	if padding == 0 || padding > aes.BlockSize ||
		!bytes.Equal(clearText[len(clearText)-padding:], bytes.Repeat([]byte{byte(padding)}, padding)) {
		clear(clearText)
		return nil, errPassphrase
	}
	return clearText[:len(clearText)-padding], nil
}

// seal encrypts a PrivateKeyInfo with PBES2: PBKDF2 with HMAC-SHA-256 at that many iterations, and AES-256-CBC.
func seal(der, phrase []byte, iterations int) ([]byte, error) {
	random := make([]byte, saltLength+aes.BlockSize)
	rand.Read(random) // never fails: the process ends first
	salt, iv := random[:saltLength], random[saltLength:]
	block, err := deriveCipher(phrase, salt, iterations, pseudoRandom[0].hash, ciphers[0].keyLength)
	if err != nil {
		return nil, err
	}
	padding := aes.BlockSize - len(der)%aes.BlockSize
	data := append(append(make([]byte, 0, len(der)+padding), der...), bytes.Repeat([]byte{byte(padding)}, padding)...)
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(data, data)

	kdf, err := algorithm(oidPBKDF2, pbkdf2Params{Salt: salt, Iterations: iterations,
		PRF: pkix.AlgorithmIdentifier{Algorithm: pseudoRandom[0].oid, Parameters: asn1.NullRawValue}})
	if err != nil {
		return nil, err
	}
	encryption, err := algorithm(ciphers[0].oid, iv)
	if err != nil {
		return nil, err
	}
	scheme, err := algorithm(oidPBES2, pbes2Params{KeyDerivation: kdf, Encryption: encryption})
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(encryptedPrivateKeyInfo{Algorithm: scheme, Data: data})
}

func algorithm(oid asn1.ObjectIdentifier, params any) (pkix.AlgorithmIdentifier, error) {
	der, err := asn1.Marshal(params)
	return pkix.AlgorithmIdentifier{Algorithm: oid, Parameters: asn1.RawValue{FullBytes: der}}, err
}

// deriveCipher is PBKDF2 and the key schedule. The passphrase is not copied on the way: pbkdf2 wants a string, and a string
// made in the usual way could not be wiped.
func deriveCipher(phrase, salt []byte, iterations int, h func() hash.Hash, keyLength int) (cipher.Block, error) {
	key, err := pbkdf2.Key(h, unsafe.String(unsafe.SliceData(phrase), len(phrase)), salt, iterations, keyLength)
	if err != nil {
		return nil, fmt.Errorf("deriving the key that encrypts it (PBKDF2): %w", err)
	}
	defer clear(key)
	return aes.NewCipher(key)
}
