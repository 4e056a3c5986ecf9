package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/cmd/kedge/config"
)

// rehearsalLimit is how long everything that is asked in a check may take.
const rehearsalLimit = time.Minute

func newInitCommand(t *target) *cobra.Command {
	var root, keys, out string
	var set []string
	var unchecked bool
	c := &cobra.Command{
		Use: "init --root KIND", Short: "Write a configuration for a root, and check it against the real thing", Args: arguments(),
		Long: `Write a commented configuration for the root and the key store that are named, with the values that --set gives, and check it: what it names must be there, and a
rehearsal of a first start must succeed. That makes a key, has it certified for some minutes, checks what it signs, and deletes it; Vault and tokens see it.
A root of kind file is made by the first start; nothing is made here.

  kedge init --root file
  kedge init --root cacerts --set root.cacerts.dir=/etc/cacerts
  kedge init --root vault --set vault.address=https://vault.example:8200 --set vault.login.token=/run/secrets/vault-token
  kedge init --root pkcs11 --keys memory --set root.pkcs11.certificateFile=root.pem --set 'root.pkcs11.uri=pkcs11:token=roots;object=mesh?module-path=...'`,
		RunE: func(c *cobra.Command, _ []string) error {
			given, err := initKeys(root, keys, set)
			if err != nil {
				return usageError{err}
			}
			if t.config != "" {
				return usageError{errors.New("--config is for a configuration that is there: name the new one with --out")}
			}
			if t.data != "" {
				given["dataDir"] = t.data
			}
			folder, err := filepath.Abs(filepath.Dir(out))
			if err != nil {
				return fmt.Errorf("finding the folder of %s: %w", out, err)
			}
			cfg, err := config.FromKeys(given, folder)
			if err != nil {
				return usageError{err}
			}
			warnings, err := judge(cfg)
			for _, warning := range warnings {
				fmt.Fprintf(c.ErrOrStderr(), "warning: %s\n", warning)
			}
			if err != nil {
				return fmt.Errorf("nothing is written: %w", err)
			}
			if !unchecked {
				if err := rehearse(c.Context(), c.ErrOrStderr(), cfg); err != nil {
					return fmt.Errorf("nothing is written, since the check failed; --unchecked writes it all the same: %w", err)
				}
			}
			if err := newFile(out, func(f *os.File) error { return cfg.WriteTemplate(f) }); err != nil {
				return err
			}
			fmt.Fprintf(c.ErrOrStderr(), "%s is written. Next: say who may ask, under callers.tokenIssuers (docs/configuration.md), and kedge serve --config %s\n", out, out)
			return nil
		},
	}
	c.Flags().StringVar(&root, "root", "", "where the root is: "+strings.Join(config.RootKinds(), ", "))
	c.Flags().StringVar(&keys, "keys", config.KeyStoreFile, "where the keys of issuing CAs are: "+strings.Join(config.KeyStores(), ", "))
	c.Flags().StringArrayVar(&set, "set", nil, "a key of the configuration and its value, like vault.address=https://vault.example:8200; may be given several times")
	c.Flags().StringVar(&out, "out", "kedge.yaml", "the file to write; nothing is overwritten")
	c.Flags().BoolVar(&unchecked, "unchecked", false, "write it without asking the real thing")
	return c
}

// initKeys gathers what the flags say, as keys of the configuration.
func initKeys(root, keys string, set []string) (map[string]string, error) {
	if kinds := config.RootKinds(); !slices.Contains(kinds, root) {
		return nil, fmt.Errorf("--root is %q: name one of %s", root, strings.Join(kinds, ", "))
	}
	given := map[string]string{"root.kind": root, "issuingCA.keyStore": keys}
	for _, pair := range set {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return nil, fmt.Errorf("--set %q: write KEY=VALUE", pair)
		}
		if _, twice := given[key]; twice {
			return nil, fmt.Errorf("--set %s: it is given twice, or by --root or --keys", key)
		}
		given[key] = value
	}
	return given, nil
}

// rehearse checks a configuration's root and key store against the real ones, and tells what it found. A root of kind file, which the first start makes, is made for the check alone.
func rehearse(ctx context.Context, w io.Writer, c *config.Config) error {
	ctx, cancel := context.WithTimeout(ctx, rehearsalLimit)
	defer cancel()
	dir, err := os.MkdirTemp("", "kedge-rehearsal-")
	if err != nil {
		return fmt.Errorf("making a folder for the rehearsal's key: %w", err)
	}
	defer os.RemoveAll(dir) // it holds nothing but a key that was deleted, and one that nobody trusts
	own := c.Root.Kind == config.RootKindFile
	if own {
		fmt.Fprintf(w, "the root will be made in %s by the first start, or is there already\n", c.Root.File.Dir)
		copied := *c
		c = &copied
		c.Root.File.Dir = filepath.Join(dir, "root")
	}
	from, err := openOrigins(c, folders{keys: filepath.Join(dir, "keys"), tokens: sharedTokens(c.DataDir)}, slog.New(warningsOnly{slog.NewTextHandler(w, nil)}))
	if err != nil {
		return err
	}
	defer from.close() // what it was asked is answered
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return fmt.Errorf("trustDomain: %w", err)
	}
	profiles, err := c.SigningProfiles()
	if err != nil {
		return err
	}
	found, err := ca.Rehearse(ctx, ca.Options{TrustDomain: td, Root: from.root, Anchors: from.anchors, Keys: from.keys, Profiles: profiles,
		IssuingKey: ca.KeySpec(c.IssuingCA.KeyType), Clock: ca.SystemClock()})
	for _, anchor := range found.Roots {
		if !own {
			fmt.Fprintf(w, "trust anchor: %s, until %s, SHA-256 %s\n", anchor.Subject, people(anchor.NotAfter), ca.AuthorityID(anchor))
		}
	}
	if err != nil {
		return err
	}
	if found.Brought {
		fmt.Fprintf(w, "issuing CA: %s, until %s, comes with the root and signs as it should\n", found.Chain[0].Subject, people(found.Chain[0].NotAfter))
	} else {
		fmt.Fprintln(w, "issuing CA: the root certifies one, and what it signs is good; the rehearsal's key is deleted")
	}
	return nil
}

// warningsOnly passes on what to mind. What goes wrong, the error says that ends the check.
type warningsOnly struct{ slog.Handler }

func (warningsOnly) Enabled(_ context.Context, level slog.Level) bool { return level == slog.LevelWarn }
