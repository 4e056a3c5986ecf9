package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"kedge/ca/backup"
	"kedge/issuer/admin"
)

func newBackupCommand(t *target) *cobra.Command {
	var asJSON bool
	var out string
	c := &cobra.Command{
		Use: "backup --out FILE", Short: "Make a backup of a running CA", Args: arguments(),
		Long: `Have the running CA write everything that it can be brought back from into one file: the ledger as it is at this moment, the root, and the keys of
issuing CAs as they are on disk. Issuing goes on meanwhile. The file is readable by its owner only; it is there as a whole or not at all, and
nothing is overwritten. Keys that are not encrypted in the data folder are not encrypted in the file either, which is said. Passphrases are
not in it, nor is what lets callers in: join tokens are void after a restore.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if out == "" {
				return usageError{errors.New("--out is missing: the file to make")}
			}
			client, err := t.client()
			if err != nil {
				return err
			}
			m, err := saveBackup(c.Context(), client, out)
			if err != nil {
				return err
			}
			if n := m.ClearKeys(); n > 0 {
				fmt.Fprintf(c.ErrOrStderr(), "%s holds %d keys that are not encrypted: who reads it can issue certificates as this CA. Keep it as you would the keys; "+
					"root.file.passphraseFile and issuingCA.passphraseFile encrypt those of a new data folder\n", out, n)
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), m)
			}
			table := newTable(c.OutOrStdout())
			table.row("backup", out)
			table.row("trust domain", m.TrustDomain)
			table.row("ledger", fmt.Sprintf("numbers %d to %d of log %s", m.Ledger.First, m.Ledger.Number, m.Ledger.Log))
			table.row("files", fmt.Sprintf("%d, of which %d keys are not encrypted", len(m.Files), m.ClearKeys()))
			return table.Flush()
		},
	}
	c.Flags().StringVar(&out, "out", "", "the file to make")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON: the manifest")
	return c
}

// saveBackup puts a backup into a file, which gets its name once it is verified and on disk.
func saveBackup(ctx context.Context, client *admin.Client, out string) (m backup.Manifest, err error) {
	err = newFile(out, func(file *os.File) error {
		body, err := client.Backup(ctx)
		if err != nil {
			return err
		}
		defer body.Close() // it was read to its end, or is of no use
		if m, err = backup.Read(io.TeeReader(body, file), nil); err == nil {
			_, err = io.Copy(file, body) // what pads the archive
		}
		if err != nil {
			return fmt.Errorf("writing the backup: %w", err)
		}
		return nil
	})
	return m, err
}
