package vault

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"kedge/ca"
)

const (
	defaultPrefix    = "kedge-"
	defaultSignLimit = 5 * time.Second
	generationLimit  = time.Minute // an RSA key takes a busy Vault a while to find
	forgetLimit      = time.Second // beyond the end of the caller's context
)

// KeyStoreOptions say where the keys are.
type KeyStoreOptions struct {
	Client       *Client
	Mount        string        // of the Transit engine; default "transit"
	Prefix       string        // of the keys' names, to tell several CAs in one mount apart; default "kedge-". No key with another name is opened or deleted
	SignTimeout  time.Duration // of one signature; default 5 s
	PollInterval time.Duration // how often the keys that are open are looked at, a tenth more or less; default 1 min
	Logger       *slog.Logger  // default: nothing is logged
}

// KeyStore is a ca.KeyStore of one Transit key a key. A key's name is that of the Transit key and the number of the version that signs, as in kedge-0123…cdef:v1. Rotating the key in Vault
// adds a version, and changes nothing for the certificate that was made for this one: it goes on signing, and Problem says that the rotation is in vain.
type KeyStore struct {
	o     KeyStoreOptions
	names *regexp.Regexp // of what this store has made
	watch *watch
	ctx   context.Context // of signatures; ends with Close
	stop  context.CancelFunc

	mu   sync.Mutex
	open map[string]name // by ref
	said map[string]string
}

var (
	_ ca.KeyStore = (*KeyStore)(nil)

	keyPrefix = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)
	keyTypes  = map[ca.KeySpec]string{ca.P256: "ecdsa-p256", ca.P384: "ecdsa-p384", ca.RSA2048: "rsa-2048", ca.RSA3072: "rsa-3072", ca.RSA4096: "rsa-4096"}
)

