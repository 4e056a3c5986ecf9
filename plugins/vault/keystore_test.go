package vault

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/ca"
)

const keyName = "kedge-00112233445566778899aabbccddeeff"

// keyData is what Vault says of a Transit key with one version.
func keyData(t *testing.T, kind string, pub crypto.PublicKey, more map[string]any) map[string]any {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	text := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	all := map[string]any{"type": kind, "latest_version": 1, "min_decryption_version": 1, "min_encryption_version": 0,
		"keys": map[string]any{"1": map[string]any{"public_key": text}}}
	for name, value := range more {
		all[name] = value
	}
	return all
}

func openKeyStore(t *testing.T, o KeyStoreOptions) *KeyStore {
	t.Helper()
	o.PollInterval = time.Hour
	if o.SignTimeout == 0 {
		o.SignTimeout = time.Minute
	}
	s, err := OpenKeyStore(o)
	if err != nil {
		t.Fatalf("OpenKeyStore: %v", err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestASignatureThatIsWrongIsNeverReturned(t *testing.T) {
	f := newFake(t)
	own := newKey(t)
	f.on("GET transit/keys/"+keyName, data(keyData(t, "ecdsa-p256", own.Public(), nil)))
	s := openKeyStore(t, KeyStoreOptions{Client: f.client(t)})
	key, err := s.Open(t.Context(), keyName+":v1")
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("a certificate"))
	signed := func(prefix string, by crypto.Signer) http.HandlerFunc {
		signature, err := by.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		return data(map[string]any{"signature": prefix + base64.StdEncoding.EncodeToString(signature)})
	}
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   string // in the error; "": it is returned
	}{
		"right":               {signed("vault:v1:", own), ""},
		"of another key":      {signed("vault:v1:", newKey(t)), "is wrong under the key's public key"},
		"of another version":  {signed("vault:v2:", own), "not one of the version 1"},
		"of version 11":       {signed("vault:v11:", own), "not one of the version 1"},
		"without its version": {signed("", own), "not one of the version 1"},
		"not in base64":       {data(map[string]any{"signature": "vault:v1:*"}), "not in base64"},
		"empty":               {data(map[string]any{"signature": "vault:v1:"}), "is wrong"},
		"none":                {data(nil), "not one of the version 1"},
		"not JSON":            {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>")) }, "not the JSON"},
		"a page of a proxy's making": {func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "<html>bad gateway</html>", http.StatusBadGateway)
		}, "502"},
	} {
		t.Run(name, func(t *testing.T) {
			f.on("PUT transit/sign/"+keyName, c.answer)
			signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
			if c.want == "" && (err != nil || !ecdsa.VerifyASN1(own.Public().(*ecdsa.PublicKey), digest[:], signature)) {
				t.Errorf("error %v", err)
			}
			if c.want != "" && (err == nil || signature != nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("the error does not say %q: %v", c.want, err)
			}
		})
	}
}

func TestASignatureIsAskedForAsX509WantsIt(t *testing.T) {
	f := newFake(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	s := openKeyStore(t, KeyStoreOptions{Client: f.client(t)})
	for kind, own := range map[string]crypto.Signer{"ecdsa-p384": p384, "rsa-2048": rsa2048} {
		f.on("GET transit/keys/"+keyName, data(keyData(t, kind, own.Public(), nil)))
		key, err := s.Open(t.Context(), keyName+":v1")
		if err != nil {
			t.Fatal(err)
		}
		for hash, name := range hashes {
			var order map[string]any
			f.on("PUT transit/sign/"+keyName, func(w http.ResponseWriter, r *http.Request) {
				order = nil
				_ = json.NewDecoder(r.Body).Decode(&order)
				digest, _ := base64.StdEncoding.DecodeString(order["input"].(string))
				signature, err := own.Sign(rand.Reader, digest, hash)
				if err != nil {
					t.Error(err)
				}
				data(map[string]any{"signature": "vault:v1:" + base64.StdEncoding.EncodeToString(signature)})(w, r)
			})
			digest := hash.New()
			digest.Write([]byte("a certificate"))
			if _, err := key.Sign(rand.Reader, digest.Sum(nil), hash); err != nil {
				t.Errorf("%s with %s: %v", kind, hash, err)
			}
			if order["key_version"] != 1.0 || order["prehashed"] != true || order["hash_algorithm"] != name {
				t.Errorf("%s with %s: Vault was asked for %v", kind, hash, order)
			}
			if kind == "rsa-2048" && order["signature_algorithm"] != "pkcs1v15" || kind == "ecdsa-p384" && order["marshaling_algorithm"] != "asn1" {
				t.Errorf("%s with %s: Vault was asked for %v", kind, hash, order)
			}
		}
		for name, opts := range map[string]crypto.SignerOpts{"PSS": &rsa.PSSOptions{Hash: crypto.SHA256}, "SHA-1": crypto.SHA1, "no hash": crypto.Hash(0), "a digest of another length": crypto.SHA512} {
			if _, err := key.Sign(rand.Reader, make([]byte, 32), opts); err == nil {
				t.Errorf("%s: %s was signed", kind, name)
			}
		}
	}
}

func TestASlowSignatureEndsWithItsOwnLimitAndWithTheStore(t *testing.T) {
	f := newFake(t)
	f.on("GET transit/keys/"+keyName, data(keyData(t, "ecdsa-p256", newKey(t).Public(), nil)))
	asked := make(chan struct{}, 2)
	f.on("PUT transit/sign/"+keyName, func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		drip(w, r)
	})
	client := f.client(t)
	for _, limit := range []time.Duration{time.Hour, 100 * time.Millisecond} {
		s := openKeyStore(t, KeyStoreOptions{Client: client, SignTimeout: limit})
		key, err := s.Open(t.Context(), keyName+":v1")
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() {
			_, err := key.Sign(rand.Reader, make([]byte, 32), crypto.SHA256)
			ended <- err
		}()
		if limit == time.Hour {
			<-asked
			s.Close()
		}
		if err := <-ended; err == nil {
			t.Errorf("a signature that is not answered ends without an error, its limit being %s", limit)
		}
	}
}

