//go:build e2e && soak

package envoy_test

import (
	"testing"
	"time"

	"kedge/test/envoy"
)

// TestAMeshMovesToAnotherRoot: the issuing CA under a new root signs once every holder has acknowledged that root, and what nobody can have acknowledged has expired, with a margin of five
// minutes for clocks. Requests go through all the time.
func TestAMeshMovesToAnotherRoot(t *testing.T) {
	for name, door := range map[string]envoy.Door{"agent": envoy.Agent, "CA": envoy.CAInjector} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := startMesh(t, "web", "shop")
			m.startEnvoys(t, door, false, "web", "shop")
			var sent []*envoy.Traffic
			for _, p := range m.places {
				sent = append(sent, envoy.Send(t, p.envoy.Outbound))
			}
			m.eachRenews(t, 1)
			m.roots = append(m.roots, newAuthority(t, "Root 2", nil))
			m.sign(t, "Intermediate 2")
			m.arrives(t)
			m.movesTo(t, "Intermediate 2", 10*time.Minute)
			for _, s := range sent {
				s.Goes(t, "the change of the root")
				s.Stop(t)
			}
			m.checkLogs(t, map[string]string{"web": "shop", "shop": "web"})
		})
	}
}
