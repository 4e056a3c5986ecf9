package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"kedge/ca"
)

func newAuthorityCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "authority", Short: "The CA's roots and issuing CAs"}
	c.AddCommand(newAuthorityListCommand(t))
	return c
}

func newAuthorityListCommand(t *target) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "list", Short: "List the authorities with their states", Args: cobra.NoArgs,
		Long: `List every authority that the ledger knows. A prepared one is trusted and not signing yet, the active one signs, a retired one is
trusted because certificates under it are still alive, a removed one is history.`,
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			var all []ca.AuthorityStatus
			if err := client.Get(c.Context(), "/v1/authorities", &all); err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), all)
			}
			table := newTable(c.OutOrStdout(), "ID", "ROLE", "STATE", "KEY", "NOT AFTER", "RENEWS", "LIVE", "COVERAGE")
			for _, a := range all {
				state, renews := a.State.String(), "-"
				if a.Tainted {
					state += " (tainted)"
				}
				if a.Renews != nil {
					renews = people(*a.Renews)
				}
				table.row(short(a.ID), a.Role.String(), state, a.KeyType, people(a.NotAfter), renews, fmt.Sprint(a.LiveSVIDs), a.Coverage.Kind)
			}
			return table.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
