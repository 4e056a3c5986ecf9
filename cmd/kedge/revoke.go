package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"kedge/issuer/admin"
)

func newSVIDRevokeCommand(t *target) *cobra.Command {
	var asJSON, lineage bool
	var reason string
	c := &cobra.Command{
		Use: "revoke SERIAL", Short: "Make an SVID authenticate nobody to this CA any more", Args: arguments("SERIAL"),
		Long: `Revoke an SVID by its serial number: from now on it renews nothing. Other workloads go on accepting it until it expires, since they do not ask this CA.
An SVID that was renewed already has a successor, which goes on: with --lineage every one that follows on it is revoked, too.`,
		RunE: func(c *cobra.Command, args []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			answer, err := client.Revoke(c.Context(), admin.RevokeRequest{Serial: args[0], Reason: reason, Lineage: lineage})
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), answer)
			}
			for _, event := range answer.Revoked {
				if _, err := fmt.Fprintf(c.OutOrStdout(), "revoked %s, which was issued as number %d and expires %s\n",
					event.Serial, event.Number, people(event.NotAfter.Time())); err != nil {
					return err
				}
			}
			for _, one := range answer.Alive {
				if _, err := fmt.Fprintf(c.OutOrStdout(), "number %d replaced it and is alive: serial %s, expires %s\n",
					one.Number, one.Serial, people(one.NotAfter.Time())); err != nil {
					return err
				}
			}
			if len(answer.Alive) > 0 {
				_, err = fmt.Fprintf(c.OutOrStdout(), "'kedge svid revoke %s --lineage' revokes that too\n", args[0])
			}
			return err
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the ledger")
	c.Flags().BoolVar(&lineage, "lineage", false, "revoke every SVID that follows on it, too")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
