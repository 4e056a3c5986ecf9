package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/cmd/kedge/config"
	"kedge/issuer/admin"
)

// finding is one thing that the doctor looked at.
type finding struct {
	About string `json:"about"`
	State string `json:"state"` // good, note, wrong
	What  string `json:"what"`
	Mend  string `json:"mend,omitempty"`
}

// The states of a finding.
const (
	good  = "good"
	note  = "note"
	wrong = "wrong"
)

// lowSpace is how little room may be left where the ledger grows before the doctor speaks of it.
const lowSpace = 256 << 20 // octets

func newDoctorCommand(t *target) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "doctor", Short: "Say what is wrong with this setup and how to mend it", Args: arguments(),
		Long: `Look at the configuration, the data folder and the running CA, and say of each thing whether it is good, and if not, what to do. Exit code 4
when something is wrong. It changes nothing.`,
		RunE: func(c *cobra.Command, _ []string) error {
			findings := examine(c.Context(), t)
			if c.Context().Err() != nil {
				return context.Cause(c.Context()) // what was found by then is no examination
			}
			var ill bool
			for _, f := range findings {
				ill = ill || f.State == wrong
			}
			if asJSON {
				if err := printJSON(c.OutOrStdout(), findings); err != nil {
					return err
				}
			} else {
				table := newTable(c.OutOrStdout())
				for _, f := range findings {
					for i, line := range strings.Split(f.What, "\n") { // a configuration may have several problems
						if i == 0 {
							table.row(f.State, f.About, line)
						} else {
							table.row("", "", line)
						}
					}
					if f.Mend != "" {
						table.row("", "", "→ "+f.Mend)
					}
				}
				if err := table.Flush(); err != nil {
					return err
				}
			}
			if ill {
				return errFound
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// examine looks at one thing after the other, and stops early only where the rest makes no sense.
func examine(ctx context.Context, t *target) []finding {
	cfg, err := t.load()
	if err != nil {
		return []finding{{"configuration", wrong, err.Error(), "correct the file; 'kedge config check' looks at it again"}}
	}
	var all []finding
	warnings, err := cfg.Validate()
	faults := findFaults(cfg)
	if err != nil {
		all = append(all, finding{"configuration", wrong, err.Error(), "correct the file; 'kedge config check' looks at it again"})
	} else if len(warnings)+len(faults) == 0 {
		all = append(all, finding{"configuration", good, "it can be used", ""})
	}
	for _, warning := range warnings {
		all = append(all, finding{"configuration", note, warning, ""})
	}
	for _, f := range faults {
		all = append(all, finding{f.key, wrong, f.what(), f.mend})
	}
	all = append(all, examineFolder(cfg)...)
	return append(all, examineRunning(ctx, t, cfg)...)
}

func examineFolder(cfg *config.Config) []finding {
	const about = "data folder"
	dir, err := filepath.Abs(cfg.DataDir)
	if err != nil {
		return []finding{{about, wrong, err.Error(), ""}}
	}
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return []finding{{about, note, dir + " is not there yet", "'kedge serve' makes it on the first start"}}
	case err != nil:
		return []finding{{about, wrong, err.Error(), "let this user enter the folder, or name another with dataDir"}}
	case !info.IsDir():
		return []finding{{about, wrong, dir + " is a file", "name a folder with dataDir"}}
	}
	var all []finding
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		all = append(all, finding{about, wrong, fmt.Sprintf("%s holds keys, and others may enter it (mode %#o)", dir, mode), "chmod 700 " + dir})
	}
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			all = append(all, finding{about, wrong, err.Error(), "let this user read it"})
			return fs.SkipDir
		}
		info, err := entry.Info()
		if err == nil && entry.Type().IsRegular() && info.Mode().Perm()&0o077 != 0 {
			all = append(all, finding{about, wrong, fmt.Sprintf("others may read %s (mode %#o)", path, info.Mode().Perm()), "chmod 600 " + path})
		}
		return nil
	})
	if err != nil {
		all = append(all, finding{about, wrong, err.Error(), ""})
	}
	if len(all) == 0 {
		all = append(all, finding{about, good, dir, ""})
	}
	var space unix.Statfs_t
	if err := unix.Statfs(dir, &space); err != nil {
		return append(all, finding{"disk", wrong, err.Error(), ""})
	}
	free := space.Bavail * uint64(space.Bsize)
	if free < lowSpace {
		return append(all, finding{"disk", wrong, fmt.Sprintf("%d MiB are left on the disk of the data folder", free>>20),
			"make room: with none left no certificate can be recorded, so none is issued"})
	}
	return append(all, finding{"disk", good, fmt.Sprintf("%d MiB are left", free>>20), ""})
}

