package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newLogCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "log", Short: "What the running CA logs"}
	c.AddCommand(&cobra.Command{
		Use: "level debug|info|warn|error", Short: "Change the log level of the running CA, until it restarts", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			if err := client.SetLogLevel(c.Context(), args[0]); err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "the log level is %s now\n", args[0])
			return err
		},
	})
	return c
}
