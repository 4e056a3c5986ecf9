//go:build e2e

package envoy_test

import (
	"strings"
	"testing"

	"kedge/test/envoy"
	"kedge/test/process"
)

// TestAWrongIdentityIsRefused: shop lets web in, and nobody else; and who looks for bank is not content with shop. All have certificates of the same CA.
func TestAWrongIdentityIsRefused(t *testing.T) {
	for _, way := range []struct {
		name   string
		spiffe bool
	}{{"Istio names", false}, {"SPIFFE names", true}} {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			m := startMesh(t, "web", "shop", "stranger", "seeker")
			m.startEnvoys(t, envoy.Agent, way.spiffe, "web", "shop")
			web, shop := m.places["web"].envoy, m.places["shop"].envoy
			process.Eventually(t, "web to reach shop", func() error { return envoy.Ask(web.Outbound) }) // so that what follows has one reason only
			for account, b := range map[string]envoy.Bootstrap{"stranger": {Peer: "shop"}, "seeker": {Peer: "bank"}} {
				b.Self, b.SPIFFENames, b.Inbound, b.PeerInbound = account, way.spiffe, process.FreePort(t), shop.Inbound
				m.places[account].envoy = m.startEnvoy(t, b)
			}
			for account, refuses := range map[string]*envoy.Envoy{"stranger": shop, "seeker": m.places["seeker"].envoy} {
				e := m.places[account].envoy
				e.Ready(t)
				before := refuses.Stat(t, ".ssl.fail_verify_san")
				if err := envoy.Ask(e.Outbound); err == nil || !strings.Contains(err.Error(), "503") {
					t.Errorf("%s was served, or failed otherwise: %v", account, err)
				}
				if n := refuses.Stat(t, ".ssl.fail_verify_san"); n <= before {
					t.Errorf("%s was refused, and not for its name: %d", account, n)
				}
			}
			if err := envoy.Ask(web.Outbound); err != nil {
				t.Errorf("web is refused, too: %v", err)
			}
		})
	}
}
