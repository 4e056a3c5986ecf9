package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"kedge/ca"
	"kedge/ca/atomicfile"
	"kedge/issuer/authn"
	"kedge/plugins/file"
)

// openAuthn makes the authenticator from the configuration, and the join tokens if there are any.
func (s *server) openAuthn(ctx context.Context) (*authn.JoinTokens, error) {
	c := s.config.Callers
	options := authn.Options{TrustDomain: s.ca.TrustDomain(), Skew: c.ClockSkew.Std(), CacheDir: filepath.Join(s.dataDir, "token-issuers"), Logger: s.log}
	for _, t := range c.TokenIssuers {
		options.Issuers = append(options.Issuers, authn.IssuerConfig{
			Name: t.Name, Kind: t.Kind, Issuer: t.Issuer, Audiences: t.Audiences, JWKSFile: t.JWKSFile, JWKSURL: t.JWKSURL,
			CAFile: t.CAFile, BearerTokenFile: t.BearerTokenFile, Identity: t.Identity,
		})
	}
	var join *authn.JoinTokens
	if len(c.JoinTokens.Identities) > 0 {
		key, err := s.joinKey(ctx)
		if err != nil {
			return nil, fmt.Errorf("opening the key of join tokens: %w", err)
		}
		if join, err = authn.NewJoinTokens(authn.JoinOptions{
			TrustDomain: s.ca.TrustDomain(), Key: key, Identities: c.JoinTokens.Identities, MaxTTL: c.JoinTokens.MaxTTL.Std(), Ledger: s.ca.Ledger(),
		}); err != nil {
			return nil, fmt.Errorf("callers.joinTokens: %w", err)
		}
		options.Join = join
	}
	if c.ClientCertificates.Enabled {
		options.Certificates = s.ca.ClientCertificates()
	}
	authenticator, err := authn.New(options)
	if err != nil {
		return nil, fmt.Errorf("callers: %w", err)
	}
	s.authn = authenticator
	return join, nil
}

// joinKey opens the key that signs join tokens, or makes it. It signs nothing else. When it is lost, the tokens that are
// out are void and new ones can be made, so a lost one is simply made anew.
func (s *server) joinKey(ctx context.Context) (crypto.Signer, error) {
	dir := filepath.Join(s.dataDir, "join-token-keys")
	keys, err := file.OpenKeyStore(file.KeyStoreOptions{Dir: dir, PassphraseFile: s.config.IssuingCA.PassphraseFile})
	if err != nil {
		return nil, err
	}
	current := filepath.Join(dir, "current") // names the key
	if err := atomicfile.Clean(current); err != nil {
		return nil, err
	}
	ref, err := os.ReadFile(current)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err == nil {
		key, err := keys.Open(ctx, strings.TrimSpace(string(ref)))
		if !errors.Is(err, fs.ErrNotExist) {
			return key, err
		}
		s.log.Warn("the key of join tokens is lost: tokens that are out are void")
	}
	name, key, err := keys.Create(ctx, ca.P256)
	if err != nil {
		return nil, err
	}
	return key, atomicfile.Write(current, []byte(name+"\n"))
}
