package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"kedge/ca"
	"kedge/ca/backup"
	"kedge/cmd/kedge/config"
	"kedge/issuer/peercred"
)

func newRestoreCommand(t *target) *cobra.Command {
	var asJSON bool
	var from string
	c := &cobra.Command{
		Use: "restore --from FILE --data NEWFOLDER", Short: "Make a data folder from a backup, or from an older copy of a data folder", Args: arguments(),
		Long: `Make a new data folder from a backup, or from a data folder that was put back by hand, on which no CA runs. The folder must not be there yet, or be
empty. Everything is verified first, the whole ledger too.

What the lost CA did after the backup, nobody knows. So the restored ledger begins a new log, whose numbers go on; the first start makes a
new issuing CA, since the lost one may still sign with the old key; the trust bundle's sequence number leaps; join tokens are
void; and certificates that the ledger does not know but might be good are accepted as client certificates until their issuing CA ends.
Revocations, taints and removals since the backup are to be made again. The lost CA must not run any more.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if from == "" {
				return usageError{errors.New("--from is missing: a backup's file, or a data folder")}
			}
			cfg, err := t.load()
			if err != nil {
				return err
			}
			if err := keepSecretsInMemory(); err != nil {
				return err
			}
			report, err := backup.Restore(c.Context(), backup.Options{
				From: from, Dir: cfg.DataDir, Mark: cfg.Ledger.HighWaterFile, By: peercred.Peer{PID: int32(os.Getpid()), UID: uint32(os.Geteuid())}.String(),
				Version: version, Clock: ca.SystemClock(), Logger: slog.New(slog.NewTextHandler(c.ErrOrStderr(), nil)),
			})
			if err != nil {
				return err
			}
			remark(c.ErrOrStderr(), cfg, report)
			fmt.Fprintf(c.ErrOrStderr(), "Next: kedge serve%s\n", t.flags())
			if asJSON {
				return printJSON(c.OutOrStdout(), report)
			}
			return showRestore(c, report)
		},
	}
	c.Flags().StringVar(&from, "from", "", "a backup's file, or a data folder on which no CA runs")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func showRestore(c *cobra.Command, report backup.Report) error {
	r, table := report.Restore, newTable(c.OutOrStdout())
	table.row("data folder", report.Dir)
	table.row("trust domain", report.TrustDomain)
	table.row("as of", people(r.Taken.Time()))
	table.row("old log", fmt.Sprintf("%s, up to number %d; %d events verified", r.Log, r.Number, report.Events))
	if lost := report.Lost(); lost > 0 {
		table.row("lost", fmt.Sprintf("%d of the old log's events, up to number %d: the high-water mark knew them", lost, r.Mark.Number))
	} else {
		table.row("lost", "what the old log recorded after that, if anything")
	}
	table.row("new log", fmt.Sprintf("%s, from number %d on", report.Log, report.Number))
	table.row("trust bundle", fmt.Sprintf("sequence %d", report.Bundle))
	return table.Flush()
}

// remark says what is left to do about the root, and what is void.
func remark(w io.Writer, cfg *config.Config, report backup.Report) {
	inside := filepath.Join(cfg.DataDir, "root")
	switch {
	case cfg.Root.Kind != config.RootKindFile: // it is elsewhere, and was not in the backup
	case cfg.Root.File.Dir != inside && report.Root:
		fmt.Fprintf(w, "the root was put into %s, and the configuration names %s: see to it that the root is there\n", inside, cfg.Root.File.Dir)
	case cfg.Root.File.Dir == inside && !report.Root:
		fmt.Fprintf(w, "there was no root in it: put the root's folder to %s, or name it with root.file.dir\n", inside)
	}
	fmt.Fprintln(w, "join tokens of before are void; revocations and taints made after the backup are to be made again")
}