// OpenKeyStore checks the options. It asks Vault nothing: see Check. Close ends the watch over the keys, and every signature.
func OpenKeyStore(o KeyStoreOptions) (*KeyStore, error) {
	if o.Client == nil {
		return nil, errors.New("the key store in Vault has no login: open a Client first")
	}
	var err error
	if o.Mount, err = checkMount("the Transit engine", o.Mount, "transit"); err != nil {
		return nil, err
	}
	if o.Prefix == "" {
		o.Prefix = defaultPrefix
	}
	if !keyPrefix.MatchString(o.Prefix) {
		return nil, fmt.Errorf("the prefix %.80q of the names of keys in Vault is none: use up to 63 lower-case letters, digits and hyphens, such as %q", o.Prefix, defaultPrefix)
	}
	if o.SignTimeout == 0 {
		o.SignTimeout = defaultSignLimit
	}
	if o.SignTimeout < 0 {
		return nil, fmt.Errorf("the time limit %s of a signature by Vault is negative", o.SignTimeout)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &KeyStore{o: o, names: regexp.MustCompile(`^(` + regexp.QuoteMeta(o.Prefix) + `[0-9a-f]{32}):v([1-9][0-9]{0,8})$`), open: map[string]name{}, said: map[string]string{}}
	s.ctx, s.stop = context.WithCancel(context.Background())
	if s.watch, err = startWatch(o.PollInterval, s.look); err != nil {
		s.stop()
		return nil, fmt.Errorf("the key store in Vault: %w", err)
	}
	return s, nil
}

// Close ends the watch over the keys, and every signature.
func (s *KeyStore) Close() error {
	s.stop()
	return s.watch.close()
}

// Problem says what was wrong with the keys that are open when they were last looked at, and what to do: Vault does not answer, a key was rotated,
// its version may no longer sign, it is gone; or else what is wrong with the login. It is nil when all is well.
func (s *KeyStore) Problem() error { return cmp.Or(s.watch.problem(), s.o.Client.Problem()) }

// name is what a ref says.
type name struct {
	key     string // of Transit
	version int
}

func (n name) String() string { return fmt.Sprintf("%s:v%d", n.key, n.version) }

func (s *KeyStore) path(n name) string { return s.o.Mount + "/keys/" + n.key }

// parse lets nothing but the name of a key that Kedge made become part of a path.
func (s *KeyStore) parse(ctx context.Context, ref, doing string) (name, error) {
	parts := s.names.FindStringSubmatch(ref)
	if parts == nil {
		return name{}, fmt.Errorf("%s the key %.80q of %s in Vault: that is no name of a key that Kedge made there; one is %s, 32 hex digits, and the version, as in :v1",
			doing, ref, s.o.Mount, s.o.Prefix)
	}
	version, err := strconv.Atoi(parts[2])
	if err != nil {
		return name{}, fmt.Errorf("%s the key %s of %s in Vault: %w", doing, ref, s.o.Mount, err)
	}
	if err := ctx.Err(); err != nil {
		return name{}, fmt.Errorf("%s the key %s of %s in Vault: %w", doing, ref, s.o.Mount, err)
	}
	return name{parts[1], version}, nil
}

// state is what Vault says of a Transit key.
type state struct {
	Type          string `json:"type"`
	Latest        int    `json:"latest_version"`
	MinDecryption int    `json:"min_decryption_version"` // what is older is archived, and does nothing
	MinEncryption int    `json:"min_encryption_version"` // what is older does not sign; 0: the latest may, and every other
	Exportable    bool   `json:"exportable"`
	Backup        bool   `json:"allow_plaintext_backup"`
	Derived       bool   `json:"derived"`
	Imported      bool   `json:"imported_key"`
	Keys          map[string]struct {
		PublicKey string `json:"public_key"` // PEM
	} `json:"keys"`
}

func (s *KeyStore) read(ctx context.Context, n name) (*state, error) {
	var answer struct {
		Data state `json:"data"`
	}
	if err := s.o.Client.read(ctx, s.path(n), &answer); err != nil {
		if isAbsent(err) {
			return nil, fmt.Errorf("%s holds no key %s: it was deleted there, or this is another Vault: %w", s.o.Mount, n.key, fs.ErrNotExist)
		}
		return nil, err
	}
	return &answer.Data, nil
}

// usable says why the version cannot sign, and what to do.
func (k *state) usable(n name, path string) error {
	switch {
	case n.version > k.Latest:
		return fmt.Errorf("the key %s has no version %d, the latest is %d: it was restored from an old backup, or made anew", n.key, n.version, k.Latest)
	case k.MinDecryption > n.version:
		return fmt.Errorf("the min_decryption_version of the key %s was raised to %d, above the version %d that signs for Kedge: set it back with 'vault write %s/config min_decryption_version=%d'",
			n.key, k.MinDecryption, n.version, path, n.version)
	case k.MinEncryption > n.version:
		return fmt.Errorf("the min_encryption_version of the key %s was raised to %d, above the version %d that signs for Kedge: set it back with 'vault write %s/config min_encryption_version=%d'",
			n.key, k.MinEncryption, n.version, path, n.version)
	case k.Exportable || k.Backup:
		return fmt.Errorf("the key %s may be read out of Vault (exportable %t, allow_plaintext_backup %t), which cannot be undone: it is no key for a CA; delete it, and Kedge makes another",
			n.key, k.Exportable, k.Backup)
	case k.Imported:
		return fmt.Errorf("the key %s was imported into Vault, so that it is elsewhere too: it is no key for a CA; delete it, and Kedge makes another", n.key)
	case k.Derived:
		return fmt.Errorf("the key %s is derived (derived=true): it cannot sign for a CA", n.key)
	}
	return nil
}

// public returns the public key of a version, after making sure that the version can sign.
func (k *state) public(n name, path string) (crypto.PublicKey, ca.KeySpec, error) {
	if err := k.usable(n, path); err != nil {
		return nil, "", err
	}
	block, _ := pem.Decode([]byte(k.Keys[strconv.Itoa(n.version)].PublicKey))
	if block == nil {
		return nil, "", fmt.Errorf("the version %d of the key %s has no public key", n.version, n.key)
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, "", fmt.Errorf("the public key of the version %d of the key %s: %w", n.version, n.key, err)
	}
	spec := ca.SpecOf(pub)
	if spec == "" || keyTypes[spec] != k.Type {
		return nil, "", fmt.Errorf("the key %s is of the type %.40q: a CA's is one of ecdsa-p256, ecdsa-p384, rsa-2048, rsa-3072 and rsa-4096", n.key, k.Type)
	}
	return pub, spec, nil
}

// Create has Vault make a key that cannot be read out of it, neither exported nor in a backup in plaintext.
func (s *KeyStore) Create(ctx context.Context, spec ca.KeySpec) (string, crypto.Signer, error) {
	n := name{newKeyName(s.o.Prefix), 1}
	key, err := s.create(ctx, spec, n)
	if err != nil {
		return "", nil, fmt.Errorf("making a %.40q key in %s of Vault: %w", spec, s.o.Mount, err)
	}
	return n.String(), key, nil
}

func (s *KeyStore) create(ctx context.Context, spec ca.KeySpec, n name) (_ *key, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	kind, known := keyTypes[spec]
	if !known {
		return nil, fmt.Errorf("that kind is unknown: use %s, %s, %s, %s or %s", ca.P256, ca.P384, ca.RSA2048, ca.RSA3072, ca.RSA4096)
	}
	order := map[string]any{"type": kind, "derived": false, "exportable": false, "allow_plaintext_backup": false, "auto_rotate_period": 0}
	if err := s.o.Client.write(ctx, generationLimit, s.path(n), order, nil); err != nil {
		s.forget(ctx, n, err)
		return nil, err
	}
	k, err := s.load(ctx, n)
	if err != nil {
		s.forget(ctx, n, err)
		return nil, err
	}
	if got := ca.SpecOf(k.pub); got != spec {
		err := fmt.Errorf("it made a %s key", got)
		s.forget(ctx, n, err)
		return nil, err
	}
	return k, nil
}

// forget deletes what a creation that failed may have made. If that fails too, a key without a certificate stays in Vault, and harms nobody.
func (s *KeyStore) forget(ctx context.Context, n name, why error) {
	if r := refused(why); r != nil && (isDenied(why) || isMountGone(r) || r.isBusy()) { // nothing was made
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(s.o.Client.o.Timeout, forgetLimit))
	defer cancel()
	if err := s.remove(ctx, n); err != nil {
		s.o.Logger.Warn("a key that could not be made may be left in Vault, and may be deleted there", "mount", s.o.Mount, "key", n.key, "error", err)
	}
}

func newKeyName(prefix string) string {
	random := make([]byte, 16)
	rand.Read(random) // never fails: the process ends first
	return prefix + hex.EncodeToString(random)
}

// Open finds the key of that name. Without such a key the error wraps fs.ErrNotExist; a mount that is gone is another error.
func (s *KeyStore) Open(ctx context.Context, ref string) (crypto.Signer, error) {
	n, err := s.parse(ctx, ref, "opening")
	if err != nil {
		return nil, err
	}
	k, err := s.load(ctx, n)
	if err != nil {
		return nil, fmt.Errorf("opening the key %s in Vault: %w", n, err)
	}
	return k, nil
}

// load reads a key's state, and watches it from then on.
func (s *KeyStore) load(ctx context.Context, n name) (*key, error) {
	state, err := s.read(ctx, n)
	if err != nil {
		return nil, err
	}
	pub, _, err := state.public(n, s.path(n))
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.open[n.String()] = n
	s.mu.Unlock()
	return &key{store: s, name: n, pub: pub}, nil
}

// Delete destroys the Transit key, with every version of it.
func (s *KeyStore) Delete(ctx context.Context, ref string) error {
	n, err := s.parse(ctx, ref, "deleting")
	if err != nil {
		return err
	}
	if err := s.remove(ctx, n); err != nil {
		return fmt.Errorf("deleting the key %s in Vault: %w", n, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, ref)
	delete(s.said, ref)
	return nil
}

func (s *KeyStore) remove(ctx context.Context, n name) error {
	_, err := s.read(ctx, n)
	if err == nil {
		if err = s.o.Client.write(ctx, s.o.Client.o.Timeout, s.path(n)+"/config", map[string]any{"deletion_allowed": true}, nil); err == nil {
			err = s.o.Client.remove(ctx, s.path(n))
		}
		if err != nil { // somebody may have been faster
			if _, again := s.read(ctx, n); errors.Is(again, fs.ErrNotExist) {
				err = nil
			}
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Check asks Vault whether keys can be made, used and deleted now, without doing so.
func (s *KeyStore) Check(ctx context.Context) error {
	n := name{newKeyName(s.o.Prefix), 1}
	if _, err := s.read(ctx, n); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(
		s.o.Client.checkPermissions(ctx, map[string]string{s.path(n): http.MethodPut, s.path(n) + "/config": http.MethodPut, s.o.Mount + "/sign/" + n.key: http.MethodPut}),
		s.o.Client.checkPermissions(ctx, map[string]string{s.path(n): http.MethodDelete}),
	)
}

// look is what the watch does: it looks at every key that is open, and says what has changed for the worse.
func (s *KeyStore) look(ctx context.Context) (bool, error) {
	s.mu.Lock()
	open := make(map[string]name, len(s.open))
	for ref, n := range s.open {
		open[ref] = n
	}
	s.mu.Unlock()
	var all []error
	for ref, n := range open {
		state, err := s.read(ctx, n)
		away := err != nil && !errors.Is(err, fs.ErrNotExist) // it is Vault, not the key
		if err == nil {
			err = state.judge(n, s.path(n))
		}
		if s.news(ref, err) && ctx.Err() == nil {
			s.o.Logger.Warn("a signing key in Vault is not as it should be", "mount", s.o.Mount, "key", ref, "error", err)
		}
		if err != nil {
			all = append(all, err)
		}
		if away {
			break
		}
	}
	return false, errors.Join(all...)
}

var errRotated = errors.New("its own version goes on signing, since the certificate of the issuing CA is for that. " +
	"A new key comes with each issuing CA, so that nothing is gained by rotating one: switch auto_rotate_period off if it is on")

// judge says what is wrong with a key, be it that it was rotated.
func (k *state) judge(n name, path string) error {
	if err := k.usable(n, path); err != nil {
		return err
	}
	if k.Latest > n.version {
		return fmt.Errorf("the key %s was rotated in Vault, to the version %d: %w", n, k.Latest, errRotated)
	}
	return nil
}

// news says whether err is another one than at the last look, and not nil.
func (s *KeyStore) news(ref string, err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, open := s.open[ref]; !open { // deleted meanwhile
		return false
	}
	text := ""
	if err != nil {
		text = err.Error()
	}
	before := s.said[ref]
	s.said[ref] = text
	return text != "" && text != before
}

// hashes are Vault's names of the hashes that sign.
var hashes = map[crypto.Hash]string{crypto.SHA256: "sha2-256", crypto.SHA384: "sha2-384", crypto.SHA512: "sha2-512"}

// prefixOf is what stands before a signature by Vault.
func prefixOf(version int) string { return "vault:v" + strconv.Itoa(version) + ":" }

// cut takes the prefix off a signature, and makes sure that it is that of the version that was asked for.
func cut(signature string, version int) (string, error) {
	encoded, found := strings.CutPrefix(signature, prefixOf(version))
	if !found {
		return "", fmt.Errorf("the signature is not one of the version %d that was asked for: it begins with %.20q", version, signature)
	}
	return encoded, nil
}
