package istio

import (
	"fmt"
	"os"
	"testing"
)

// The programs under test.
var (
	kedgeBin      = os.Getenv("KEDGE_BIN")
	pilotAgentBin = os.Getenv("PILOT_AGENT_BIN")
	istioCABin    = os.Getenv("ISTIO_CA_BIN")
)

func TestMain(m *testing.M) {
	for name, path := range map[string]string{"KEDGE_BIN": kedgeBin, "PILOT_AGENT_BIN": pilotAgentBin, "ISTIO_CA_BIN": istioCABin} {
		if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
			fmt.Fprintf(os.Stderr, "%s=%q is no program: run these tests with 'make e2e', which builds what they need\n", name, path)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}
