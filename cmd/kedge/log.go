package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newLogCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "log", Short: "What the running CA logs"}
	var asJSON bool
	level := &cobra.Command{
		Use: "level debug|info|warn|error", Short: "Change the log level of the running CA, until it restarts", Args: arguments("debug|info|warn|error"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			if err := client.SetLogLevel(c.Context(), args[0]); err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), map[string]string{"level": args[0]})
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "the log level is %s now\n", args[0])
			return err
		},
	}
	level.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.AddCommand(level)
	return c
}
