package file

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kedge/ca"
)

func openssl(t *testing.T, args ...string) []byte {
	t.Helper()
	var stderr bytes.Buffer
	command := exec.Command("openssl", args...)
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return out
}

func TestOpenSSLReadsWhatWasWritten(t *testing.T) {
	for _, spec := range []ca.KeySpec{ca.P256, ca.P384, ca.RSA2048} {
		t.Run(string(spec), func(t *testing.T) {
			key, err := ca.GenerateKey(spec)
			if err != nil {
				t.Fatal(err)
			}
			want, err := x509.MarshalPKIXPublicKey(key.Public())
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "key.pem")
			if err := writeKey(path, key, passphrase{}); err != nil {
				t.Fatal(err)
			}
			if got := openssl(t, "pkey", "-in", path, "-pubout", "-outform", "DER"); !bytes.Equal(got, want) {
				t.Error("openssl reads another key")
			}
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			phrase := writePassphrase(t, "open sesame\n")
			if err := os.WriteFile(path, sealText(t, text, "open sesame"), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := openssl(t, "pkey", "-in", path, "-passin", "file:"+phrase, "-pubout", "-outform", "DER"); !bytes.Equal(got, want) {
				t.Error("openssl reads another key from the encrypted file")
			}
		})
	}
}

func TestWhatOpenSSLWroteIsRead(t *testing.T) {
	phrase := writePassphrase(t, "open sesame")
	dir := t.TempDir()
	for kind, generate := range map[string][]string{
		"P-256":    {"genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"},
		"RSA-2048": {"genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"},
	} {
		plain := filepath.Join(dir, kind+".pem")
		openssl(t, append(generate, "-out", plain)...)
		want := openssl(t, "pkey", "-in", plain, "-pubout", "-outform", "DER")
		for name, options := range map[string][]string{
			"openssl's defaults": {"-v2", "aes-256-cbc"},
			"as Kedge writes":    {"-v2", "aes-256-cbc", "-v2prf", "hmacWithSHA256", "-iter", "10000"},
			"AES-192, SHA-384":   {"-v2", "aes-192-cbc", "-v2prf", "hmacWithSHA384", "-iter", "5000"},
			"AES-128, SHA-512":   {"-v2", "aes-128-cbc", "-v2prf", "hmacWithSHA512", "-iter", "5000"},
			"SHA-224":            {"-v2", "aes-256-cbc", "-v2prf", "hmacWithSHA224", "-iter", "5000"},
			"SHA-1, the default": {"-v2", "aes-256-cbc", "-v2prf", "hmacWithSHA1", "-iter", "5000"},
			"clear":              {"-nocrypt"},
		} {
			t.Run(kind+" "+name, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "key.pem")
				openssl(t, append([]string{"pkcs8", "-topk8", "-in", plain, "-out", path, "-passout", "file:" + phrase}, options...)...)
				p := passphrase{path: phrase}
				if name == "clear" {
					p = passphrase{}
				}
				key, err := readKey(path, p)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := x509.MarshalPKIXPublicKey(key.Public()); err != nil || !bytes.Equal(got, want) {
					t.Errorf("another key was read, %v", err)
				}
			})
		}
	}
}

func TestWhatIsNotReadIsSaid(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain.pem")
	openssl(t, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", plain)
	phrase := writePassphrase(t, "open sesame")
	encrypt := []string{"pkcs8", "-topk8", "-in", plain, "-passout", "file:" + phrase}
	for name, c := range map[string]struct {
		command []string
		want    string
	}{
		"triple DES":         {append(encrypt, "-v2", "des3"), "only AES in CBC mode"},
		"scrypt":             {append(encrypt, "-scrypt"), "only PBKDF2"},
		"too few iterations": {append(encrypt, "-v2", "aes-256-cbc", "-iter", "999"), "999 iterations"},
		"a SEC 1 key":        {[]string{"ec", "-in", plain}, "EC PRIVATE KEY"},
		"Ed25519":            {[]string{"genpkey", "-algorithm", "ed25519", "-aes-256-cbc", "-pass", "file:" + phrase}, "RSA or ECDSA"},
		"a small RSA key":    {[]string{"genrsa", "-aes256", "-passout", "file:" + phrase, "1024"}, "1024 bits"},
		"a certificate":      {[]string{"req", "-x509", "-key", plain, "-subj", "/CN=x"}, "CERTIFICATE"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := decodeKey("key.pem", openssl(t, c.command...), passphrase{path: phrase})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the error does not say %q: %v", c.want, err)
			}
		})
	}
}

