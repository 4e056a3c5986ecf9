package config

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

func TestATemplateHasEachKeyThatCountsWithItsCommentAndLoadReadsItBack(t *testing.T) {
	for name, test := range map[string]struct {
		keys        map[string]string
		has, hasNot []string
	}{
		"file":    {keys: map[string]string{"root.kind": "file"}, has: []string{"  file:\n", "passphraseFile: \"\""}, hasNot: []string{"vault:", "pkcs11:", "cacerts:", "foreignWindow"}},
		"cacerts": {keys: map[string]string{"root.kind": "cacerts", "root.cacerts.dir": "/etc/cacerts"}, has: []string{"    dir: /etc/cacerts\n", "foreignWindow: 90d"}, hasNot: []string{"vault:", "  file:"}},
		"vault": {keys: map[string]string{"root.kind": "vault", "vault.address": "https://vault.example:8200", "vault.login.token": "/t", "issuingCA.keyStore": "memory"},
			has: []string{"address: https://vault.example:8200", "    token: /t", "# URL of the server", "keyStore: memory"}, hasNot: []string{"pkcs11:", "passphraseFile"}},
		"pkcs11": {keys: map[string]string{"root.kind": "pkcs11", "root.pkcs11.uri": "pkcs11:token=a;object=b?module-path=/m.so&pin-source=file:/p", "root.pkcs11.certificateFile": "/r.pem",
			"csr.listen": "0.0.0.0:15012"}, has: []string{"sessions: 16", "listen: 0.0.0.0:15012"}, hasNot: []string{"vault:"}},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := FromKeys(test.keys, t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Validate(); err != nil {
				t.Fatal(err)
			}
			var text bytes.Buffer
			if err := c.WriteTemplate(&text); err != nil {
				t.Fatal(err)
			}
			again, err := Load(write(t, text.String()))
			if err != nil {
				t.Fatalf("%v\n%s", err, text.String())
			}
			if !reflect.DeepEqual(again, c) {
				t.Errorf("it was read back as something else:\n%s", text.String())
			}
			for _, want := range test.has {
				if !strings.Contains(text.String(), want) {
					t.Errorf("it lacks %q:\n%s", want, text.String())
				}
			}
			for _, not := range test.hasNot {
				if strings.Contains(text.String(), "\n"+not) || strings.Contains(text.String(), "\n  "+not) {
					t.Errorf("it has %q:\n%s", not, text.String())
				}
			}
			for line := range strings.Lines(text.String()) {
				if strings.HasPrefix(strings.TrimSpace(line), "# ") && len(line) > commentWidth+30 {
					t.Errorf("a comment has a line of %d characters", len(line))
				}
			}
		})
	}
}

func TestKeysOfACommandLineAreReadAsStrictlyAsAFile(t *testing.T) {
	for key, want := range map[string]string{"root.knd": "the nearest valid one is root.kind", "root.kind.x": "expected", "csr.listen": "expected text"} {
		value := "[a]"
		if _, err := FromKeys(map[string]string{key: value}, t.TempDir()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", key, err)
		}
	}
}
