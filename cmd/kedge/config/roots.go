package config

import (
	"path/filepath"
	"reflect"
	"regexp"
	"time"

	"kedge/hsm"
)

const (
	maxForeignWindow = 10 * 365 * day
	maxPluginTimeout = time.Minute
	maxSessions      = 256
)

// RootKinds are the kinds of roots: each is the name of its section under root.
func RootKinds() []string { return sections(reflect.TypeFor[Root]()) }

// KeyStores are the kinds of key stores: two of which little is to be said, and each that has a section under issuingCA.
func KeyStores() []string {
	return append([]string{KeyStoreFile, KeyStoreMemory}, sections(reflect.TypeFor[IssuingCA]())...)
}

// sections are the keys of a struct that are sections themselves.
func sections(of reflect.Type) (names []string) {
	for i := range of.NumField() {
		if field := of.Field(i); field.Type.Kind() == reflect.Struct {
			names = append(names, field.Tag.Get("yaml"))
		}
	}
	return names
}

// root judges where the root and the keys are.
func (v *validation) root(c *Config) {
	usual := c.usual()
	v.kind("root", "kind", c.Root.Kind, RootKinds(), c.Root, usual.Root)
	v.kind("issuingCA", "keyStore", c.IssuingCA.KeyStore, KeyStores(), c.IssuingCA, usual.IssuingCA)
	v.unused("issuingCA.passphraseFile", c.IssuingCA.PassphraseFile, "", "issuingCA.keyStore", c.IssuingCA.KeyStore, KeyStoreFile)
	if v.seconds("root.foreignWindow", c.Root.ForeignWindow) && c.Root.ForeignWindow.Std() > maxForeignWindow {
		v.refuse("root.foreignWindow", "%s is more than %s", c.Root.ForeignWindow, Duration(maxForeignWindow))
	}
	v.vault(c, usual)
	v.pkcs11(c, usual)
}

// usual is the default, but for the folder that follows dataDir.
func (c *Config) usual() *Config {
	usual := Default()
	usual.Root.File.Dir = c.Root.File.Dir
	return usual
}

// kind makes sure that a kind is one of those that there are, and judges its section. One for another kind would be believed to count, so it is refused.
func (v *validation) kind(path, key, kind string, kinds []string, given, usual any) {
	if !v.oneOf(at(path, key), kind, kinds...) {
		return
	}
	all, without := reflect.ValueOf(given), reflect.ValueOf(usual)
	for i := range all.NumField() {
		field := all.Type().Field(i)
		name := field.Tag.Get("yaml")
		if field.Type.Kind() != reflect.Struct {
			continue
		}
		v.unused(at(path, name), all.Field(i).Interface(), without.Field(i).Interface(), at(path, key), kind, name)
		if section, ok := all.Field(i).Interface().(interface {
			judge(v *validation, path string)
		}); ok && name == kind {
			section.judge(v, at(path, name))
		}
	}
}

func (r RootCACerts) judge(v *validation, path string) {
	v.required(at(path, "dir"), r.Dir, "the folder where the Secret is mounted, for instance /etc/cacerts")
}

func (r RootVault) judge(v *validation, path string) {
	v.required(at(path, "mount"), r.Mount, "where the PKI engine is mounted")
	v.required(at(path, "issuer"), r.Issuer, `name or id of the issuer, or "default"`)
}

func (r RootPKCS11) judge(v *validation, path string) {
	v.pkcs11URI(at(path, "uri"), r.URI)
	v.required(at(path, "certificateFile"), r.CertificateFile, "the PEM file of the root's certificate; 'kedge ceremony' makes one")
}

func (k KeysVault) judge(v *validation, path string) {
	v.required(at(path, "mount"), k.Mount, "where the Transit engine is mounted")
	v.required(at(path, "prefix"), k.Prefix, `what the names of the keys begin with, like "kedge-"`)
}

func (k KeysPKCS11) judge(v *validation, path string) { v.pkcs11URI(at(path, "uri"), k.URI) }

