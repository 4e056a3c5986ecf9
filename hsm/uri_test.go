package hsm

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
)

func TestURIsAreReadAsRFC7512HasThem(t *testing.T) {
	u, err := ParseURI("pkcs11:token=My%20Token;serial=01AB;object=issuing%3B1;id=%01%fe;type=private?module-path=/usr/lib/m.so&pin-source=file:/run/pin")
	if err != nil {
		t.Fatal(err)
	}
	if u.Token != "My Token" || u.Serial != "01AB" || u.Object != "issuing;1" || !bytes.Equal(u.ID, []byte{1, 0xfe}) || u.ModulePath != "/usr/lib/m.so" || u.PINSource.File != "/run/pin" {
		t.Errorf("it was read as %+v", u)
	}
	for text, want := range map[string]PINSource{"file:/p": {File: "/p"}, "file:///p": {File: "/p"}, "/p": {File: "/p"}, "env:PIN": {Variable: "PIN"}} {
		if u, err := ParseURI("pkcs11:?pin-source=" + text); err != nil || u.PINSource != want {
			t.Errorf("%s: %+v, %v", text, u.PINSource, err)
		}
	}
}

func TestURIsThatSayTooLittleOrTooMuchAreRefused(t *testing.T) {
	for text, want := range map[string]string{
		"token=a":                            "does not begin with",
		"pkcs11:token=a;token=b":             "given twice",
		"pkcs11:tokn=a":                      "unknown attribute",
		"pkcs11:token=":                      "is empty",
		"pkcs11:token":                       "name=value",
		"pkcs11:slot-id=3":                   "slots move",
		"pkcs11:type=cert":                   "only private keys sign",
		"pkcs11:token=a%0":                   "two hexadecimal digits",
		"pkcs11:token=a b":                   "write %20",
		"pkcs11:token=a%00":                  "zero byte",
		"pkcs11:module-path=m":               "behind the question mark",
		"pkcs11:token=a?module-path=m.so":    "not an absolute path",
		"pkcs11:token=a?module-name=softhsm": "name the file",
		"pkcs11:token=a?pin-source=pin":      "pin-source is none of",
		"pkcs11:token=a?pin-value=hush":      "a secret does not belong",
	} {
		_, err := ParseURI(text)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func FuzzURI(f *testing.F) {
	f.Add("pkcs11:token=My%20Token;id=%01?module-path=/m.so&pin-source=env:PIN")
	f.Fuzz(func(t *testing.T, text string) {
		u, err := ParseURI(text)
		if err != nil {
			return
		}
		again, err := ParseURI(u.String())
		if err != nil || again.String() != u.String() || !bytes.Equal(again.ID, u.ID) {
			t.Errorf("%q became %q, and that %q: %v", text, u, again, err)
		}
	})
}

func FuzzFrame(f *testing.F) {
	f.Add(appendFrame(nil, frame{kind: kindSign, id: 7, generation: 2, digest: []byte("digest"), payload: []byte("payload")}))
	f.Add([]byte{0, 0, 0, 20, 99})
	f.Fuzz(func(t *testing.T, stream []byte) {
		got, err := readFrame(bytes.NewReader(stream))
		if err != nil {
			return
		}
		n := 4 + int(binary.BigEndian.Uint32(stream))
		if !bytes.Equal(appendFrame(nil, got), stream[:n]) {
			t.Errorf("a frame was read as another: %+v", got)
		}
	})
}
