package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kedge/ca"
	"kedge/hsm"
	"kedge/plugins/pkcs11"
)

// tokenFlags say how a token is spoken to by the verbs that work without a configuration or a plan.
type tokenFlags struct {
	parameters string
	timeout    time.Duration
}

func (f *tokenFlags) add(c *cobra.Command) {
	c.PersistentFlags().StringVar(&f.parameters, "module-parameters", "", "what the module is initialised with, for those that want it (see pkcs11.moduleParameters)")
	c.PersistentFlags().DurationVar(&f.timeout, "timeout", 30*time.Second, "how long a call of the module may take")
}

func (f *tokenFlags) open(c *cobra.Command, text string) (*hsm.Token, hsm.URI, error) {
	return openToken(c, text, f.parameters, f.timeout)
}

// openToken asks the token for nothing. Nothing is logged: the error says it.
func openToken(c *cobra.Command, text, parameters string, timeout time.Duration) (*hsm.Token, hsm.URI, error) {
	uri, err := hsm.ParseURI(text)
	if err != nil {
		return nil, uri, usageError{err}
	}
	remembered := userTokens()
	t := target{config: c.Flag("config").Value.String(), data: c.Flag("data").Value.String()}
	if t != (target{}) {
		ca, err := t.load()
		if err != nil {
			return nil, uri, err
		}
		remembered = sharedTokens(ca.DataDir)
	}
	token, err := hsm.Open(hsm.Options{URI: uri, Parameters: parameters, Deadline: timeout, Sessions: 1, StateDir: remembered})
	return token, uri, err
}

func newKeyCommand() *cobra.Command {
	f := &tokenFlags{}
	c := &cobra.Command{
		Use: "key", Short: "Keys on a token (HSM)",
		Long: `Look at the keys on a token, and make one. URI is a PKCS #11 URI (RFC 7512) that names the token, its module and where the PIN is:

  pkcs11:token=roots;object=mesh?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/secrets/pin

No CA needs to run. With --config or --data a PIN that the token has refused is remembered where that CA remembers it: neither tries it again after the other. What a token does not say of a key is shown as "not said".`,
	}
	f.add(c)
	c.AddCommand(newKeyListCommand(f), newKeyCreateCommand(f), newKeyInspectCommand(f))
	return c
}

// keyReport is a key as people see it.
type keyReport struct {
	hsm.Key
	SHA256 string `json:"public_key_sha256,omitempty"` // of the SubjectPublicKeyInfo
	PEM    string `json:"public_key,omitempty"`
	Good   bool   `json:"good_enough"`   // for an authority
	Why    string `json:"why,omitempty"` // not
}

func reportKey(k hsm.Key) (keyReport, error) {
	r := keyReport{Key: k, Good: true}
	if err := pkcs11.Acceptable(k, false); err != nil {
		r.Good, r.Why = false, err.Error()
	}
	if k.Public == nil {
		return r, nil
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public)
	if err != nil {
		return r, fmt.Errorf("encoding the public half of the %s: %w", k, err)
	}
	digest := sha256.Sum256(der)
	r.SHA256, r.PEM = hex.EncodeToString(digest[:]), string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	return r, nil
}

