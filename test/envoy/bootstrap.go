package envoy

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"kedge/test/process"
)

// page has the bootstraps that these tests run: what a reader copies is what was tested.
const page = "../../docs/envoy.md"

// Door is where an Envoy gets its secrets.
type Door int

// The doors.
const (
	Agent      Door = iota // the socket of 'kedge agent'
	CAInjector             // the CA; the token comes into the request by Envoy's credential injector
	CAGoogle               // the CA; the token comes into the request by Google's gRPC client
)

// Bootstrap is one of the page's, with what is different in a test.
type Bootstrap struct {
	Self, Peer  string // service accounts in the namespace "default"
	Door        Door
	SPIFFENames bool   // secrets are asked for by SPIFFE's names, not by Istio's
	Socket      string // Agent: the path
	CA          string // otherwise: the CA's HOST:PORT,
	RootFile    string // the file of its root,
	TokenFile   string // and the file of the token

	Admin, Inbound, Outbound int // ports
	PeerInbound, Program     int // the ports of the peer, and of the program behind
}

// ID is the SPIFFE ID of a service account.
func ID(account string) string { return "spiffe://cluster.local/ns/default/sa/" + account }

// Blocks are the page's, by the comments that they begin with.
func Blocks(t testing.TB) map[string]string {
	t.Helper()
	blocks := map[string]string{}
	for _, found := range regexp.MustCompile("(?ms)^```yaml\n# ([^\n]*)\n(.*?)^```$").FindAllStringSubmatch(process.Read(t, page), -1) {
		blocks[found[1]] = found[2]
	}
	return blocks
}

// Page is a block of the page with a test's values in the place of the page's.
func Page(t testing.TB, block string, values map[string]string) string {
	t.Helper()
	return fill(t, Blocks(t)[block], values)
}

// write makes the bootstrap of what the page says, with paths in dir, and what it refers to.
func (b *Bootstrap) write(t testing.TB, dir string) string {
	t.Helper()
	blocks := Blocks(t)
	main := fill(t, blocks["envoy.yaml"], map[string]string{
		"cluster: web": "cluster: " + b.Self, "/var/log/envoy": dir, "600s": "0.1s",
		"address: 127.0.0.1, port_value: 15000": fmt.Sprintf("address: 127.0.0.1, port_value: %d", b.Admin),
		"address: 0.0.0.0, port_value: 15006":   fmt.Sprintf("address: 127.0.0.1, port_value: %d", b.Inbound),
		"port_value: 15001":                     fmt.Sprintf("port_value: %d", b.Outbound),
		"port_value: 8080":                      fmt.Sprintf("port_value: %d", b.Program),
		"shop.default.svc, port_value: 15006":   fmt.Sprintf("127.0.0.1, port_value: %d", b.PeerInbound),
		ID("shop"):                              ID(b.Peer),
	})
	if b.SPIFFENames { // as the page says
		main = fill(t, main, map[string]string{"name: default": fmt.Sprintf("name: %q", ID(b.Self)), "name: ROOTCA": "name: ALL"})
	}
	const host = "kedge.kedge-system.svc"
	address, port, _ := strings.Cut(b.CA, ":")
	ca := map[string]string{host + ", port_value: 15012": address + ", port_value: " + port}
	var bootstrap any
	switch b.Door {
	case Agent:
		bootstrap = parse(t, fill(t, main, map[string]string{"/run/kedge/sds.sock": b.Socket}))
	case CAInjector:
		for name, values := range map[string]map[string]string{
			"kedge-token.yaml": {"/var/run/secrets/tokens/kedge-token": b.TokenFile, "/var/run/secrets/tokens": filepath.Dir(b.TokenFile)},
			"kedge-root.yaml":  {"/etc/kedge/root-cert.pem": b.RootFile, "path: /etc/kedge": "path: " + filepath.Dir(b.RootFile)},
		} {
			file := filepath.Join(dir, name)
			process.Write(t, file, fill(t, blocks[name], values))
			ca["/etc/envoy/"+name] = file
		}
		bootstrap = parse(t, main)
		clusters := bootstrap.(map[string]any)["static_resources"].(map[string]any)["clusters"].([]any)
		clusters[len(clusters)-1] = parse(t, fill(t, blocks["the cluster kedge"], ca))
	case CAGoogle:
		source := parse(t, fill(t, blocks["each sds_config"], map[string]string{
			host + ":15012": b.CA, "/etc/kedge/root-cert.pem": b.RootFile, "/var/run/secrets/tokens/kedge-token": b.TokenFile}))
		bootstrap = replace(parse(t, main), "sds_config", source)
		resources := bootstrap.(map[string]any)["static_resources"].(map[string]any)
		clusters := resources["clusters"].([]any)
		resources["clusters"] = clusters[:len(clusters)-1]
	}
	text, err := json.MarshalIndent(bootstrap, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// fill puts a test's values in the place of the page's, each of which the page must have. Longer ones go first, since one may be the beginning of another.
func fill(t testing.TB, text string, values map[string]string) string {
	t.Helper()
	for from := range values {
		if !strings.Contains(text, from) {
			t.Fatalf("%s has no %q in:\n%s", page, from, text)
		}
	}
	var pairs []string
	for _, from := range slices.SortedFunc(maps.Keys(values), func(a, b string) int { return len(b) - len(a) }) {
		pairs = append(pairs, from, values[from])
	}
	return strings.NewReplacer(pairs...).Replace(text)
}

// replace puts a value in the place of each one under a key.
func replace(in any, key string, value any) any {
	switch in := in.(type) {
	case map[string]any:
		for k, v := range in {
			if k == key {
				in[k] = value
			} else {
				in[k] = replace(v, key, value)
			}
		}
	case []any:
		for i, v := range in {
			in[i] = replace(v, key, value)
		}
	}
	return in
}

func parse(t testing.TB, text string) (parsed any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(text), &parsed); err != nil || parsed == nil {
		t.Fatalf("%s: %v:\n%s", page, err, text)
	}
	return parsed
}
