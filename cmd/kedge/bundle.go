package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newBundleCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "bundle", Short: "The trust bundle: what verifiers must hold"}
	c.AddCommand(newBundleShowCommand(t))
	return c
}

func newBundleShowCommand(t *target) *cobra.Command {
	var asJSON bool
	var format string
	c := &cobra.Command{
		Use: "show", Short: "Show the trust bundle", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			if format != "" && format != "pem" && format != "spiffe" {
				return usageError{fmt.Errorf("--format %q is neither pem nor spiffe", format)}
			}
			if format != "" && asJSON {
				return usageError{fmt.Errorf("--format and --json exclude each other")}
			}
			client, err := t.client()
			if err != nil {
				return err
			}
			b, err := client.Bundle(c.Context())
			if err != nil {
				return err
			}
			out := c.OutOrStdout()
			switch {
			case asJSON:
				return printJSON(out, b)
			case format == "pem":
				_, err = fmt.Fprint(out, b.PEM)
				return err
			case format == "spiffe":
				_, err = fmt.Fprintln(out, b.SPIFFE)
				return err
			}
			table := newTable(out)
			table.row("trust domain", b.TrustDomain)
			table.row("sequence", fmt.Sprintf("%d (floor %d)", b.Sequence, b.Floor))
			table.row("since", people(b.Since))
			table.row("incarnation", short(b.Incarnation))
			table.row("SHA-256 of the PEM", b.SHA256.String())
			for i, root := range b.Roots {
				table.row(fmt.Sprintf("root %d", i+1), root.String())
			}
			if err := table.Flush(); err != nil {
				return err
			}
			_, err = fmt.Fprintln(out, "\n'kedge bundle show --format pem' prints what verifiers read, '--format spiffe' the SPIFFE bundle document.")
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON, with both formats in it")
	c.Flags().StringVar(&format, "format", "", "print the bundle itself: pem, or spiffe for the JWKS document")
	return c
}
