package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"kedge/cmd/kedge/config"
	"kedge/issuer/admin"
)

func newTokenCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "token", Short: "Join tokens, for machines that no token issuer knows"}
	c.AddCommand(newTokenCreateCommand(t))
	return c
}

func newTokenCreateCommand(t *target) *cobra.Command {
	var asJSON, reusable bool
	var identity string
	ttl := config.Duration(10 * time.Minute)
	c := &cobra.Command{
		Use: "create --identity ns/default/sa/web", Short: "Make a join token", Args: arguments(),
		Long: `Make a join token, signed by this CA, for one SPIFFE ID. The token goes to standard output and nowhere else; the ledger records that it
was made, for whom and by whom. Its first use spends it, unless --reusable. Should the answer get lost, the machine may use it again
three times within five minutes, until it has shown its new certificate.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if identity == "" {
				return usageError{errors.New("--identity is missing: the path of a SPIFFE ID, such as ns/default/sa/web")}
			}
			if ttl.Std() < time.Second {
				return usageError{fmt.Errorf("--ttl %s: a token lives at least a second", ttl)}
			}
			client, err := t.client()
			if err != nil {
				return err
			}
			token, err := client.CreateToken(c.Context(), admin.TokenRequest{Identity: identity, TTL: int64(ttl.Std() / time.Second), Reusable: reusable})
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), token)
			}
			use := "single use"
			if token.Reusable {
				use = "reusable"
			}
			fmt.Fprintf(c.ErrOrStderr(), "join token %s for %s, %s, valid until %s, recorded as number %d\n", token.ID, token.SPIFFEID, use,
				people(token.Expires.Time()), token.Number)
			_, err = fmt.Fprintln(c.OutOrStdout(), token.Token)
			return err
		},
	}
	c.Flags().StringVar(&identity, "identity", "", "path of the SPIFFE ID, such as ns/default/sa/web")
	c.Flags().Var(&ttl, "ttl", "how long the token is valid, such as 1h or 7d")
	c.Flags().BoolVar(&reusable, "reusable", false, "let the token be used until it expires, instead of once")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
