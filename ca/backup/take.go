package backup

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"

	"kedge/ca"
	"kedge/ca/ledger"
)

// Backup is a backup that is ready to be written. Close it.
type Backup struct {
	Manifest Manifest
	snapshot *ledger.Snapshot
	contents map[string][]byte // of all files but the ledger
}

// Take makes a backup of a running CA. When it returns, everything is at hand, so that writing it may take as long as it wants.
func Take(ctx context.Context, c *ca.CA, version string) (b *Backup, err error) {
	snapshot, err := c.Ledger().Snapshot(ctx)
	if err != nil {
		return nil, fmt.Errorf("making a backup: %w", err)
	}
	b = &Backup{snapshot: snapshot, contents: map[string][]byte{}, Manifest: Manifest{
		Format: formatVersion, Version: version, Taken: ledger.At(c.Now()), TrustDomain: c.TrustDomain().Name(), Ledger: snapshot.Head,
		Files: []File{{Name: ledgerFile, Size: snapshot.Size, SHA256: snapshot.SHA256}},
	}}
	if err := b.addSmall(ctx, c); err != nil {
		b.Close()
		return nil, fmt.Errorf("making a backup: %w", err)
	}
	return b, nil
}

// addSmall adds everything but the ledger.
func (b *Backup) addSmall(ctx context.Context, c *ca.CA) error {
	clock, err := c.Guarded().State()
	if err != nil {
		return err
	}
	b.add(formatFile, b.snapshot.Format, false)
	b.add(clockFile, clock, false)
	root, keys, err := c.KeyFiles(ctx, b.snapshot.Head.Number)
	if err != nil {
		return err
	}
	for _, file := range root {
		b.add(rootFolder+"/"+file.Name, file.Content, file.Clear)
	}
	for _, file := range keys {
		b.add(keysFolder+"/"+file.Name, file.Content, file.Clear)
	}
	return b.Manifest.check()
}

func (b *Backup) add(name string, content []byte, clear bool) {
	b.contents[name] = content
	b.Manifest.Files = append(b.Manifest.Files, File{Name: name, Size: int64(len(content)), SHA256: sha256.Sum256(content), Clear: clear})
}

// Write writes the backup; once.
func (b *Backup) Write(w io.Writer) error {
	err := write(w, b.Manifest, func(file File) io.Reader {
		if file.Name == ledgerFile {
			return b.snapshot
		}
		return bytes.NewReader(b.contents[file.Name])
	})
	if err != nil {
		return fmt.Errorf("writing a backup: %w", err)
	}
	return nil
}

// Close wipes the keys and gives the room on the disk back.
func (b *Backup) Close() error {
	for _, content := range b.contents {
		clear(content)
	}
	return b.snapshot.Close()
}
