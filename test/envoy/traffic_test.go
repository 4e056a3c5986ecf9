//go:build e2e

package envoy_test

import (
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"kedge/test/envoy"
	"kedge/test/process"
)

// TestTwoEnvoysLoseNoRequest: two Envoys speak mTLS to each other, both ways, with secrets of a CA whose certificates live for seconds. Requests go through all the time: while certificates are
// renewed and tokens replaced, the CA is killed, and stopped, and comes back, agents too; and while another issuing CA takes over, and another root arrives.
func TestTwoEnvoysLoseNoRequest(t *testing.T) {
	for _, way := range []struct {
		name   string
		door   envoy.Door
		spiffe bool
	}{
		{"agent by Istio names", envoy.Agent, false},
		{"agent by SPIFFE names", envoy.Agent, true},
		{"CA with the token by credential injector", envoy.CAInjector, false},
		{"CA with the token by Google gRPC", envoy.CAGoogle, false},
		{"CA by SPIFFE names", envoy.CAInjector, true},
	} {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			m := startMesh(t, "web", "shop")
			m.startEnvoys(t, way.door, way.spiffe, "web", "shop")
			var sent []*envoy.Traffic
			for _, p := range m.places {
				sent = append(sent, envoy.Send(t, p.envoy.Outbound))
			}
			answered := func(after string) {
				t.Helper()
				for _, s := range sent {
					s.Goes(t, after)
				}
			}
			m.eachRenews(t, 2)
			answered("renewals")
			m.Kill(t)
			m.Start(t)
			m.eachRenews(t, 1)
			answered("a crash of the CA")
			m.Stop(t)
			m.Start(t)
			m.eachRenews(t, 1)
			answered("a restart of the CA")
			if way.door == envoy.Agent {
				for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
					for _, p := range m.places {
						p.agent.end(signal)
						p.agent.start(t)
					}
					m.eachRenews(t, 1)
					answered(fmt.Sprintf("agents that had a %s", signal))
				}
			}
			m.sign(t, "Intermediate 2")
			m.movesTo(t, "Intermediate 2", process.Patience)
			answered("another issuing CA")
			m.roots = append(m.roots, newAuthority(t, "Root 2", nil))
			m.sign(t, "Intermediate 3")
			m.arrives(t)
			if way.door != envoy.CAGoogle { // which has a connection for each secret, so that nothing ties the trust bundle on one to the certificate on another
				m.acknowledges(t)
			}
			m.eachRenews(t, 1)
			answered("another root")
			for _, s := range sent {
				s.Stop(t)
			}
			m.checkLogs(t, map[string]string{"web": "shop", "shop": "web"})
			m.Verify(t)
		})
	}
}

// movesTo waits until both sides of every connection show certificates by another issuing CA.
func (m *mesh) movesTo(t *testing.T, name string, limit time.Duration) {
	t.Helper()
	for _, p := range m.places {
		for _, log := range []string{"inbound", "outbound"} {
			if err := process.Poll(limit, func() error {
				requests := p.envoy.Access(t, log)
				if last := requests[len(requests)-1]; last.Issuer != "CN="+name {
					return fmt.Errorf("the last one is by %s", last.Issuer)
				}
				return nil
			}); err != nil {
				t.Fatalf("the peers in the %s log of %s have no certificates by %s: %v", log, p.account, name, err)
			}
		}
	}
}

// arrives waits until every Envoy trusts all roots.
func (m *mesh) arrives(t *testing.T) {
	t.Helper()
	for _, p := range m.places {
		process.Eventually(t, "the newest root to be with "+p.account, func() error {
			held := p.envoy.Holds(t).Roots
			for _, root := range m.roots {
				if !slices.Contains(held, fmt.Sprintf("%x", root.cert.SerialNumber)) {
					return fmt.Errorf("it has %v, and not %x", held, root.cert.SerialNumber)
				}
			}
			return nil
		})
	}
}

// checkLogs makes sure of what the access logs say: each request was answered, each peer was who it had to be, and with certificates that the ledger has; which were confirmed.
func (m *mesh) checkLogs(t *testing.T, peers map[string]string) {
	t.Helper()
	for account, peer := range peers {
		p := m.places[account]
		issued, confirmed, _ := m.evidence(t, peer)
		if len(issued) < 5 || confirmed == 0 {
			t.Errorf("the ledger has %d certificates of %s, and %d confirmations", len(issued), peer, confirmed)
		}
		shown := map[string]bool{}
		for _, log := range []string{"inbound", "outbound"} {
			requests := p.envoy.Access(t, log)
			for _, r := range requests {
				if r.Peer != envoy.ID(peer) || r.Code != 200 {
					t.Fatalf("the %s log of %s has %+v", log, account, r)
				}
				if log == "inbound" {
					shown[r.Serial] = true
				}
			}
			t.Logf("the %s log of %s has %d requests, all with %s", log, account, len(requests), peer)
		}
		if len(shown) < 5 {
			t.Errorf("%s showed only %d certificates", peer, len(shown))
		}
		for serial := range shown {
			if !issued[serial] {
				t.Errorf("%s showed the certificate %s, which the ledger does not have", peer, serial)
			}
		}
	}
}
