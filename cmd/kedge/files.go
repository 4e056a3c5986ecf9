package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"kedge/ca/pemfile"
	"kedge/cmd/kedge/config"
	"kedge/hsm"
	"kedge/issuer/authn"
	"kedge/plugins/file"
)

// judge says everything that is wrong with a configuration: its values, and what it names on this machine. The error is a usageError over a *config.Error
// when 'kedge serve' refuses it, which it does before it makes anything. Warnings are about what it starts with nevertheless.
func judge(c *config.Config) (warnings []string, err error) {
	all := &config.Error{}
	if warnings, err = c.Validate(); err != nil && !errors.As(err, &all) {
		return warnings, usageError{err}
	}
	for _, f := range findFaults(c) {
		if f.until != "" {
			warnings = append(warnings, config.Problem{Path: f.key, Text: f.what()}.String())
			continue
		}
		text := f.what()
		if f.mend != "" {
			text += ": " + f.mend
		}
		all.Problems = append(all.Problems, config.Problem{Path: f.key, Text: text})
	}
	if len(all.Problems) > 0 {
		return warnings, usageError{all}
	}
	return warnings, nil
}

// fault is what is wrong with something that the configuration names.
type fault struct {
	key   string // of the configuration
	err   error
	mend  string // what to do; "": err says it
	until string // what does not work until it is mended, where 'kedge serve' starts without it; "": it does not start
}

func (f fault) what() string {
	if f.until != "" {
		return fmt.Sprintf("%v: until that is mended, %s", f.err, f.until)
	}
	return f.err.Error()
}

// findFaults looks at what the configuration names, as the running CA will read it. What is read once, at the start, has to be there and to be right. What is
// read again and again may come later, as a volume that is mounted then.
func findFaults(c *config.Config) (faults []fault) {
	look := func(key, path string, check func(string) error, until string) {
		if path == "" {
			return
		}
		if err := check(path); err != nil {
			f := fault{key: key, err: err, until: until}
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
				f.mend = "put it there, let the CA's user use it, or name another"
			}
			faults = append(faults, f)
		}
	}
	if _, err := adminSocket(c.DataDir); err != nil {
		faults = append(faults, fault{key: "dataDir", err: err})
	}
	for _, place := range []struct{ key, value, pkcs11 string }{{"root.kind", c.Root.Kind, config.RootKindPKCS11}, {"issuingCA.keyStore", c.IssuingCA.KeyStore, config.KeyStorePKCS11}} {
		if err := hsm.Supported(); err != nil && place.value == place.pkcs11 {
			faults = append(faults, fault{key: place.key, err: fmt.Errorf("%q: %w", place.value, err)})
		}
	}
	look("root.file.passphraseFile", c.Root.File.PassphraseFile, regular(file.CheckPassphraseFile), "")
	look("root.cacerts.passphraseFile", c.Root.CACerts.PassphraseFile, regular(file.CheckPassphraseFile), "")
	look("root.anchorsFile", c.Root.AnchorsFile, regular(func(path string) error {
		td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
		if err != nil {
			return nil // that is said of the trust domain
		}
		return file.CheckAnchorsFile(path, td)
	}), "the trust anchors of before go on, and a first start fails")
	look("root.pkcs11.certificateFile", c.Root.PKCS11.CertificateFile, regular(certificates), "the root is what the ledger knows of it, and certifies nothing")
	look("vault.caFile", c.Vault.CAFile, regular(func(path string) error { _, err := readRoots(path); return err }), "")
	look("issuingCA.passphraseFile", c.IssuingCA.PassphraseFile, regular(file.CheckPassphraseFile), "")
	look("tracing.caFile", c.Tracing.CAFile, regular(func(path string) error { _, err := readRoots(path); return err }), "")
	for i, issuer := range c.Callers.TokenIssuers {
		key := fmt.Sprintf("callers.tokenIssuers[%d].", i)
		look(key+"caFile", issuer.CAFile, regular(authn.CheckCAFile), "")
		look(key+"jwksFile", issuer.JWKSFile, regular(authn.CheckJWKSFile), "none of the issuer's tokens is accepted")
		look(key+"bearerTokenFile", issuer.BearerTokenFile, regular(authn.CheckBearerTokenFile), "the issuer's keys cannot be fetched")
	}
	for i, path := range c.Callers.ClientCertificates.OtherIssuers {
		look(fmt.Sprintf("callers.clientCertificates.otherIssuers[%d]", i), path, regular(certificates), "")
	}
	look("ledger.archiveDir", c.Ledger.ArchiveDir, writable, "nothing is dropped from the ledger, which grows")
	if mark := c.Ledger.HighWaterFile; mark != "" {
		look("ledger.highWaterFile", mark, noFolder, "")
		look("ledger.highWaterFile", filepath.Dir(mark), writable, "an older copy of the ledger that is put back may go unnoticed")
	}
	return faults
}

// regular lets check look only at what is a file: it would wait for the other end of a pipe, and use up what comes.
func regular(check func(path string) error) func(path string) error {
	return func(path string) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s is not a file: name a file", path)
		}
		return check(path)
	}
}

// certificates makes sure that there are some.
func certificates(path string) error {
	_, err := pemfile.ReadCertificates(path)
	return err
}

// noFolder makes sure that a file may be there, or be made.
func noFolder(path string) error {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return fmt.Errorf("%s is a folder: name a file", path)
	}
	return nil
}

// writable makes sure that files can be made in a folder.
func writable(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a folder: name a folder", path)
	}
	if err := unix.Access(path, unix.W_OK|unix.X_OK); err != nil {
		return &os.PathError{Op: "writing to", Path: path, Err: err}
	}
	return nil
}

// readRoots reads PEM certificates that others have to prove themselves under.
func readRoots(path string) (*x509.CertPool, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the roots: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("reading the roots: %s has no certificate in PEM", path)
	}
	return pool, nil
}
