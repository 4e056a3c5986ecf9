package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"kedge/cmd/kedge/config"
)

func newConfigCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "The configuration"}
	c.AddCommand(newConfigCheckCommand(t), newConfigPrintCommand(t))
	return c
}

func newConfigCheckCommand(t *target) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "check", Short: "Say everything that is wrong with the configuration", Args: arguments(),
		Long: `Read the configuration that --config names, and the files that it names, as 'kedge serve' would, and say everything that is wrong. Exit code 2 when
'kedge serve' would refuse it. What may come later, such as a jwksFile that is mounted then, is a warning until it is there. What is in the data
folder, and whether addresses are free, is for 'kedge doctor'.`,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := t.load()
			var warnings []string
			if err == nil {
				warnings, err = judge(cfg)
			}
			if asJSON {
				return errors.Join(err, printVerdict(c, warnings, err))
			}
			if err != nil && cfg == nil {
				return err
			}
			for _, warning := range warnings {
				fmt.Fprintf(c.OutOrStdout(), "warning: %s\n", warning)
			}
			if err != nil {
				return err
			}
			what := t.config
			if what == "" {
				what = "the default configuration"
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%s is good\n", what)
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// printVerdict prints what is wrong with a configuration, a problem an element.
func printVerdict(c *cobra.Command, warnings []string, err error) error {
	verdict := struct {
		Good     bool             `json:"good"`
		Problems []config.Problem `json:"problems"`
		Warnings []string         `json:"warnings"`
	}{err == nil, []config.Problem{}, append([]string{}, warnings...)}
	var found *config.Error
	if errors.As(err, &found) {
		verdict.Problems = found.Problems
	} else if err != nil {
		verdict.Problems = []config.Problem{{Text: err.Error()}}
	}
	return printJSON(c.OutOrStdout(), verdict)
}

func newConfigPrintCommand(t *target) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "print", Short: "Print the configuration with every default filled in", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := t.load()
			if err != nil {
				return err
			}
			return cfg.Print(c.OutOrStdout(), asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
