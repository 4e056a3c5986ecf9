package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kedge/ca/ledger"
	"kedge/cmd/kedge/config"
	"kedge/issuer/admin"
)

func newLedgerCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "ledger", Short: "The record of everything that was issued"}
	c.AddCommand(newLedgerListCommand(t), newLedgerShowCommand(t), newLedgerCountCommand(t), newLedgerVerifyCommand(t), newLedgerExportCommand(t))
	return c
}

// filterFlags are the filters that list, count and export share.
type filterFlags struct {
	types                            []string
	id, serial, issuer, since, until string
	from, to                         uint64
	limit                            int
}

func (f *filterFlags) add(c *cobra.Command) {
	c.Flags().StringSliceVar(&f.types, "type", nil, "only these types: issue, confirm, authority, bundle, token, revoke, waiver, restore")
	c.Flags().StringVar(&f.id, "spiffe-id", "", "only this SPIFFE ID; a path such as ns/default/sa/web will do")
	c.Flags().StringVar(&f.serial, "serial", "", "only the certificate with this serial number, in hex")
	c.Flags().StringVar(&f.issuer, "issuer", "", "only what this authority signed: its id, or the beginning of it")
	c.Flags().StringVar(&f.since, "since", "", "only from this time on: RFC 3339, or a duration before now such as 2h or 7d")
	c.Flags().StringVar(&f.until, "until", "", "only before this time: RFC 3339, or a duration before now")
	c.Flags().Uint64Var(&f.from, "from", 0, "only from this number on")
	c.Flags().Uint64Var(&f.to, "to", 0, "only up to this number")
}

// filter turns the flags into a filter. The CA is asked where a flag is short for something.
func (f *filterFlags) filter(c *cobra.Command, client *admin.Client) (out ledger.Filter, err error) {
	if f.limit < 0 {
		return out, usageError{fmt.Errorf("--limit %d is negative: 0 shows all", f.limit)}
	}
	if f.to != 0 && f.from > f.to {
		return out, usageError{fmt.Errorf("--from %d is after --to %d", f.from, f.to)}
	}
	out.From, out.To, out.Limit = f.from, f.to, f.limit
	for _, name := range f.types {
		var t ledger.Type
		if err := t.UnmarshalText([]byte(name)); err != nil {
			return out, usageError{fmt.Errorf("--type: %w", err)}
		}
		out.Types = append(out.Types, t)
	}
	if f.serial != "" {
		if out.Serial, err = ledger.ParseSerial(f.serial); err != nil {
			return out, usageError{fmt.Errorf("--serial: %w", err)}
		}
	}
	if out.Since, err = instant("--since", f.since); err != nil {
		return out, err
	}
	if out.Until, err = instant("--until", f.until); err != nil {
		return out, err
	}
	if out.SPIFFEID = f.id; f.id != "" && !strings.HasPrefix(f.id, "spiffe://") {
		status, err := client.Status(c.Context())
		if err != nil {
			return out, err
		}
		out.SPIFFEID = "spiffe://" + status.TrustDomain + "/" + strings.TrimPrefix(f.id, "/")
	}
	if f.issuer != "" {
		out.Authority, err = findAuthority(c, client, "--issuer", f.issuer)
	}
	return out, err
}

// instant reads RFC 3339, or a duration before now. "" is none.
func instant(flag, text string) (ledger.Time, error) {
	if text == "" {
		return 0, nil
	}
	if ago, err := config.ParseDuration(text); err == nil {
		return ledger.At(time.Now().Add(-ago.Std())), nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return 0, usageError{fmt.Errorf("%s %q is neither a time such as 2026-05-01T12:00:00Z nor a duration such as 2h", flag, text)}
	}
	return ledger.At(t), nil
}

func newLedgerListCommand(t *target) *cobra.Command {
	var flags filterFlags
	var asJSON, oldest bool
	c := &cobra.Command{
		Use: "list", Short: "List events, the newest first", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			filter, err := flags.filter(c, client)
			if err != nil {
				return err
			}
			filter.Newest = !oldest
			table := newTable(c.OutOrStdout(), "NUMBER", "TIME", "TYPE", "WHAT")
			var shown int
			for line, err := range client.Events(c.Context(), filter) {
				if err != nil {
					return err
				}
				shown++
				if asJSON {
					if _, err := fmt.Fprintf(c.OutOrStdout(), "%s\n", line.JSON); err != nil {
						return err
					}
					continue
				}
				table.row(fmt.Sprint(line.Number), line.Time.String(), line.Type, describe(line.Event))
			}
			if asJSON {
				return nil
			}
			if err := table.Flush(); err != nil {
				return err
			}
			if shown > 0 && shown == flags.limit {
				fmt.Fprintf(c.ErrOrStderr(), "only %d events are shown: --limit 0 shows all that were found\n", shown)
			}
			return nil
		},
	}
	flags.add(c)
	c.Flags().IntVar(&flags.limit, "limit", 50, "show at most so many; 0: all")
	c.Flags().BoolVar(&oldest, "oldest-first", false, "list in the order in which things happened")
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object a line")
	return c
}

