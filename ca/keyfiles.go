package ca

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"kedge/ca/ledger"
)

// KeyFiles returns the files of the root and of the issuing CAs' keys, for a backup of the ledger as it was after event number. Where the root or
// the key store keeps nothing on this machine there are none. The key of an issuing CA that is removed is destroyed, and is never
// needed again.
func (c *CA) KeyFiles(ctx context.Context, number uint64) (root, keys []KeyFile, err error) {
	if r, ok := c.root.(PortableRoot); ok {
		if root, err = r.Files(ctx); err != nil {
			return nil, nil, fmt.Errorf("reading the root's files: %w", err)
		}
	}
	store, ok := c.keys.(PortableKeyStore)
	if !ok {
		return root, nil, nil
	}
	records, err := c.ledger.Authorities()
	if err != nil {
		return nil, nil, fmt.Errorf("reading the authorities from the ledger: %w", err)
	}
	for _, record := range records {
		if record.KeyRef == "" || record.Number > number || record.State == ledger.StateRemoved {
			continue
		}
		key, err := store.File(ctx, record.KeyRef)
		if errors.Is(err, fs.ErrNotExist) { // it is removed at this moment, or lost, which the CA survives
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("reading the key of the issuing CA %s: %w", record.ID, err)
		}
		keys = append(keys, key)
	}
	return root, keys, nil
}