func (v *validation) vault(c, usual *Config) {
	s, l := c.Vault, c.Vault.Login
	if !c.UsesVault() {
		if s != usual.Vault {
			v.refuse("vault", `nothing asks Vault: it counts with root.kind or issuingCA.keyStore "vault"`)
		}
		return
	}
	v.required("vault.address", s.Address, "the URL of the server, like https://vault.example:8200")
	if s.Address != "" {
		v.webAddress("vault.address", s.Address, "")
	}
	if s.Timeout.Std() < time.Second || s.Timeout.Std() > maxPluginTimeout {
		v.refuse("vault.timeout", "%s is not between 1s and %s", s.Timeout, Duration(maxPluginTimeout))
	}
	if !v.oneOf("vault.login.method", l.Method, LoginToken, LoginAppRole, LoginKubernetes, LoginCert) {
		return
	}
	v.unused("vault.login.token", l.Token, "", "vault.login.method", l.Method, LoginToken)
	v.unused("vault.login.roleID", l.RoleID, "", "vault.login.method", l.Method, LoginAppRole)
	v.unused("vault.login.secretID", l.SecretID, "", "vault.login.method", l.Method, LoginAppRole)
	v.unused("vault.login.tokenFile", l.TokenFile, usual.Vault.Login.TokenFile, "vault.login.method", l.Method, LoginKubernetes)
	v.unused("vault.login.certificateFile", l.CertificateFile, "", "vault.login.method", l.Method, LoginCert)
	v.unused("vault.login.keyFile", l.KeyFile, "", "vault.login.method", l.Method, LoginCert)
	switch l.Method {
	case LoginToken:
		v.secret("vault.login.token", l.Token)
		v.unused("vault.login.role", l.Role, "", "vault.login.method", l.Method, LoginKubernetes, LoginCert)
	case LoginAppRole:
		v.required("vault.login.roleID", l.RoleID, "the role id of the AppRole")
		v.secret("vault.login.secretID", l.SecretID)
		v.unused("vault.login.role", l.Role, "", "vault.login.method", l.Method, LoginKubernetes, LoginCert)
	case LoginKubernetes:
		v.required("vault.login.role", l.Role, "the role to log in as")
		v.required("vault.login.tokenFile", l.TokenFile, "the file of the service account token")
	case LoginCert:
		v.required("vault.login.certificateFile", l.CertificateFile, "the PEM file of the client certificate")
		v.required("vault.login.keyFile", l.KeyFile, "the PEM file of its key")
	}
}

func (v *validation) pkcs11(c, usual *Config) {
	p := c.PKCS11
	if !c.UsesPKCS11() {
		if p != usual.PKCS11 {
			v.refuse("pkcs11", `nothing is in a token: it counts with root.kind or issuingCA.keyStore "pkcs11"`)
		}
		return
	}
	if p.Sessions < 1 || p.Sessions > maxSessions {
		v.refuse("pkcs11.sessions", "%d is not between 1 and %d", p.Sessions, maxSessions)
	}
	if p.Timeout.Std() < 100*time.Millisecond || p.Timeout.Std() > maxPluginTimeout {
		v.refuse("pkcs11.timeout", "%s is not between 100ms and %s", p.Timeout, Duration(maxPluginTimeout))
	}
	if longest := p.Timeout.Std() + hsm.SignWait; c.IssuingCA.KeyStore == KeyStorePKCS11 && longest > c.CSR.CallTimeout.Std() {
		v.refuse("pkcs11.timeout", "%s is too long: with the %s that a signature may wait it is more than csr.callTimeout %s, so that calls would be cut off before the token is", p.Timeout,
			Duration(hsm.SignWait), c.CSR.CallTimeout)
	}
	if p.AllowExportableKeys {
		v.warn("pkcs11.allowExportableKeys", "keys are used that may exist outside the token: who has a copy of one can make any identity")
	}
}

func (v *validation) pkcs11URI(path, text string) {
	if text == "" {
		v.refuse(path, "it is required, like pkcs11:token=LABEL;object=KEY?module-path=/PATH.so&pin-source=file:/PATH")
		return
	}
	switch uri, err := hsm.ParseURI(text); {
	case err != nil:
		v.refuse(path, "%v", err)
	case uri.Token == "" && uri.Serial == "":
		v.refuse(path, "it names no token: write token=LABEL or serial=NUMBER")
	case uri.ModulePath == "":
		v.refuse(path, "it names no module: write module-path=/PATH.so behind the question mark")
	}
}

func (v *validation) required(path, text, what string) {
	if text == "" {
		v.refuse(path, "it is required: %s", what)
	}
}

// looksSecret is what Vault's tokens and secret ids look like.
var looksSecret = regexp.MustCompile(`^([hb]?[vc]?[sbr]\.[A-Za-z0-9_-]{20,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$`)

// secret wants a place where a secret is, and refuses, without repeating it, what seems to be one: it would be printed, and kept.
func (v *validation) secret(path, text string) {
	v.required(path, text, `a file, or "env:NAME"`)
	if looksSecret.MatchString(filepath.Base(text)) {
		v.refuse(path, `it looks like the secret itself, which does not belong in a configuration: write that into a file and name the file, or "env:NAME"`)
	}
}

// unused refuses what is given for something else than what counts.
func (v *validation) unused(path string, given, usual any, by, counts string, meant ...string) {
	for _, m := range meant {
		if counts == m {
			return
		}
	}
	if given != usual {
		v.refuse(path, "it is for %s %s, and that is %s", by, meant[0], counts)
	}
}