// describe says in one line what an event is about.
func describe(e admin.Event) string {
	switch {
	case e.Issue != nil:
		who, by := e.Issue.SPIFFEID, ""
		if who == "" {
			who = "serving certificate for " + strings.Join(e.Issue.Names, ", ")
		}
		for _, proof := range e.Issue.Proofs {
			by += " " + proof.Method
		}
		text := fmt.Sprintf("%s  serial %s  until %s  by%s", who, e.Issue.Serial, e.Issue.NotAfter, by)
		if e.Issue.Supersedes > 0 {
			text += fmt.Sprintf("  supersedes number %d", e.Issue.Supersedes)
		}
		return text
	case e.Confirm != nil:
		text := fmt.Sprintf("the holder has number %d (%s)", e.Confirm.Number, e.Confirm.How)
		if e.Confirm.Bundle > 0 {
			text += fmt.Sprintf("  and trust bundle %d", e.Confirm.Bundle)
		}
		return text
	case e.Authority != nil:
		text := fmt.Sprintf("%s  %s → %s", short(e.Authority.ID), e.Authority.From, e.Authority.To)
		if e.Authority.Tainted {
			text = fmt.Sprintf("%s  tainted, while %s  by %s", short(e.Authority.ID), e.Authority.To, e.Authority.By)
		}
		return text + because(e.Authority.Reason)
	case e.Bundle != nil:
		roots := "1 root"
		if n := len(e.Bundle.Roots); n != 1 {
			roots = fmt.Sprintf("%d roots", n)
		}
		return fmt.Sprintf("sequence %d  %s  floor %d", e.Bundle.Sequence, roots, e.Bundle.Floor)
	case e.Token != nil:
		return fmt.Sprintf("join token %s for %s  until %s  by %s", e.Token.ID, e.Token.SPIFFEID, e.Token.Expires, e.Token.By)
	case e.Revoke != nil:
		return fmt.Sprintf("serial %s  by %s", e.Revoke.Serial, e.Revoke.By) + because(e.Revoke.Reason)
	case e.Waiver != nil:
		return fmt.Sprintf("%s: %s → %s  by %s", e.Waiver.Gate, e.Waiver.From, e.Waiver.To, e.Waiver.By)
	case e.Restore != nil:
		return fmt.Sprintf("log %s begins, after number %d of log %s, as of %s  by %s", e.Log, e.Restore.Number, e.Restore.Log, e.Restore.Taken, e.Restore.By)
	}
	return "(of a later version: see --json)"
}

// because is a reason in parentheses, where there is one.
func because(reason string) string {
	if reason == "" {
		return ""
	}
	return "  (" + reason + ")"
}

