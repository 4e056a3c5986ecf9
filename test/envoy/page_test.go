package envoy

import (
	"testing"

	"sigs.k8s.io/yaml"
)

// TestThePageIsGoodYAML looks also at what no Envoy reads: what goes to Istio, and the template in it.
func TestThePageIsGoodYAML(t *testing.T) {
	blocks := Blocks(t)
	for name, text := range blocks {
		parse(t, text)
		t.Log(name)
	}
	var values struct {
		Injector struct {
			Templates map[string]string `json:"templates"`
		} `json:"sidecarInjectorWebhook"`
	}
	if err := yaml.UnmarshalStrict([]byte(blocks["values of istiod"]), &values); err != nil || len(values.Injector.Templates) != 1 {
		t.Fatalf("the values of istiod have %d templates (%v)", len(values.Injector.Templates), err)
	}
	for _, template := range values.Injector.Templates {
		parse(t, template)
	}
}
