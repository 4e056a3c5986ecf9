//go:build e2e

package vault_test

import (
	"testing"

	"kedge/ca"
	"kedge/ca/contracttest"
	plugin "kedge/plugins/vault"
)

func TestRootKeepsTheContract(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		for name, mount := range map[string]func(*testing.T) string{"a root as issuer": f.mountRoot, "an intermediate as issuer": f.mountIntermediate} {
			t.Run(name, func(t *testing.T) {
				contracttest.Root(t, func(t *testing.T) ca.Root { return f.root(t, plugin.RootOptions{Mount: mount(t)}) })
			})
		}
	})
}

func TestKeyStoreKeepsTheContract(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		contracttest.KeyStore(t, func(t *testing.T) ca.KeyStore {
			return f.keys(t, plugin.KeyStoreOptions{Mount: f.mountTransit(t)})
		}, func(t *testing.T, store ca.KeyStore) ca.KeyStore {
			return f.keys(t, plugin.KeyStoreOptions{Mount: f.transit, Client: f.login(t)})
		}, contracttest.AllKeySpecs...)
	})
}
