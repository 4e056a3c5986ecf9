package main

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/cmd/kedge/config"
	"kedge/hsm"
	"kedge/plugins/file"
	"kedge/plugins/memory"
	"kedge/plugins/pkcs11"
	"kedge/plugins/vault"
)

// origins are where trust and signing keys come from: the root, what is trusted besides it, and the key store.
type origins struct {
	root     ca.Root
	anchors  ca.Anchors // may be nil
	keys     ca.KeyStore
	coverage ledger.Coverage       // of roots that the ledger does not know yet
	recorded func() error          // to be called once the ledger has the root
	vault    *vault.Client         // of both, once it is needed
	tokens   map[string]*hsm.Token // by URI, without a key
	closers  []func() error
}

// folders are where origins keep what no configuration says.
type folders struct {
	keys   string // of issuing CAs, in files
	tokens string // that a token has refused a PIN: it locks itself after a few
}

// openOrigins opens what the configuration names. What was opened is closed again when something fails.
func openOrigins(c *config.Config, at folders, log *slog.Logger) (*origins, error) {
	o := &origins{recorded: func() error { return nil }}
	err := o.openRoot(c, at, log)
	if err == nil {
		err = o.openKeys(c, at, log)
	}
	if err == nil && c.Root.AnchorsFile != "" {
		err = o.openAnchors(c, log)
	}
	if err != nil {
		return nil, errors.Join(err, o.close())
	}
	return o, nil
}

func (o *origins) close() error {
	var errs []error
	for i := len(o.closers) - 1; i >= 0; i-- {
		errs = append(errs, o.closers[i]())
	}
	o.closers = nil
	return errors.Join(errs...)
}

// rootOpeners and keyOpeners are how each kind is opened. They ask nothing of what is elsewhere: what is away keeps nobody from starting with what the ledger knows.
var (
	rootOpeners = map[string]func(o *origins, c *config.Config, at folders, log *slog.Logger) (ca.Root, error){
		config.RootKindFile:    (*origins).openOwnRoot,
		config.RootKindCACerts: (*origins).openCACerts,
		config.RootKindVault:   (*origins).openVaultRoot,
		config.RootKindPKCS11:  (*origins).openTokenRoot,
	}
	keyOpeners = map[string]func(o *origins, c *config.Config, at folders, log *slog.Logger) (ca.KeyStore, error){
		config.KeyStoreFile: (*origins).openKeyFiles,
		config.KeyStoreMemory: func(*origins, *config.Config, folders, *slog.Logger) (ca.KeyStore, error) {
			return &memory.KeyStore{}, nil
		},
		config.KeyStoreVault:  (*origins).openVaultKeys,
		config.KeyStorePKCS11: (*origins).openTokenKeys,
	}
)

// openRoot opens the root. Others may have signed under one that was not made here, and nobody knows what.
func (o *origins) openRoot(c *config.Config, at folders, log *slog.Logger) (err error) {
	o.coverage = ledger.Coverage{Kind: "foreign", Until: ledger.At(time.Now().Add(c.Root.ForeignWindow.Std()))}
	if o.root, err = rootOpeners[c.Root.Kind](o, c, at, log); err != nil {
		return fmt.Errorf("opening the root: %w", err)
	}
	return nil
}

func (o *origins) openKeys(c *config.Config, at folders, log *slog.Logger) (err error) {
	if o.keys, err = keyOpeners[c.IssuingCA.KeyStore](o, c, at, log); err != nil {
		return fmt.Errorf("opening the key store: %w", err)
	}
	return nil
}

// openOwnRoot opens the root that Kedge made, or makes it: of that the ledger knows what is signed under it.
func (o *origins) openOwnRoot(c *config.Config, _ folders, log *slog.Logger) (ca.Root, error) {
	own, err := file.OpenRoot(file.RootOptions{Dir: c.Root.File.Dir, TrustDomain: c.TrustDomain, KeySpec: ca.KeySpec(c.Root.File.KeyType),
		Lifetime: c.Root.File.Lifetime.Std(), PassphraseFile: c.Root.File.PassphraseFile, Logger: log})
	if err != nil {
		return nil, err
	}
	o.recorded, o.coverage = own.Recorded, ledger.Coverage{Kind: "since", Since: ledger.At(time.Now())}
	if own.Created() {
		o.coverage = ledger.Coverage{Kind: "complete"}
	}
	return own, nil
}

func (o *origins) openCACerts(c *config.Config, _ folders, log *slog.Logger) (ca.Root, error) {
	mounted, err := file.OpenCACerts(file.CACertsOptions{Dir: c.Root.CACerts.Dir, PassphraseFile: c.Root.CACerts.PassphraseFile, TrustDomain: c.TrustDomain, Logger: log})
	if err != nil {
		return nil, err
	}
	o.closers = append(o.closers, mounted.Close)
	return mounted, nil
}

func (o *origins) openKeyFiles(c *config.Config, at folders, _ *slog.Logger) (ca.KeyStore, error) {
	return file.OpenKeyStore(file.KeyStoreOptions{Dir: at.keys, PassphraseFile: c.IssuingCA.PassphraseFile})
}

func (o *origins) openAnchors(c *config.Config, log *slog.Logger) error {
	anchors, err := file.OpenAnchors(file.AnchorsOptions{File: c.Root.AnchorsFile, TrustDomain: c.TrustDomain, Logger: log})
	if err != nil {
		return fmt.Errorf("root.anchorsFile: %w", err)
	}
	o.anchors = anchors
	o.closers = append(o.closers, anchors.Close)
	return nil
}

