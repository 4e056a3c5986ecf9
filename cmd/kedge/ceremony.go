package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"
	"os/user"
	"time"

	"github.com/spf13/cobra"

	"kedge/ca"
	"kedge/ca/ceremony"
	"kedge/hsm"
	"kedge/plugins/pkcs11"
)

func newCeremonyCommand() *cobra.Command {
	f := &tokenFlags{}
	var dry, allow bool
	var template string
	c := &cobra.Command{
		Use: "ceremony PLAN", Short: "Sign a root, an issuing CA's CSR or a CRL with a key on a token, as a plan says",
		Long: `Make the certificate of a root on a token, sign that of an issuing CA from its CSR, or sign a CRL. The plan, a file that others can review, is the whole input.

  kedge ceremony --template root > plan.yaml     a plan to fill in: root, intermediate or crl
  kedge ceremony plan.yaml --dry-run             exactly what will be signed, with its SHA-256; nothing is made or signed
  kedge ceremony plan.yaml                       does it

What is to be signed is linted before it is signed, and what was signed is verified before it is written. Nothing is overwritten. Beside the outcome a record is written: who, when, the
plan, the token and what it says of the key, and the hashes.`,
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
			return perform(c, f, plan, dry, allow)
		},
	}
	f.add(c)
	c.Flags().BoolVar(&dry, "dry-run", false, "show exactly what will be signed, and do nothing")
	c.Flags().StringVar(&template, "template", "", "print a plan to fill in: root, intermediate or crl")
	c.Flags().BoolVar(&allow, "allow-exportable-key", false, "sign although the token says that the key can be exported or was not made on it; the record says so")
	return c
}

// perform does what a plan says.
func perform(c *cobra.Command, f *tokenFlags, plan *ceremony.Plan, dry, allow bool) error {
	began := time.Now()
	file, recordFile := plan.Files()
	for _, path := range []string{file, recordFile} {
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%s is there already, and nothing is overwritten: name another file in the plan, or move it away", path)
		}
	}
	if plan.Key.Create != "" { // what is wrong with the plan is found before a key is made for it
		throwaway, err := ca.GenerateKey(plan.Key.Create)
		if err == nil {
			_, err = plan.Prepare(throwaway.Public(), began)
		}
		if err != nil {
			return fmt.Errorf("nothing is made or signed: %w", err)
		}
	}
	token, uri, err := f.open(c, plan.Key.URI)
	if err != nil {
		return err
	}
	defer token.Close()
	signer, key, made, err := ceremonyKey(c.Context(), token, uri, plan, dry)
	if err != nil {
		return err
	}
	var public crypto.PublicKey
	if signer != nil {
		public = signer.Public()
		if err := pkcs11.Acceptable(key, allow); err != nil {
			return fmt.Errorf("%w (--allow-exportable-key signs with it all the same)", err)
		}
	}
	prepared, err := plan.Prepare(public, began)
	if err != nil {
		return fmt.Errorf("nothing is signed: %w", err)
	}
	fmt.Fprint(c.OutOrStdout(), prepared.Describe())
	if dry {
		fmt.Fprintln(c.ErrOrStderr(), "nothing was made, signed or written: this was a dry run")
		return nil
	}
	// All that the record says beside the outcome is known before there is one.
	info, err := token.Info(c.Context())
	if err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("finding this machine's name for the record: %w", err)
	}
	who, err := user.Current()
	if err != nil {
		return fmt.Errorf("finding the user for the record: %w", err)
	}
	signed, err := prepared.Sign(signer)
	if err != nil {
		return err
	}
	record, err := prepared.Record(signed)
	if err != nil {
		return err
	}
	uri.PINSource = hsm.PINSource{}
	record.Token = ceremony.Token{URI: uri.String(), Label: info.Label, Serial: info.Serial, Model: info.Model, Module: info.Module, KeyMade: made, Attributes: attributesOf(key)}
	record.Program, record.Began, record.Ended = "kedge "+version, began.UTC(), time.Now().UTC()
	record.Host = host
	record.User = fmt.Sprintf("%s (uid %s)", who.Username, who.Uid)
	text, err := record.JSON()
	if err != nil {
		return err
	}
	// The record first: what was signed is not without one.
	if err := newFile(recordFile, func(f *os.File) error { _, err := f.Write(text); return err }); err != nil {
		return err
	}
	if err := newFile(file, func(f *os.File) error { _, err := f.Write(signed.PEM); return err }); err != nil {
		return fmt.Errorf("%w; what was signed is in the record %s, under outcome", err, recordFile)
	}
	fmt.Fprintf(c.ErrOrStderr(), "signed and verified: %s, with SHA-256 %s; the record is %s\n", file, record.SHA256, recordFile)
	return nil
}

// ceremonyKey finds the key of a plan. One that is to be made is made, but not in a dry run; when it is there already, from a run that was cut short, that is said.
func ceremonyKey(ctx context.Context, token *hsm.Token, uri hsm.URI, plan *ceremony.Plan, dry bool) (signer *hsm.Signer, key hsm.Key, made bool, err error) {
	signer, key, err = token.FindObject(ctx)
	switch {
	case plan.Key.Create == "":
		return signer, key, false, err
	case err == nil:
		return nil, key, false, fmt.Errorf("the %s is on the token already, and the plan is to make one: say create: \"\" in the plan to use it, or name another", key)
	case !errors.Is(err, hsm.ErrNotFound):
		return nil, key, false, err
	case dry:
		return nil, key, false, nil
	}
	if key, err = createKey(ctx, token, uri, hsm.Spec(plan.Key.Create)); err != nil {
		return nil, key, false, err
	}
	signer, key, err = token.FindObject(ctx)
	return signer, key, true, err
}