func newLedgerShowCommand(t *target) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "show NUMBER|SERIAL", Short: "Show one event, by its number or by a certificate's serial", Args: arguments("NUMBER|SERIAL"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			filter, err := oneEvent(args[0])
			if err != nil {
				return err
			}
			for line, err := range client.Events(c.Context(), filter) {
				if err != nil {
					return err
				}
				if asJSON {
					_, err := fmt.Fprintf(c.OutOrStdout(), "%s\n", line.JSON)
					return err
				}
				return showEvent(c, line.Event)
			}
			return fmt.Errorf("%w: %s", ledger.ErrNotFound, args[0])
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// oneEvent takes a number of up to 19 digits, or a serial.
func oneEvent(text string) (ledger.Filter, error) {
	var number uint64
	if len(text) < 20 {
		if _, err := fmt.Sscanf(text+"\n", "%d\n", &number); err == nil && number > 0 {
			return ledger.Filter{From: number, To: number, Limit: 1}, nil
		}
	}
	serial, err := ledger.ParseSerial(text)
	if err != nil {
		return ledger.Filter{}, usageError{fmt.Errorf("%q is neither an event's number nor a serial: %w", text, err)}
	}
	return ledger.Filter{Serial: serial, Types: []ledger.Type{ledger.TypeIssue}, Limit: 1}, nil
}

func showEvent(c *cobra.Command, e admin.Event) error {
	table := newTable(c.OutOrStdout())
	table.row("number", fmt.Sprintf("%d of log %s", e.Number, e.Log))
	table.row("type", e.Type)
	table.row("time", people(e.Time.Time()))
	i := e.Issue
	if i == nil {
		table.row("what", describe(e))
		return table.Flush()
	}
	if i.SPIFFEID != "" {
		table.row("SPIFFE ID", i.SPIFFEID)
	} else {
		table.row("names", strings.Join(i.Names, ", "))
	}
	table.row("serial", i.Serial.String())
	table.row("certificate SHA-256", i.Certificate.String())
	table.row("key SHA-256", i.Key.String())
	table.row("valid", fmt.Sprintf("%s to %s", i.NotBefore, people(i.NotAfter.Time())))
	table.row("signed by", i.Authority.String())
	table.row("bundle", bundleText(i))
	table.row("profile", i.Profile)
	for _, p := range i.Proofs {
		table.row("proof", strings.TrimSpace(fmt.Sprintf("%s %s %s at %s", p.Method, p.Issuer, p.Subject, p.Time)))
	}
	if p := i.FirstProof; p != nil {
		table.row("first proof", strings.TrimSpace(fmt.Sprintf("%s %s %s at %s", p.Method, p.Issuer, p.Subject, p.Time)))
	}
	table.row("holder", i.Holder.Kind+" "+i.Holder.ID)
	if i.Replaces > 0 {
		table.row("replaces", fmt.Sprintf("number %d", i.Replaces))
	}
	if i.Supersedes > 0 {
		table.row("supersedes", fmt.Sprintf("number %d, which the same join token got", i.Supersedes))
	}
	if i.ClampedFrom > 0 {
		table.row("asked for", (time.Duration(i.ClampedFrom) * time.Second).String())
	}
	if i.RequestID != "" {
		table.row("request id", i.RequestID)
	}
	if i.Peer != "" {
		table.row("peer", i.Peer)
	}
	return table.Flush()
}

// bundleText says which trust bundle went out with a certificate, or what is known of its holder's when it goes out by itself.
func bundleText(i *ledger.Issue) string {
	switch {
	case i.Delivery != ledger.DeliverySDS:
		return fmt.Sprintf("sequence %d", i.Bundle)
	case i.Held == 0:
		return fmt.Sprintf("sequence %d, by SDS; it was not known yet which one the holder has", i.Bundle)
	}
	return fmt.Sprintf("sequence %d, by SDS; the holder had %d", i.Bundle, i.Held)
}

func newLedgerCountCommand(t *target) *cobra.Command {
	var flags filterFlags
	var asJSON bool
	c := &cobra.Command{
		Use: "count", Short: "Count events", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			filter, err := flags.filter(c, client)
			if err != nil {
				return err
			}
			n, err := client.Count(c.Context(), filter)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), map[string]uint64{"count": n})
			}
			_, err = fmt.Fprintln(c.OutOrStdout(), n)
			return err
		},
	}
	flags.add(c)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func newLedgerVerifyCommand(t *target) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "verify", Short: "Check the hash chain of the whole ledger, and that its tables follow from it", Args: arguments(),
		Long: `Compute the hash chain anew from the first event to the last, check that the numbers have no gap, and compare the holdings and the other
tables with a recount. Exit code 4 when something does not hold.`,
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			var report ledger.VerifyReport
			if err := client.Get(c.Context(), "/v1/ledger/verify", &report); err != nil {
				return err
			}
			if asJSON {
				if report.Problems == nil {
					report.Problems = []string{} // a list, whatever it has
				}
				if err := printJSON(c.OutOrStdout(), report); err != nil {
					return err
				}
			} else {
				fmt.Fprintf(c.OutOrStdout(), "%d events in %d commits, numbers %d to %d\n", report.Events, report.Commits, report.FirstNumber, report.LastNumber)
				for _, problem := range report.Problems {
					fmt.Fprintf(c.OutOrStdout(), "problem: %s\n", problem)
				}
				if len(report.Problems) == 0 {
					fmt.Fprintln(c.OutOrStdout(), "the chain holds, and the holdings equal a recount")
				}
			}
			if len(report.Problems) > 0 {
				return fmt.Errorf("the ledger does not verify: %w", errFound)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func newLedgerExportCommand(t *target) *cobra.Command {
	var flags filterFlags
	c := &cobra.Command{
		Use: "export", Short: "Print events as JSON lines, the oldest first, for a SIEM", Args: arguments(),
		Long: `Print one JSON object a line, the oldest event first. To go on where the last export ended, give --from one more than the last number that it printed.
When events from there on were pruned meanwhile, that is an error, so that no gap goes unnoticed: the archive folder has them, if there is one. Without --from it
begins with the first event that is kept.`,
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := t.client()
			if err != nil {
				return err
			}
			filter, err := flags.filter(c, client)
			if err != nil {
				return err
			}
			for line, err := range client.Events(c.Context(), filter) {
				if err != nil {
					return err
				}
				if _, err := fmt.Fprintf(c.OutOrStdout(), "%s\n", line.JSON); err != nil {
					return errors.Join(errors.New("the export is not complete"), err)
				}
			}
			return nil
		},
	}
	flags.add(c)
	c.Flags().Bool("json", true, "it is always JSON")
	return c
}
