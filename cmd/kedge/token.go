package main

import (
	"errors"
	"fmt"
	"os"
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
	var identity, out string
	ttl := config.Duration(10 * time.Minute)
	c := &cobra.Command{
		Use: "create --identity ns/default/sa/web", Short: "Make a join token", Args: arguments(),
		Long: `Make a join token, signed by this CA, for one SPIFFE ID. The token goes to standard output and nowhere else, or with --out into a new file
that only its owner may read; the ledger records that it was made, for whom and by whom. Its first use spends it, unless --reusable. Should the answer get lost, the machine may use it again
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
			var token admin.TokenResponse
			create := func() (err error) {
				token, err = client.CreateToken(c.Context(), admin.TokenRequest{Identity: identity, TTL: int64(ttl.Std() / time.Second), Reusable: reusable})
				return err
			}
			if out == "" {
				err = create()
			} else {
				err = newFile(out, func(file *os.File) error { // before the token is made, so that it is not made in vain
					if err := create(); err != nil {
						return err
					}
					_, err := fmt.Fprintln(file, token.Token)
					return err
				})
			}
			if err != nil {
				return err
			}
			shown := token.Token
			if out != "" {
				shown = ""
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), struct {
					admin.TokenResponse
					Token string `json:"token,omitempty"` // not when it is in a file
					File  string `json:"token_file,omitempty"`
				}{token, shown, out})
			}
			use := "single use"
			if token.Reusable {
				use = "reusable"
			}
			fmt.Fprintf(c.ErrOrStderr(), "join token %s for %s, %s, valid until %s, recorded as number %d\n", token.ID, token.SPIFFEID, use,
				people(token.Expires.Time()), token.Number)
			if out != "" {
				fmt.Fprintf(c.ErrOrStderr(), "it is in %s, which only its owner may read\n", out)
				return nil
			}
			_, err = fmt.Fprintln(c.OutOrStdout(), shown)
			return err
		},
	}
	c.Flags().StringVar(&identity, "identity", "", "path of the SPIFFE ID, such as ns/default/sa/web")
	c.Flags().Var(&ttl, "ttl", "how long the token is valid, such as 1h or 7d")
	c.Flags().StringVar(&out, "out", "", "put the token into this file (0600), which must not be there yet, instead of standard output")
	c.Flags().BoolVar(&reusable, "reusable", false, "let the token be used until it expires, instead of once")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
