package file

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/ca"
	"kedge/ca/contracttest"
)

func openKeyStore(t *testing.T, o KeyStoreOptions) *KeyStore {
	t.Helper()
	store, err := OpenKeyStore(o)
	if err != nil {
		t.Fatalf("OpenKeyStore: %v", err)
	}
	return store
}

func reopen(t *testing.T, store ca.KeyStore) ca.KeyStore {
	s := store.(*KeyStore)
	return openKeyStore(t, KeyStoreOptions{Dir: s.dir, PassphraseFile: s.passphrase.path})
}

func TestKeyStoreKeepsTheContract(t *testing.T) {
	t.Parallel()
	contracttest.KeyStore(t, func(t *testing.T) ca.KeyStore {
		return openKeyStore(t, KeyStoreOptions{Dir: filepath.Join(t.TempDir(), "keys")})
	}, reopen, map[string]func(ca.KeyStore) contracttest.Fault{
		"its folder away": func(store ca.KeyStore) contracttest.Fault { return folderAway(store.(*KeyStore).dir) },
	}, contracttest.AllKeySpecs...)
}

func TestANewKeyIsEncryptedAsOpenSSLReadsIt(t *testing.T) {
	t.Parallel() // 600,000 iterations take a while under the race detector
	phrase := writePassphrase(t, "open sesame\n")
	store := openKeyStore(t, KeyStoreOptions{Dir: filepath.Join(t.TempDir(), "keys"), PassphraseFile: phrase})
	ref, key, err := store.Create(t.Context(), ca.P384)
	if err != nil {
		t.Fatalf("Create: %v", err)
	}
	if info, err := os.Stat(store.path(ref)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key file: %v, %v", info.Mode(), err)
	}
	want, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if got := openssl(t, "pkey", "-in", store.path(ref), "-passin", "file:"+phrase, "-pubout", "-outform", "DER"); !bytes.Equal(got, want) {
		t.Error("openssl reads another key")
	}
	text := string(openssl(t, "asn1parse", "-in", store.path(ref)))
	for _, part := range []string{"PBES2", "PBKDF2", fmt.Sprintf("%X", iterations), "hmacWithSHA256", "aes-256-cbc"} {
		if !strings.Contains(text, part) {
			t.Errorf("the key is not encrypted with %s:\n%s", part, text)
		}
	}
}

func TestAKeyEncryptedWithAnotherPassphraseIsNoUnknownKey(t *testing.T) {
	store := openKeyStore(t, KeyStoreOptions{Dir: t.TempDir()})
	ref, _, err := store.Create(t.Context(), ca.P256)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(store.path(ref))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(store.path(ref), sealText(t, text, "right"), 0o600); err != nil {
		t.Fatal(err)
	}
	for phrase, want := range map[string]error{"right": nil, "wrong": errPassphrase} {
		store := openKeyStore(t, KeyStoreOptions{Dir: store.dir, PassphraseFile: writePassphrase(t, phrase)})
		if _, err := store.Open(t.Context(), ref); !errors.Is(err, want) || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Open with the %s passphrase: %v", phrase, err)
		}
	}
}

func TestAKeyFileThatIsNotWhatItsNameSaysIsRefused(t *testing.T) {
	store := openKeyStore(t, KeyStoreOptions{Dir: t.TempDir()})
	one, _, err := store.Create(t.Context(), ca.P256)
	if err != nil {
		t.Fatal(err)
	}
	two, _, err := store.Create(t.Context(), ca.P256)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(store.path(one), store.path(two)); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(t.Context(), two); err == nil || !strings.Contains(err.Error(), "swapped") {
		t.Errorf("Open: %v", err)
	}
	if err := os.Chmod(store.path(two), 0o604); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(t.Context(), two); err == nil || !strings.Contains(err.Error(), "chmod 600 "+store.path(two)) {
		t.Errorf("Open of a file that others may read: %v", err)
	}
	if err := os.Remove(store.path(two)); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(store.path(two), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(t.Context(), two); err == nil {
		t.Error("Open gave a key from a folder")
	}
}

func TestAFullOrUnwritableFolderFailsCleanly(t *testing.T) {
	dir := t.TempDir()
	store := openKeyStore(t, KeyStoreOptions{Dir: dir})
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if _, _, err := store.Create(t.Context(), ca.P256); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("Create in a folder that is gone: %v", err)
	}
}

func TestThePassphraseFileIsCheckedAtOnce(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		mode os.FileMode
		want string // in the error; "": it is fine
	}{
		"one line":             {"open sesame\n", 0o600, ""},
		"without its end":      {"open sesame", 0o400, ""},
		"of Windows":           {"open sesame\r\n", 0o600, ""},
		"given to the fsGroup": {"open sesame", 0o440, ""},
		"empty":                {"", 0o600, "is empty"},
		"only an end":          {"\n", 0o600, "is empty"},
		"two lines":            {"one\ntwo\n", 0o600, "more than one line"},
		"a NUL":                {"one\x00two", 0o600, "NUL"},
		"readable by all":      {"open sesame", 0o644, "chmod 600"},
		"writable by group":    {"open sesame", 0o660, "chmod 600"},
		"huge":                 {strings.Repeat("a", maxFile+1), 0o600, "octets"},
	} {
		t.Run(name, func(t *testing.T) {
			path := writePassphrase(t, c.text)
			if err := os.Chmod(path, c.mode); err != nil {
				t.Fatal(err)
			}
			_, err := OpenKeyStore(KeyStoreOptions{Dir: t.TempDir(), PassphraseFile: path})
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				phrase, err := passphrase{path: path}.read()
				if err != nil || string(phrase) != "open sesame" {
					t.Errorf("%q, %v", phrase, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("the error does not say %q and which file: %v", c.want, err)
			} else if strings.Contains(err.Error(), "sesame") {
				t.Errorf("the error holds the passphrase: %v", err)
			}
		})
	}
	if _, err := OpenKeyStore(KeyStoreOptions{Dir: t.TempDir(), PassphraseFile: "/nowhere/it/is"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a passphrase file that is not there: %v", err)
	}
}

func TestTheFileOfAKeyIsWhatABackupHolds(t *testing.T) {
	t.Parallel()
	phrase := writePassphrase(t, "open sesame\n")
	for _, passphrase := range []string{"", phrase} {
		store := openKeyStore(t, KeyStoreOptions{Dir: filepath.Join(t.TempDir(), "keys"), PassphraseFile: passphrase})
		ref, key, err := store.Create(t.Context(), ca.P256)
		if err != nil {
			t.Fatal(err)
		}
		kept, err := store.File(t.Context(), ref)
		if err != nil || kept.Clear != (passphrase == "") {
			t.Fatalf("%+v, %v", kept, err)
		}
		other := openKeyStore(t, KeyStoreOptions{Dir: filepath.Join(t.TempDir(), "keys"), PassphraseFile: passphrase})
		put(t, other.dir, map[string][]byte{kept.Name: kept.Content})
		again, err := other.Open(t.Context(), ref)
		if err != nil || !again.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(key.Public()) {
			t.Errorf("in another folder: %v", err)
		}
		if _, err := store.File(t.Context(), strings.Repeat("0", 64)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a key that is not there: %v", err)
		}
		if _, err := store.File(t.Context(), "../root/root-key"); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a name that is none: %v", err)
		}
	}
}