// TestAKeyThatIsEncryptedOtherwiseIsReadOnceTheCommandThatTheErrorNamesHasRun: openssl takes one file for both passphrases to hold two lines, so that there are two commands.
func TestAKeyThatIsEncryptedOtherwiseIsReadOnceTheCommandThatTheErrorNamesHasRun(t *testing.T) {
	dir, phrase := t.TempDir(), writePassphrase(t, "open sesame\n")
	plain := filepath.Join(dir, "plain.pem")
	openssl(t, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", plain)
	want := openssl(t, "pkey", "-in", plain, "-pubout", "-outform", "DER")
	for name, options := range map[string][]string{
		"triple DES":         {"-v2", "des3"},
		"scrypt":             {"-scrypt"},
		"PBES1":              {"-v1", "PBE-SHA1-3DES"},
		"too few iterations": {"-v2", "aes-256-cbc", "-iter", "999"},
		"in clear":           {"-nocrypt"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(name, " ", "-")+".pem")
			openssl(t, append([]string{"pkcs8", "-topk8", "-in", plain, "-out", path, "-passout", "file:" + phrase}, options...)...)
			if err := os.Chmod(path, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := readKey(path, passphrase{path: phrase})
			if err == nil || strings.Count(err.Error(), "'") != 2 {
				t.Fatalf("the error names no command: %v", err)
			}
			command := strings.Replace(strings.Split(err.Error(), "'")[1], "NEW", path+".new", 1)
			if out, err := exec.Command("sh", "-c", "set -e; umask 077; "+command+"; mv "+path+".new "+path).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", command, err, out)
			}
			key, err := readKey(path, passphrase{path: phrase})
			if err != nil {
				t.Fatal(err)
			}
			if got, err := x509.MarshalPKIXPublicKey(key.Public()); err != nil || !bytes.Equal(got, want) {
				t.Errorf("another key was read, %v", err)
			}
		})
	}
}

func TestHostileParametersAreRefusedBeforeAnythingIsComputed(t *testing.T) {
	good, err := seal([]byte("a key"), []byte("phrase"), minIterations)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(kdf *pbkdf2Params, iv *[]byte, data *[]byte)
		want   string
	}{
		"nothing":             {func(*pbkdf2Params, *[]byte, *[]byte) {}, ""},
		"the right key size":  {func(kdf *pbkdf2Params, _, _ *[]byte) { kdf.KeyLength = 32 }, ""},
		"too many iterations": {func(kdf *pbkdf2Params, _, _ *[]byte) { kdf.Iterations = maxIterations + 1 }, "iterations"},
		"absurd iterations":   {func(kdf *pbkdf2Params, _, _ *[]byte) { kdf.Iterations = 1<<63 - 1 }, "iterations"},
		"negative iterations": {func(kdf *pbkdf2Params, _, _ *[]byte) { kdf.Iterations = -1 }, "iterations"},
		"no salt":             {func(kdf *pbkdf2Params, _, _ *[]byte) { kdf.Salt = nil }, "salt of 0"},
		"a huge salt":         {func(kdf *pbkdf2Params, _, _ *[]byte) { kdf.Salt = make([]byte, maxSalt+1) }, "salt"},
		"a wrong key size":    {func(kdf *pbkdf2Params, _, _ *[]byte) { kdf.KeyLength = 1 << 40 }, "derives"},
		"another hash":        {func(kdf *pbkdf2Params, _, _ *[]byte) { kdf.PRF.Algorithm = oidPBES2 }, "only HMAC"},
		"a short IV":          {func(_ *pbkdf2Params, iv, _ *[]byte) { *iv = (*iv)[:15] }, "initialization vector"},
		"no data":             {func(_ *pbkdf2Params, _, data *[]byte) { *data = nil }, "0 octets"},
		"odd data":            {func(_ *pbkdf2Params, _, data *[]byte) { *data = (*data)[1:] }, "15 octets"},
	} {
		t.Run(name, func(t *testing.T) {
			var info encryptedPrivateKeyInfo
			var params pbes2Params
			var kdf pbkdf2Params
			var iv []byte
			for _, part := range []struct {
				of   *[]byte
				into any
			}{{&good, &info}, {&info.Algorithm.Parameters.FullBytes, &params},
				{&params.KeyDerivation.Parameters.FullBytes, &kdf}, {&params.Encryption.Parameters.FullBytes, &iv}} {
				if _, err := asn1.Unmarshal(*part.of, part.into); err != nil {
					t.Fatal(err)
				}
			}
			c.change(&kdf, &iv, &info.Data)
			encode := func(oid asn1.ObjectIdentifier, value any) pkix.AlgorithmIdentifier {
				identifier, err := algorithm(oid, value)
				if err != nil {
					t.Fatal(err)
				}
				return identifier
			}
			params.KeyDerivation, params.Encryption = encode(oidPBKDF2, kdf), encode(params.Encryption.Algorithm, iv)
			info.Algorithm = encode(oidPBES2, params)
			der, err := asn1.Marshal(info)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := parseSealed(der); c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("the error does not say %q: %v", c.want, err)
			}
			if _, err := parseSealed(append(der, 0)); err == nil {
				t.Error("trailing data was not noticed")
			}
		})
	}
}

