// Command kedge is a certificate authority for service meshes: 'kedge serve' runs it, the other verbs talk to a running one.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"kedge/hsm"
	"kedge/issuer/admin"
)

// version is set by the linker.
var version = "0.1.0-dev"

// Exit codes, the same for every verb.
const (
	exitFailed     = 1 // the command could not do what was asked
	exitUsage      = 2 // the command line or the configuration is wrong
	exitNotRunning = 3 // no CA is running there
	exitFound      = 4 // a check was made, and found something wrong
)

// usageError marks an error in the command line or the configuration.
type usageError struct{ error }

func (u usageError) Unwrap() error { return u.error }

// errFound ends a check that found something wrong, after it printed what.
var errFound = errors.New("something is wrong, see above")

func main() {
	if hsm.IsChild(os.Args) {
		os.Exit(hsm.ChildMain())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the second signal ends the process as it ends any other
	os.Exit(run(ctx, os.Args[1:]))
}

// run runs one command and says how it went as an exit code.
func run(ctx context.Context, args []string) int {
	root := newRootCommand()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(os.Stderr, "kedge: %v\n", err)
	var usage usageError
	switch {
	case errors.Is(err, errFound):
		return exitFound
	case errors.Is(err, admin.ErrNotRunning):
		return exitNotRunning
	case errors.As(err, &usage), errors.Is(err, admin.ErrInvalid):
		return exitUsage
	}
	return exitFailed
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "kedge",
		Short: "A certificate authority for service meshes",
		Long: `Kedge is a certificate authority for service meshes. It answers Istio's CSR API, issues short-lived SPIFFE X.509-SVIDs, and records
every one of them before it leaves.

Begin with 'kedge serve'. The other verbs talk to the CA that runs on the data folder that --data or --config names.

Exit codes: 0 done, 1 failed, 2 wrong command line or configuration, 3 no CA is running there, 4 a check found something wrong.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w: see '%s --help'", err, c.CommandPath())}
	})
	t := &target{}
	root.PersistentFlags().StringVar(&t.config, "config", "", "configuration file; without it the defaults hold")
	root.PersistentFlags().StringVar(&t.data, "data", "", "data folder, instead of the configuration's dataDir")
	root.AddCommand(newServeCommand(t), newAgentCommand(t), newTokenCommand(t), newSVIDCommand(t), newAuthorityCommand(t), newBundleCommand(t), newLedgerCommand(t),
		newBackupCommand(t), newRestoreCommand(t), newKeyCommand(), newCeremonyCommand(), newInitCommand(t), newConfigCommand(t), newDoctorCommand(t), newClockCommand(t), newLogCommand(t))
	strictArgs(root)
	return root
}

// arguments makes a verb take exactly these arguments, and say which one is missing or too many.
func arguments(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		usage := strings.TrimSuffix(c.UseLine(), " [flags]")
		switch {
		case len(args) < len(names):
			return fmt.Errorf("%s is missing: write '%s'", names[len(args)], usage)
		case len(args) > len(names):
			return fmt.Errorf("%q is an argument too many: write '%s'", args[len(names)], usage)
		}
		return nil
	}
}

// strictArgs makes wrong arguments usage errors, and a verb without its second word an error instead of a help text.
func strictArgs(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usageError{fmt.Errorf("%w: see '%s --help'", err, c.CommandPath())}
			}
			return nil
		}
	}
	if c.HasSubCommands() && c.RunE == nil {
		c.Args = cobra.ArbitraryArgs
		c.SuggestionsMinimumDistance = 2
		c.RunE = func(c *cobra.Command, args []string) error {
			switch {
			case len(args) == 0 && !c.HasParent():
				return c.Help()
			case len(args) == 0:
				return usageError{fmt.Errorf("%s needs to know what to do: see '%s --help'", c.CommandPath(), c.CommandPath())}
			}
			hint := ""
			if near := c.SuggestionsFor(args[0]); len(near) > 0 {
				hint = fmt.Sprintf("; did you mean %q?", near[0])
			}
			return usageError{fmt.Errorf("unknown command %q for %q%s: see '%s --help'", args[0], c.CommandPath(), hint, c.CommandPath())}
		}
	}
	for _, sub := range c.Commands() {
		strictArgs(sub)
	}
}