func TestAKeyThatIsNoneForACAIsRefused(t *testing.T) {
	f := newFake(t)
	s := openKeyStore(t, KeyStoreOptions{Client: f.client(t)})
	pub := newKey(t).Public()
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		data map[string]any
		want string
	}{
		"exportable":                 {keyData(t, "ecdsa-p256", pub, map[string]any{"exportable": true}), "may be read out"},
		"with backups in plaintext":  {keyData(t, "ecdsa-p256", pub, map[string]any{"allow_plaintext_backup": true}), "may be read out"},
		"imported":                   {keyData(t, "ecdsa-p256", pub, map[string]any{"imported_key": true}), "imported"},
		"derived":                    {keyData(t, "ecdsa-p256", pub, map[string]any{"derived": true}), "derived"},
		"of another kind":            {keyData(t, "ecdsa-p521", p521.Public(), nil), "a CA's is one of"},
		"of another kind than it is": {keyData(t, "ecdsa-p384", pub, nil), "a CA's is one of"},
		"symmetric":                  {map[string]any{"type": "aes256-gcm96", "latest_version": 1, "keys": map[string]any{"1": map[string]any{}}}, "has no public key"},
		"without its version":        {keyData(t, "ecdsa-p256", pub, map[string]any{"latest_version": 0}), "has no version 1"},
		"garbage":                    {keyData(t, "ecdsa-p256", pub, map[string]any{"keys": map[string]any{"1": map[string]any{"public_key": "x"}}}), "has no public key"},
	} {
		t.Run(name, func(t *testing.T) {
			f.on("GET transit/keys/"+keyName, data(c.data))
			if _, err := s.Open(t.Context(), keyName+":v1"); err == nil || !strings.Contains(err.Error(), c.want) || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the error does not say %q: %v", c.want, err)
			}
		})
	}
}

// TestNoKeyButKedgesOwnIsTouched: the names of others do not even become calls.
func TestNoKeyButKedgesOwnIsTouched(t *testing.T) {
	f := newFake(t)
	s := openKeyStore(t, KeyStoreOptions{Client: f.client(t), Prefix: "blue-"})
	for _, ref := range []string{keyName + ":v1", keyName, "blue-" + strings.Repeat("0", 32), "blue-" + strings.Repeat("0", 32) + ":v0", "blue-" + strings.Repeat("0", 32) + ":v01",
		"blue-" + strings.Repeat("0", 31) + ":v1", "blue-" + strings.Repeat("A", 32) + ":v1", "payments:v1", "blue-" + strings.Repeat("0", 32) + ":v9999999999", "x/../blue-" + strings.Repeat("0", 32) + ":v1"} {
		if _, err := s.Open(t.Context(), ref); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Open(%q): %v", ref, err)
		}
		if err := s.Delete(t.Context(), ref); err == nil {
			t.Errorf("Delete(%q) did not refuse", ref)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for call := range f.calls {
		if strings.Contains(call, "transit") {
			t.Errorf("%s was called", call)
		}
	}
}

// TestACreationThatFailsHalfWayLeavesNoKey: the key was made, and what Vault says of it is not what was asked for, or does not come.
func TestACreationThatFailsHalfWayLeavesNoKey(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"exportable": data(keyData(t, "ecdsa-p256", newKey(t).Public(), map[string]any{"exportable": true})),
		"P-256":      data(keyData(t, "ecdsa-p256", newKey(t).Public(), nil)), // P-384 was asked for
		"an error":   refuse(http.StatusInternalServerError, "disk full"),
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			s := openKeyStore(t, KeyStoreOptions{Client: f.client(t)})
			var mu sync.Mutex
			made, deleted := "", false
			f.mu.Lock()
			f.other = func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				defer mu.Unlock()
				switch path := r.URL.Path; {
				case r.Method == http.MethodDelete && path == made:
					deleted = true
				case r.Method == http.MethodPut && path == made+"/config":
				case r.Method == http.MethodPut && strings.HasPrefix(path, "/v1/transit/keys/"):
					made = path
				case r.Method == http.MethodGet && path == made && !deleted:
					answer(w, r)
					if name == "an error" { // it goes away again
						answer = data(keyData(t, "ecdsa-p384", newKey(t).Public(), nil))
					}
				default:
					refuse(http.StatusNotFound)(w, r)
				}
			}
			f.mu.Unlock()
			if _, _, err := s.Create(t.Context(), ca.P384); err == nil {
				t.Error("Create made a key")
			}
			mu.Lock()
			defer mu.Unlock()
			if made == "" || !deleted {
				t.Errorf("made %q, deleted %v", made, deleted)
			}
		})
	}
}
