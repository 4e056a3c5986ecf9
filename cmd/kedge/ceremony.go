package main

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"time"

	"github.com/spf13/cobra"

	"kedge/ca/ceremony"
	"kedge/hsm"
	"kedge/plugins/pkcs11"
)

func newCeremonyCommand() *cobra.Command {
	var dry bool
	var template string
	c := &cobra.Command{
		Use: "ceremony PLAN", Short: "Sign a root, an issuing CA's CSR or a CRL with a key on a token, as a plan says",
		Long: `Make the certificate of a root on a token, sign that of an issuing CA from its CSR, or sign a CRL. The plan, a file that others can review, is the whole input.

  kedge ceremony --template root > plan.yaml     a plan to fill in: root, intermediate or crl
  kedge ceremony plan.yaml --dry-run             exactly what will be signed, to the octet; nothing is made, signed or written
  kedge ceremony plan.yaml                       does it

What is to be signed is linted before it is signed, and what was signed is verified and linted before it is written. Nothing is overwritten. Beside the outcome a record is written: who,
when, the plan, the token and what it says of the key, and the hashes. A run that was cut short is run again: it says what is there by now, and goes on or says how.`,
		Args: func(c *cobra.Command, args []string) error {
			if template != "" {
				return arguments()(c, args)
			}
			return arguments("PLAN")(c, args)
		},
		RunE: func(c *cobra.Command, args []string) error {
			if template != "" {
				text, err := ceremony.Template(template, time.Now())
				if err != nil {
					return usageError{err}
				}
				_, err = fmt.Fprint(c.OutOrStdout(), text)
				return err
			}
			plan, err := ceremony.Load(args[0])
			if err != nil {
				return usageError{err}
			}
			return perform(c, plan, dry)
		},
	}
	c.Flags().BoolVar(&dry, "dry-run", false, "show exactly what will be signed, and do nothing")
	c.Flags().StringVar(&template, "template", "", "print a plan to fill in: root, intermediate or crl")
	return c
}

