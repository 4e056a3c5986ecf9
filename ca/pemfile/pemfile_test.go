package pemfile

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func certificate(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: certificateType, Bytes: der})
}

func TestNothingInAFileOfCertificatesIsPassedOver(t *testing.T) {
	one, two := certificate(t), certificate(t)
	path := filepath.Join(t.TempDir(), "file.pem")
	for name, test := range map[string]struct {
		text  []byte
		count int
		says  string
	}{
		"two, and what people leave between": {bytes.Join([][]byte{[]byte("# ours\n"), one, []byte("\nnext:\n"), two}, nil), 2, ""},
		"one twice":                          {append(bytes.Clone(one), one...), 2, ""},
		"one that is cut off":                {append(bytes.Clone(one), two[:len(two)-9]...), 0, "2 PEM blocks begin in it and 1 can be read"},
		"a key among them":                   {append(bytes.Clone(one), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"...), 0, `it holds a PEM block "PRIVATE KEY"`},
		"what is none":                       {append(bytes.Clone(one), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"...), 0, "its certificate number 2: x509: "},
		"nothing":                            {nil, 0, "has no certificate in PEM"},
		"more than is looked at":             {make([]byte, maxFile+1), 0, "is not a file of at most"},
	} {
		if err := os.WriteFile(path, test.text, 0o600); err != nil {
			t.Fatal(err)
		}
		all, err := ReadCertificates(path)
		if len(all) != test.count || (err == nil) != (test.says == "") || err != nil && (!strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), path)) {
			t.Errorf("%s: %d certificates, %v, want %d and %q", name, len(all), err, test.count, test.says)
		}
	}
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadCertificates(pipe); err == nil || !strings.Contains(err.Error(), pipe+" is not a file") {
		t.Errorf("of a pipe it says %v", err)
	}
}

// FuzzCertificates: what is taken from a text is in it.
func FuzzCertificates(f *testing.F) {
	f.Add(certificate(f))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"))
	f.Fuzz(func(t *testing.T, text []byte) {
		all, err := Certificates(text)
		if begun := bytes.Count(text, []byte("-----BEGIN ")); err == nil && len(all) != begun || err != nil && len(all) > 0 {
			t.Errorf("%d certificates of %d blocks, %v", len(all), begun, err)
		}
	})
}