func TestAWrongPassphraseIsSaidHoweverThePaddingLooks(t *testing.T) {
	key, err := ca.GenerateKey(ca.P256)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	sealedKey, err := seal(der, []byte("right"), minIterations)
	if err != nil {
		t.Fatal(err)
	}
	s, err := parseSealed(sealedKey)
	if err != nil {
		t.Fatal(err)
	}
	// Another initialization vector spoils the key and leaves the padding alone, which is what one wrong passphrase in 256 does.
	goodPadding := bytes.Replace(sealedKey, s.iv, make([]byte, len(s.iv)), 1)
	badPadding := bytes.Clone(sealedKey)
	badPadding[len(badPadding)-1] ^= 1
	for name, c := range map[string]struct {
		der    []byte
		phrase string
		want   error
	}{
		"the right one":  {sealedKey, "right", nil},
		"another phrase": {sealedKey, "wrong", errPassphrase},
		"a bad padding":  {badPadding, "right", errPassphrase},
		"a good padding": {goodPadding, "right", errPassphrase},
	} {
		text := pem.EncodeToMemory(&pem.Block{Type: sealedType, Bytes: c.der})
		if _, err := decodeKey("key.pem", text, passphrase{path: writePassphrase(t, c.phrase)}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzEncryptedKey(f *testing.F) {
	for _, secret := range []string{"", "0123456789abcdef", "a key"} {
		der, err := seal([]byte(secret), []byte("phrase"), minIterations)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(der)
		f.Add(der[:len(der)/2])
	}
	f.Add([]byte{0x30, 0x00})
	f.Fuzz(func(t *testing.T, der []byte) {
		s, err := parseSealed(der)
		if err != nil {
			return
		}
		if s.iterations < minIterations || s.iterations > maxIterations || len(s.iv) != 16 || len(s.data)%16 != 0 || len(s.data) == 0 {
			t.Fatalf("parameters out of bounds: %+v", s)
		}
		if s.iterations > 2*minIterations {
			return // legal, and slow
		}
		if text, err := s.open([]byte("phrase")); err == nil && len(text) >= len(s.data) {
			t.Fatalf("%d octets came out of %d", len(text), len(s.data))
		}
	})
}

func FuzzKeyFile(f *testing.F) {
	key, err := ca.GenerateKey(ca.P256)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pem.EncodeToMemory(&pem.Block{Type: clearType, Bytes: der}))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"))
	f.Add([]byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n-----END ENCRYPTED PRIVATE KEY-----\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, text []byte) {
		key, err := decodeKey("key.pem", bytes.Clone(text), passphrase{})
		if (key == nil) == (err == nil) {
			t.Fatalf("key %v and error %v", key, err)
		}
		if err == nil && ca.CheckAuthorityKey(key.Public()) != nil {
			t.Fatalf("a key that no CA has: %T", key)
		}
	})
}
