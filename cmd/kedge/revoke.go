package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"kedge/issuer/admin"
)

func newSVIDRevokeCommand(t *target) *cobra.Command {
	var asJSON bool
	var reason string
	c := &cobra.Command{
		Use: "revoke SERIAL", Short: "Make an SVID authenticate nobody to this CA any more", Args: cobra.ExactArgs(1),
		Long: `Revoke an SVID by its serial number: from now on it renews nothing. Other workloads go on accepting it until it expires, since they do not ask this CA.`,
		RunE: func(c *cobra.Command, args []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			event, err := client.Revoke(c.Context(), admin.RevokeRequest{Serial: args[0], Reason: reason})
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), event)
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "revoked %s, which was issued as number %d and expires %s\n", event.Serial, event.Number, people(event.NotAfter.Time()))
			return err
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the ledger")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
