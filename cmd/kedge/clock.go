package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newClockCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "clock", Short: "The clock that steps wait for which cannot be taken back"}
	var asJSON bool
	confirm := &cobra.Command{
		Use: "confirm", Short: "Say that this machine's clock is right", Args: arguments(),
		Long: `After a jump of the clock, or a reboot without any token from outside, the CA goes on issuing but prunes and removes nothing, since it
cannot know how much time has really passed. 'kedge doctor' says so. Look at the clock; if it is right, say so with this command.`,
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			recorded, err := client.ConfirmClock(c.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), recorded)
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "confirmed, and recorded as number %d\n", recorded.Number)
			return err
		},
	}
	confirm.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.AddCommand(confirm)
	return c
}