// perform does what a plan says. All that can be found wrong is found before a key is made or signs: the names are free, their folders can be written to, and what will be signed is good.
func perform(c *cobra.Command, plan *ceremony.Plan, dry bool) error {
	r := performance{Plan: plan, now: time.Now()}
	if err := r.begin(c); err != nil {
		return err
	}
	defer r.token.Close()
	left, err := plan.Left()
	switch {
	case err != nil:
		return err
	case left != nil:
		return r.complete(c, left, dry)
	case plan.Key.Create != "":
		if r.prepared, err = plan.Prepare(nil, r.now); err != nil {
			return fmt.Errorf("nothing is made or signed: %w", err)
		}
	}
	if dry {
		if err := r.prepare(c, false); err != nil {
			return err
		}
		fmt.Fprintln(c.ErrOrStderr(), "nothing was made, signed or written: this was a dry run")
		return nil
	}
	file, recordFile := plan.Files()
	err = newFile(file, func(outcome *os.File) error {
		return newFile(recordFile, func(record *os.File) error { // gets its name first: what was signed is not without one
			return r.sign(c, outcome, record)
		})
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(c.ErrOrStderr(), "signed and verified: %s, with SHA-256 %s; the record is %s\n", file, r.record.SHA256, recordFile)
	return nil
}

// performance is a ceremony while it is under way.
type performance struct {
	*ceremony.Plan
	now      time.Time // of its begin
	uri      hsm.URI
	token    *hsm.Token
	signer   *hsm.Signer // nil while it is not made
	key      hsm.Key
	prepared *ceremony.Prepared
	record   ceremony.Record // gets full step by step, so that nothing is signed of which the record cannot be written
}

// begin asks the token for nothing.
func (r *performance) begin(c *cobra.Command) (err error) {
	if r.token, r.uri, err = openToken(c, r.Key.URI, r.Key.ModuleParameters, r.Key.Timeout); err != nil {
		return fmt.Errorf("key.uri of the plan: %w", err)
	}
	if r.uri.Object == "" && (len(r.uri.ID) == 0 || r.Key.Create != "") {
		return usageError{errors.New("key.uri of the plan names no key: write object=LABEL")}
	}
	who, err := user.Current()
	if err != nil {
		return fmt.Errorf("finding the user for the record: %w", err)
	}
	if r.record.Host, err = os.Hostname(); err != nil {
		return fmt.Errorf("finding this machine's name for the record: %w", err)
	}
	r.record.User, r.record.Program, r.record.Began = fmt.Sprintf("%s (uid %s)", who.Username, who.Uid), "kedge "+version, r.now.UTC()
	return nil
}

// prepare finds the key, or makes it when the plan says so and it is time, and shows what will be signed. A key that should be made and is there already is an error: it may be that of a run that
// was cut short, and it may be somebody else's.
func (r *performance) prepare(c *cobra.Command, timeToMake bool) (err error) {
	create := r.Plan.Key.Create
	r.signer, r.key, err = r.token.FindObject(c.Context())
	switch {
	case err == nil && create != "":
		return fmt.Errorf("the %s is on the token already, and the plan is to make one. If a run of this plan was cut short it is that run's: 'kedge key inspect' shows it, and with create: \"\" in the "+
			"plan it signs. Else name another key in the plan", r.key)
	case create != "" && errors.Is(err, hsm.ErrNotFound) && timeToMake:
		r.signer, r.key, err = createKey(c.Context(), r.token, r.uri, hsm.Spec(create))
	case create != "" && errors.Is(err, hsm.ErrNotFound):
		err = nil
	}
	if err != nil {
		return err
	}
	if r.signer != nil {
		if err := pkcs11.Acceptable(r.key, r.Plan.Key.AllowExportable); err != nil {
			return fmt.Errorf("%w; in a plan that is key.allowExportable: true", err)
		}
		if r.prepared, err = r.Prepare(r.signer.Public(), r.now); err != nil {
			return fmt.Errorf("nothing is signed: %w", err)
		}
	}
	_, err = fmt.Fprint(c.OutOrStdout(), r.prepared.Describe())
	return err
}

// sign has the key sign, and fills the two files.
func (r *performance) sign(c *cobra.Command, outcome, record *os.File) error {
	if err := r.prepare(c, true); err != nil {
		return err
	}
	info, err := r.token.Info(c.Context())
	if err != nil {
		return err
	}
	uri := r.uri
	uri.PINSource = hsm.PINSource{}
	r.record.Token = ceremony.Token{URI: uri.String(), Label: info.Label, Serial: info.Serial, Manufacturer: info.Manufacturer, Model: info.Model, Firmware: info.Firmware, Module: info.Module,
		Library: info.Library, KeyLabel: r.key.Label, KeyID: r.key.ID.String(), KeyType: kindOf(r.key), KeyMade: r.Plan.Key.Create != "", Attributes: attributesOf(r.key)}
	signed, err := r.prepared.Sign(r.signer)
	if err != nil {
		return err
	}
	r.record.Ended = time.Now().UTC()
	text, err := r.prepared.Record(&r.record, signed)
	if err != nil {
		return err
	}
	if _, err := record.Write(text); err != nil {
		return err
	}
	_, err = outcome.Write(signed.PEM)
	return err
}

// complete writes the outcome that a run of the same plan has left in its record, when it is what the key on the token signed.
func (r *performance) complete(c *cobra.Command, left *ceremony.Record, dry bool) (err error) {
	file, recordFile := r.Files()
	if r.signer, r.key, err = r.token.FindObject(c.Context()); err != nil {
		return err
	}
	if r.prepared, err = r.Prepare(r.signer.Public(), r.now); err != nil {
		return err
	}
	signed, err := r.prepared.Complete(left)
	if err != nil {
		return fmt.Errorf("%s says that it is of a run of this plan, and what was signed in it is not good: see where it comes from, and move it away: %w", recordFile, err)
	}
	if dry {
		fmt.Fprintf(c.ErrOrStderr(), "%s is of a run of this plan that was cut short: what was signed is in it, is good, and would be written to %s; this was a dry run\n", recordFile, file)
		return nil
	}
	if err := newFile(file, func(f *os.File) error { _, err := f.Write(signed.PEM); return err }); err != nil {
		return err
	}
	fmt.Fprintf(c.ErrOrStderr(), "signed by a run that was cut short, and verified: %s, with SHA-256 %s; the record is %s\n", file, left.SHA256, recordFile)
	return nil
}
