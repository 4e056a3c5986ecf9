package config

import (
	"path/filepath"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
)

// Default is what holds without a file. Its paths are relative to the working folder.
func Default() *Config {
	c := &Config{
		TrustDomain: "cluster.local",
		DataDir:     "./kedge-data",
		CSR: CSR{
			Listen:                "127.0.0.1:15012",
			ServerNames:           []string{"localhost", "127.0.0.1", "::1", "istiod.istio-system.svc"},
			ServerCertificateTTL:  Duration(24 * time.Hour),
			CallTimeout:           Duration(10 * time.Second),
			WaitTimeout:           Duration(time.Minute),
			SlowClientTimeout:     Duration(10 * time.Second),
			MaxConnectionAge:      Duration(30 * time.Minute),
			MaxConnectionAgeGrace: Duration(90 * time.Second),
			KeepaliveMinTime:      Duration(5 * time.Second),
			KeepaliveTime:         Duration(time.Minute),
			KeepaliveTimeout:      Duration(20 * time.Second),
			Reflection:            true,
		},
		Operations: Operations{Listen: "127.0.0.1:15014"},
		Log:        Log{Level: "info", Format: "json"},
		Tracing:    Tracing{SampleRatio: 0.1},
		Root: Root{Kind: RootKindFile, File: RootFile{KeyType: string(ca.P256), Lifetime: Duration(3650 * day)},
			Vault: RootVault{Mount: "pki", Issuer: "default"}, ForeignWindow: Duration(90 * day)},
		IssuingCA: IssuingCA{Lifetime: Duration(7 * day), KeyType: string(ca.P256), KeyStore: KeyStoreFile, Vault: KeysVault{Mount: "transit", Prefix: "kedge-"}},
		Vault: Vault{Timeout: Duration(10 * time.Second), Login: VaultLogin{Method: LoginToken,
			TokenFile: "/var/run/secrets/kubernetes.io/serviceaccount/token"}},
		PKCS11:   PKCS11{Sessions: 16, Timeout: Duration(5 * time.Second)},
		Profiles: map[string]Profile{ca.DefaultProfile: defaultProfile()},
		Callers: Callers{
			JoinTokens:         JoinTokens{Identities: []string{"ns/default/sa/*"}, MaxTTL: Duration(time.Hour)},
			ClientCertificates: ClientCertificates{Enabled: true},
			ClockSkew:          Duration(30 * time.Second),
		},
		Ledger: Ledger{Retention: Duration(30 * day)},
	}
	c.fillRootDir()
	return c
}

// fillRootDir puts the root's folder into the data folder when it is nowhere else.
func (c *Config) fillRootDir() {
	if c.Root.File.Dir == "" {
		c.Root.File.Dir = filepath.Join(c.DataDir, "root")
	}
}

// HighWaterFile is where the high-water mark stands.
func (c *Config) HighWaterFile() string {
	if c.Ledger.HighWaterFile != "" {
		return c.Ledger.HighWaterFile
	}
	return filepath.Join(c.DataDir, ledger.MarkFile)
}

// MoveData puts the data folder elsewhere, and the root's folder with it when that has its default place.
func (c *Config) MoveData(dir string) {
	if c.Root.File.Dir == filepath.Join(c.DataDir, "root") {
		c.Root.File.Dir = ""
	}
	c.DataDir = dir
	c.fillRootDir()
}

// defaultProfile is what a profile has where the file says nothing.
func defaultProfile() Profile {
	p := ca.DefaultProfileConfig()
	return Profile{
		DefaultTTL: Duration(p.DefaultTTL), MaxTTL: Duration(p.MaxTTL), MinTTL: Duration(p.MinTTL), OverMax: p.OverMax, Backdate: Duration(p.Backdate),
		ExtraKeys: p.ExtraKeys, MaxLineageAge: Duration(p.MaxLineageAge), Identities: p.Identities,
	}
}

// signing is the profile as ca takes it.
func (p Profile) signing() ca.ProfileConfig {
	return ca.ProfileConfig{
		DefaultTTL: p.DefaultTTL.Std(), MaxTTL: p.MaxTTL.Std(), MinTTL: p.MinTTL.Std(), OverMax: p.OverMax, Backdate: p.Backdate.Std(),
		ExtraKeys: p.ExtraKeys, MaxLineageAge: p.MaxLineageAge.Std(), Identities: p.Identities,
	}
}

// The kinds of roots.
const (
	RootKindFile    = "file"
	RootKindCACerts = "cacerts"
	RootKindVault   = "vault"
	RootKindPKCS11  = "pkcs11"
)

// The key stores.
const (
	KeyStoreFile   = "file"
	KeyStoreMemory = "memory"
	KeyStoreVault  = "vault"
	KeyStorePKCS11 = "pkcs11"
)

// How Kedge logs in to Vault.
const (
	LoginToken      = "token"
	LoginAppRole    = "approle"
	LoginKubernetes = "kubernetes"
	LoginCert       = "cert"
)

// UsesVault says whether anything of the configuration asks Vault.
func (c *Config) UsesVault() bool {
	return c.Root.Kind == RootKindVault || c.IssuingCA.KeyStore == KeyStoreVault
}

// UsesPKCS11 says whether anything of the configuration is in a token.
func (c *Config) UsesPKCS11() bool {
	return c.Root.Kind == RootKindPKCS11 || c.IssuingCA.KeyStore == KeyStorePKCS11
}

// The kinds of token issuers.
const (
	KindKubernetes = "kubernetes"
	KindOIDC       = "oidc"
)

// defaultAudience is what istio-agents ask Kubernetes tokens for.
const defaultAudience = "istio-ca"

// DefaultTokenIssuer is what a token issuer has where the file says nothing.
func DefaultTokenIssuer() TokenIssuer {
	return TokenIssuer{Kind: KindKubernetes, Audiences: []string{defaultAudience}}
}
