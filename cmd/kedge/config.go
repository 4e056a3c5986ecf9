package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newConfigCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "The configuration"}
	c.AddCommand(newConfigCheckCommand(t), newConfigPrintCommand(t))
	return c
}

func newConfigCheckCommand(t *target) *cobra.Command {
	return &cobra.Command{
		Use: "check", Short: "Say everything that is wrong with the configuration", Args: cobra.NoArgs,
		Long: `Read the configuration that --config names as 'kedge serve' would, and say everything that is wrong with it. Exit code 2 when 'kedge serve' would refuse it.`,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := t.load()
			if err != nil {
				return err
			}
			warnings, err := cfg.Validate()
			for _, warning := range warnings {
				fmt.Fprintf(c.OutOrStdout(), "warning: %s\n", warning)
			}
			if err != nil {
				return usageError{err}
			}
			what := t.config
			if what == "" {
				what = "the default configuration"
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%s is good\n", what)
			return err
		},
	}
}

func newConfigPrintCommand(t *target) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "print", Short: "Print the configuration with every default filled in", Args: cobra.NoArgs,
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
