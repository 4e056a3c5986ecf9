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
				contracttest.Root(t, func(t *testing.T) ca.Root { return f.root(t, plugin.RootOptions{Mount: mount(t)}) }, faults[ca.Root](f))
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
		}, faults[ca.KeyStore](f), contracttest.AllKeySpecs...)
	})
}

// faults are what can happen to a server.
func faults[T any](f *fixture) map[string]func(T) contracttest.Fault {
	all := map[string]func(T) contracttest.Fault{}
	for name, fault := range map[string]contracttest.Fault{
		"its server sealed":  {Away: func(t *testing.T) { f.Seal(t) }, Back: func(t *testing.T) { f.Unseal(t) }},
		"its server killed":  {Away: func(*testing.T) { f.Stop() }, Back: func(t *testing.T) { f.Restart(t) }},
		"its server stopped": {Away: func(t *testing.T) { f.Freeze(t) }, Back: func(t *testing.T) { f.Thaw(t) }, Hangs: true},
	} {
		fault.Says = f.Address
		all[name] = func(T) contracttest.Fault { return fault }
	}
	return all
}
