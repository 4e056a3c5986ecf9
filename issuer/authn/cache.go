package authn

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"kedge/ca/atomicfile"
)

// cached is the last good JWKS of an issuer, kept so that a start while the issuer is away can use its keys.
type cached struct {
	Issuer  string          `json:"issuer"` // for whose tokens the keys count
	Source  string          `json:"source"` // where they came from
	Fetched time.Time       `json:"fetched"`
	JWKS    json.RawMessage `json:"jwks"`
}

func writeCache(path string, c cached) error {
	text, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("encoding the keys of %s: %w", c.Issuer, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("making the folder for issuers' keys: %w", err)
	}
	return atomicfile.Write(path, text)
}

// readCache takes up the keys of an earlier run. Keys of another issuer or from another place than is configured now do not count.
func (k *keySet) readCache() {
	if k.cache == "" {
		return
	}
	if err := atomicfile.Clean(k.cache); err != nil {
		k.log.Warn("beside the issuer's keys of an earlier run", "error", err)
	}
	file, err := os.Open(k.cache)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		k.log.Warn("the issuer's keys of an earlier run cannot be read; they are fetched anew", "error", err)
		return
	}
	defer file.Close()
	var c cached
	text, err := readLimited(file, k.cache, 2*maxJWKS)
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err == nil && (c.Issuer != k.source.issuer || c.Source != k.source.String()) {
		err = fmt.Errorf("they are of %.200q from %.200q", c.Issuer, c.Source)
	}
	if err == nil {
		k.keys, _, err = parseJWKS(c.JWKS)
	}
	if err != nil {
		k.log.Warn("the issuer's keys of an earlier run do not count; they are fetched anew", "file", k.cache, "error", err)
		return
	}
	k.fetched = c.Fetched
}
