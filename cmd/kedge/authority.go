package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/admin"
)

func newAuthorityCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "authority", Short: "The CA's roots and issuing CAs"}
	c.AddCommand(newAuthorityListCommand(t), newAuthorityTaintCommand(t))
	return c
}

// findAuthority completes the beginning of an authority's id; what is how the command line calls it.
func findAuthority(c *cobra.Command, client *admin.Client, what, prefix string) (ledger.Hash, error) {
	var all []ca.AuthorityStatus
	if err := client.Get(c.Context(), "/v1/authorities", &all); err != nil {
		return ledger.Hash{}, err
	}
	var found []ledger.Hash
	for _, a := range all {
		if strings.HasPrefix(a.ID.String(), strings.ToLower(prefix)) {
			found = append(found, a.ID)
		}
	}
	if len(found) != 1 {
		return ledger.Hash{}, usageError{fmt.Errorf("%s %q is the beginning of %d authorities' ids: see 'kedge authority list'", what, prefix, len(found))}
	}
	return found[0], nil
}

// leastTaintID is how many digits of an id a taint asks for.
const leastTaintID = 8

// underTainted says what is left of a tainted issuing CA.
func underTainted(live uint64, last time.Time) string {
	return fmt.Sprintf("live certificates under it, this CA's own for its server among them: %d, the last until %s", live, people(last))
}

func newAuthorityTaintCommand(t *target) *cobra.Command {
	var asJSON bool
	var reason string
	c := &cobra.Command{
		Use: "taint ID --reason TEXT", Short: "Say that an issuing CA's key is compromised, for good", Args: arguments("ID"),
		Long: `Mark an issuing CA as compromised. From then on nothing is issued under it, and client certificates under it authenticate nobody to this CA:
their holders need a token. If it is the one that signs, a new one takes over at once. What it issued still verifies among workloads
until it expires. ID is the authority's id, or at least the first eight digits of it. There is no way back.`,
		RunE: func(c *cobra.Command, args []string) error {
			if reason == "" {
				return usageError{errors.New("--reason is missing: why, for the ledger")}
			}
			if len(args[0]) < leastTaintID {
				return usageError{fmt.Errorf("ID %q has fewer than %d digits, and a taint has no way back: give at least the first %d of the id that 'kedge authority list' shows",
					args[0], leastTaintID, leastTaintID)}
			}
			client, err := t.client()
			if err != nil {
				return err
			}
			id, err := findAuthority(c, client, "ID", args[0])
			if err != nil {
				return err
			}
			answer, err := client.Taint(c.Context(), admin.TaintRequest{ID: id, Reason: reason})
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), answer)
			}
			text := fmt.Sprintf("tainted %s\n", answer.ID)
			if answer.Signing != nil {
				text += fmt.Sprintf("signing now is %s\n", answer.Signing)
			}
			if answer.Live > 0 && answer.LastExpiry != nil {
				text += fmt.Sprintf("%s. Their holders need a token to renew; other workloads accept them until they expire\n", underTainted(answer.Live, *answer.LastExpiry))
			}
			_, err = io.WriteString(c.OutOrStdout(), text)
			return err
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the ledger")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func newAuthorityListCommand(t *target) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "list", Short: "List the authorities with their states", Args: arguments(),
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
				table.row(short(a.ID), a.Role.String(), state, a.KeyType, people(a.NotAfter), renews, fmt.Sprint(a.LiveSVIDs), coverageText(a))
			}
			return table.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// coverageText says what the ledger knows of the certificates under an authority, and for how long others may live that it does not know.
func coverageText(a ca.AuthorityStatus) string {
	switch c := a.Coverage; {
	case c.Kind == "since":
		return "since " + people(c.Since.Time())
	case c.Kind == "foreign" && a.UnseenUntil != nil:
		return "foreign until " + people(*a.UnseenUntil)
	default:
		return c.Kind
	}
}