// openVault opens the one login to Vault. It asks Vault nothing yet: a server that is away keeps nobody from starting with what the ledger knows.
func (o *origins) openVault(c *config.Config, log *slog.Logger) (*vault.Client, error) {
	if o.vault != nil {
		return o.vault, nil
	}
	v := c.Vault
	client, err := vault.OpenClient(vault.ClientOptions{Address: v.Address, Namespace: v.Namespace, CAFile: v.CAFile, ServerName: v.ServerName, Timeout: v.Timeout.Std(),
		Login: vaultLogin(v.Login), Logger: log})
	if err != nil {
		return nil, err
	}
	o.vault = client
	o.closers = append(o.closers, client.Close)
	return client, nil
}

func vaultLogin(l config.VaultLogin) vault.Login {
	secret := func(place string) vault.Secret {
		if name, ok := strings.CutPrefix(place, "env:"); ok {
			return vault.Secret{Env: name}
		}
		return vault.Secret{File: place}
	}
	switch l.Method {
	case config.LoginAppRole:
		return vault.Login{AppRole: &vault.AppRoleLogin{Mount: l.Mount, RoleID: l.RoleID, SecretID: secret(l.SecretID)}}
	case config.LoginKubernetes:
		return vault.Login{Kubernetes: &vault.KubernetesLogin{Mount: l.Mount, Role: l.Role, TokenFile: l.TokenFile}}
	case config.LoginCert:
		return vault.Login{Certificate: &vault.CertificateLogin{Mount: l.Mount, Role: l.Role, CertFile: l.CertificateFile, KeyFile: l.KeyFile}}
	}
	token := secret(l.Token)
	return vault.Login{Token: &token}
}

func (o *origins) openVaultRoot(c *config.Config, _ folders, log *slog.Logger) (ca.Root, error) {
	client, err := o.openVault(c, log)
	if err != nil {
		return nil, err
	}
	root, err := vault.OpenRoot(vault.RootOptions{Client: client, Mount: c.Root.Vault.Mount, Issuer: c.Root.Vault.Issuer, Logger: log})
	if err != nil {
		return nil, err
	}
	o.closers = append(o.closers, root.Close)
	return root, nil
}

func (o *origins) openVaultKeys(c *config.Config, _ folders, log *slog.Logger) (ca.KeyStore, error) {
	client, err := o.openVault(c, log)
	if err != nil {
		return nil, err
	}
	keys, err := vault.OpenKeyStore(vault.KeyStoreOptions{Client: client, Mount: c.IssuingCA.Vault.Mount, Prefix: c.IssuingCA.Vault.Prefix, Logger: log})
	if err != nil {
		return nil, err
	}
	o.closers = append(o.closers, keys.Close)
	return keys, nil
}

// openToken opens a token, once for root and key store: one child, and one try of a PIN. It asks the token for nothing yet.
func (o *origins) openToken(c *config.Config, uri hsm.URI, at folders, log *slog.Logger) (*hsm.Token, error) {
	uri.Object, uri.ID = "", nil // a key is found by its public half
	if token := o.tokens[uri.String()]; token != nil {
		return token, nil
	}
	token, err := hsm.Open(hsm.Options{URI: uri, Parameters: c.PKCS11.ModuleParameters, Sessions: c.PKCS11.Sessions, Deadline: c.PKCS11.Timeout.Std(),
		Hide: secretVariables(c), StateDir: at.tokens, Logger: log})
	if err != nil {
		return nil, err
	}
	if o.tokens == nil {
		o.tokens = map[string]*hsm.Token{}
	}
	o.tokens[uri.String()] = token
	o.closers = append(o.closers, token.Close)
	return token, nil
}

func (o *origins) openTokenRoot(c *config.Config, at folders, log *slog.Logger) (ca.Root, error) {
	uri, err := hsm.ParseURI(c.Root.PKCS11.URI)
	if err != nil {
		return nil, fmt.Errorf("root.pkcs11.uri: %w", err)
	}
	token, err := o.openToken(c, uri, at, log)
	if err != nil {
		return nil, err
	}
	return pkcs11.OpenRoot(pkcs11.RootOptions{Token: token, CertificateFile: c.Root.PKCS11.CertificateFile,
		AllowExportable: c.PKCS11.AllowExportableKeys})
}

func (o *origins) openTokenKeys(c *config.Config, at folders, log *slog.Logger) (ca.KeyStore, error) {
	uri, err := hsm.ParseURI(c.IssuingCA.PKCS11.URI)
	if err != nil {
		return nil, fmt.Errorf("issuingCA.pkcs11.uri: %w", err)
	}
	token, err := o.openToken(c, uri, at, log)
	if err != nil {
		return nil, err
	}
	return pkcs11.OpenKeyStore(pkcs11.KeyStoreOptions{Token: token, Label: uri.Object, AllowExportable: c.PKCS11.AllowExportableKeys})
}

// secretVariables are the variables of the environment in which the configuration has secrets.
func secretVariables(c *config.Config) (names []string) {
	for _, place := range []string{c.Vault.Login.Token, c.Vault.Login.SecretID} {
		if name, ok := strings.CutPrefix(place, "env:"); ok {
			names = append(names, name)
		}
	}
	for _, text := range []string{c.Root.PKCS11.URI, c.IssuingCA.PKCS11.URI} {
		if uri, err := hsm.ParseURI(text); err == nil && uri.PINSource.Variable != "" { // one that is not used may be empty
			names = append(names, uri.PINSource.Variable)
		}
	}
	return names
}