func examineRunning(ctx context.Context, t *target, cfg *config.Config) []finding {
	const subject = "running CA"
	client, err := t.client()
	if err != nil {
		return nil // what is wrong with dataDir was said above
	}
	status, err := client.Status(ctx)
	if errors.Is(err, admin.ErrNotRunning) {
		all := []finding{{subject, wrong, "no CA is running on this data folder", "start it with 'kedge serve'"}}
		for _, door := range []struct{ key, address string }{{"csr.listen", cfg.CSR.Listen}, {"operations.listen", cfg.Operations.Listen}} {
			l, err := net.Listen("tcp", door.address)
			if err != nil {
				all = append(all, finding{door.key, wrong, err.Error(), "stop what uses the address, or name another"})
				continue
			}
			_ = l.Close() // it was only tried
		}
		return append(all, examineLedger(cfg)...)
	}
	if err != nil {
		return []finding{{subject, wrong, err.Error(), "run this command as the CA's user or root"}}
	}
	var all []finding
	if status.Ready {
		all = append(all, finding{subject, good, fmt.Sprintf("version %s, up for %s, %d events in the ledger", status.Version, about(time.Since(status.Started)), status.Number), ""})
	} else {
		all = append(all, finding{subject, wrong, "it is not ready: " + status.NotReady, "the CA goes on trying by itself; its log says more"})
	}
	if status.Version != version {
		all = append(all, finding{subject, note, fmt.Sprintf("it is version %s, and this command is %s", status.Version, version), "restart it if it was upgraded"})
	}
	for _, problem := range status.Problems {
		all = append(all, finding{subject, wrong, problem, ""})
	}
	all = append(all, examineTainted(ctx, client)...)
	if len(cfg.Callers.TokenIssuers) == 0 {
		all = append(all, finding{"callers", note, "no token issuer is configured: only join tokens and client certificates prove who is asking",
			"for istio-agents name the cluster's issuer under callers.tokenIssuers"})
	}
	return all
}

// examineTainted looks for what tainted issuing CAs have left.
func examineTainted(ctx context.Context, client *admin.Client) []finding {
	var authorities []ca.AuthorityStatus
	if err := client.Get(ctx, "/v1/authorities", &authorities); err != nil {
		return []finding{{"authorities", wrong, err.Error(), ""}}
	}
	var all []finding
	for _, a := range authorities {
		if a.Tainted && a.LiveSVIDs > 0 && a.LastExpiry != nil {
			all = append(all, finding{"authorities", note, fmt.Sprintf("the issuing CA %s is tainted; %s", short(a.ID), underTainted(a.LiveSVIDs, *a.LastExpiry)),
				"their holders need a token to renew; 'kedge ledger list --type issue --issuer " + short(a.ID) + "' shows who they are"})
		}
	}
	return all
}

// examineLedger looks at the ledger of a CA that does not run: whether it would be served.
func examineLedger(cfg *config.Config) []finding {
	const about = "ledger"
	dir, err := filepath.Abs(cfg.DataDir)
	if err != nil {
		return []finding{{about, wrong, err.Error(), ""}}
	}
	if _, err := os.Stat(filepath.Join(dir, "ledger.db")); errors.Is(err, fs.ErrNotExist) {
		return nil // the folder was not used yet, or 'kedge serve' says that it is lost
	}
	var known *ledger.Mark
	mark, err := ledger.ReadMark(cfg.HighWaterFile())
	switch {
	case err == nil:
		known = &mark
	case !errors.Is(err, fs.ErrNotExist):
		return []finding{{about, wrong, err.Error(), ""}}
	}
	seen, err := ledger.Look(dir, version, known)
	switch {
	case errors.Is(err, ledger.ErrPutBack):
		return []finding{{about, wrong, err.Error(), mendPutBack(dir, cfg.HighWaterFile())}}
	case err != nil:
		return []finding{{about, wrong, err.Error(), ""}}
	}
	found := []finding{{about, good, fmt.Sprintf("%d events, the last of %s", seen.Head.Number, people(seen.Head.Time.Time())), ""}}
	if known == nil {
		found = append(found, finding{"high-water mark", note, cfg.HighWaterFile() + " is not there: nothing tells whether the ledger is an older copy of itself", "'kedge serve' makes it anew"})
	}
	return found
}