func newKeyListCommand(f *tokenFlags) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "list URI", Short: "List the private keys on a token", Args: arguments("URI"),
		RunE: func(c *cobra.Command, args []string) error {
			token, _, err := f.open(c, args[0])
			if err != nil {
				return err
			}
			defer token.Close()
			keys, err := token.Keys(c.Context())
			if err != nil {
				return err
			}
			reports := []keyReport{}
			for _, key := range keys {
				r, err := reportKey(key)
				if err != nil {
					return err
				}
				reports = append(reports, r)
			}
			if asJSON {
				return printJSON(c.OutOrStdout(), reports)
			}
			table := newTable(c.OutOrStdout(), "LABEL", "ID", "KEY", "SENSITIVE", "EXTRACTABLE", "NEVER EXTRACTABLE", "MADE ON IT", "GOOD ENOUGH")
			for _, r := range reports {
				good := "yes"
				if !r.Good {
					good = "no"
				}
				table.row(r.Label, r.ID.String(), kindOf(r.Key), r.Sensitive.String(), r.Extractable.String(), r.NeverExtractable.String(), r.Local.String(), good)
			}
			return table.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func kindOf(k hsm.Key) string {
	if k.Spec != "" {
		return string(k.Spec)
	}
	return k.Type
}

func newKeyInspectCommand(f *tokenFlags) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "inspect URI", Short: "Show a key with everything that its token says of it, and let it sign", Args: arguments("URI"),
		Long: `Show the one key that the URI's object and id name: what the token says of it, its public half, and whether it is good enough for an authority. It signs something of no
meaning, and the signature is verified.`,
		RunE: func(c *cobra.Command, args []string) error {
			token, _, err := f.open(c, args[0])
			if err != nil {
				return err
			}
			defer token.Close()
			_, key, err := token.FindObject(c.Context())
			if err != nil {
				return err
			}
			return showKey(c, token, key, asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// showKey shows a key, and the token that it is on.
func showKey(c *cobra.Command, token *hsm.Token, key hsm.Key, asJSON bool) error {
	info, err := token.Info(c.Context())
	if err != nil {
		return err
	}
	r, err := reportKey(key)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(c.OutOrStdout(), struct {
			keyReport
			Token hsm.Info `json:"token"`
		}{r, info})
	}
	table := newTable(c.OutOrStdout())
	table.row("token", fmt.Sprintf("%s, serial %s, %s %s", info.Label, info.Serial, info.Manufacturer, info.Model))
	table.row("module", fmt.Sprintf("%s (%s)", info.Module, info.Library))
	table.row("label", r.Label)
	table.row("id", r.ID.String())
	table.row("key", kindOf(r.Key))
	for _, name := range attributeNames {
		table.row(name, attributesOf(r.Key)[name])
	}
	table.row("public key", "SHA-256 "+r.SHA256)
	table.row("signs", "yes: it signed, and the signature is good")
	if r.Good {
		table.row("for an authority", "good enough")
	} else {
		table.row("for an authority", "not good enough: "+r.Why)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	_, err = fmt.Fprint(c.OutOrStdout(), r.PEM)
	return err
}

// attributeNames are what a token says of a key, in the order in which it is shown.
var attributeNames = []string{"CKA_SENSITIVE", "CKA_EXTRACTABLE", "CKA_NEVER_EXTRACTABLE", "CKA_ALWAYS_SENSITIVE", "CKA_LOCAL", "CKA_ALWAYS_AUTHENTICATE", "CKA_SIGN"}

func attributesOf(k hsm.Key) map[string]string {
	return map[string]string{"CKA_SENSITIVE": k.Sensitive.String(), "CKA_EXTRACTABLE": k.Extractable.String(), "CKA_NEVER_EXTRACTABLE": k.NeverExtractable.String(),
		"CKA_ALWAYS_SENSITIVE": k.AlwaysSensitive.String(), "CKA_LOCAL": k.Local.String(), "CKA_ALWAYS_AUTHENTICATE": k.AlwaysAuthenticate.String(), "CKA_SIGN": k.Sign.String()}
}

func newKeyCreateCommand(f *tokenFlags) *cobra.Command {
	var kind string
	var asJSON bool
	kinds := []hsm.Spec{hsm.P256, hsm.P384, hsm.RSA2048, hsm.RSA3072, hsm.RSA4096}
	c := &cobra.Command{
		Use: "create URI --type TYPE", Short: "Make a key on a token", Args: arguments("URI"),
		Long: `Make a key pair on the token, with the label that the URI's object says, and its id, or a random one. The private key cannot be read or exported. One that is there already is
left alone, and is an error.`,
		RunE: func(c *cobra.Command, args []string) error {
			if !slices.Contains(kinds, hsm.Spec(kind)) {
				var names []string
				for _, k := range kinds {
					names = append(names, string(k))
				}
				return usageError{fmt.Errorf("--type is %q: name one of %s", kind, strings.Join(names, ", "))}
			}
			token, uri, err := f.open(c, args[0])
			if err != nil {
				return err
			}
			defer token.Close()
			_, key, err := createKey(c.Context(), token, uri, hsm.Spec(kind))
			if err != nil {
				return err
			}
			return showKey(c, token, key, asJSON)
		},
	}
	c.Flags().StringVar(&kind, "type", string(ca.P256), "the kind of key: P-256, P-384, RSA-2048, RSA-3072 or RSA-4096")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// createKey makes a key with the name that a URI gives it.
func createKey(ctx context.Context, token *hsm.Token, uri hsm.URI, spec hsm.Spec) (*hsm.Signer, hsm.Key, error) {
	if uri.Object == "" {
		return nil, hsm.Key{}, usageError{errors.New("the URI names no key: write object=LABEL")}
	}
	id := uri.ID
	if len(id) == 0 {
		id = make([]byte, 16)
		rand.Read(id) // never fails
	}
	return token.Generate(ctx, spec, uri.Object, id)
}

// caTokens is where the CA of a data folder remembers that a token has refused a PIN: a token locks itself after a few.
func caTokens(dataDir string) string { return filepath.Join(dataDir, "hsm") }

// sharedTokens is the same for a verb that names that CA. Before its first start it remembers nothing, and the folder is for it to make.
func sharedTokens(dataDir string) string {
	if _, err := os.Stat(dataDir); err != nil {
		return userTokens()
	}
	return caTokens(dataDir)
}

// userTokens is where it is remembered for this user that a token has refused a PIN: a token locks itself after a few. "" where the user has no folder for such things.
func userTokens() string {
	dir, err := os.UserConfigDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, "kedge", "hsm")
}
