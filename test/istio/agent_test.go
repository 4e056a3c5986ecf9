package istio

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// agentID is the SPIFFE ID of namespace ns1 and service account sa1.
const agentID = "spiffe://" + trustDomain + "/ns/ns1/sa/sa1"

// agent is a pilot-agent without Envoy, which keeps its certificate in files.
type agent struct {
	dir     string
	kedge   *kedge
	process *process
}

// newAgent makes the working folder of an agent. A nil token is none.
func newAgent(t *testing.T, k *kedge, token []byte) *agent {
	t.Helper()
	a := &agent{dir: t.TempDir(), kedge: k}
	if err := os.MkdirAll(a.out(), 0o700); err != nil {
		t.Fatal(err)
	}
	if token != nil {
		write(t, a.tokenFile(), append(token, '\n'))
	}
	return a
}

func (a *agent) out() string       { return filepath.Join(a.dir, "out") }
func (a *agent) tokenFile() string { return filepath.Join(a.dir, "var/run/secrets/tokens/istio-token") }

// start runs the agent with further environment variables.
func (a *agent) start(t *testing.T, environment ...string) {
	t.Helper()
	a.process = start(t, "pilot-agent", a.dir, append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + a.dir, "DISABLE_ENVOY=true", "OUTPUT_CERTS=./out", "CA_ADDR=" + a.kedge.address,
		"CA_ROOT_CA=" + a.kedge.rootFile(), "TRUST_DOMAIN=" + trustDomain, "POD_NAME=pod-1", "POD_NAMESPACE=ns1", "SERVICE_ACCOUNT=sa1",
		"ISTIO_META_CLUSTER_ID=Kubernetes", "CLOUD_PLATFORM=none",
		fmt.Sprintf(`PROXY_CONFIG={"controlPlaneAuthPolicy":"NONE","discoveryAddress":"127.0.0.1:1","statusPort":%d}`, freePort(t)),
	}, environment...), pilotAgentBin, "proxy", "sidecar")
}

// identity is what the agent has in its files.
type identity struct {
	chain []*x509.Certificate // the leaf first; without the roots
	roots []byte              // of root-cert.pem, without the line end, which the agent drops when it merges further anchors in
	key   any
}

func (i *identity) leaf() *x509.Certificate { return i.chain[0] }

// read returns what is in the files, or an error as long as they do not fit together: the agent writes one after the other.
func (a *agent) read() (*identity, error) {
	if err := a.process.running(); err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(a.out(), "cert-chain.pem"), filepath.Join(a.out(), "key.pem"))
	if err != nil {
		return nil, err
	}
	roots, err := os.ReadFile(filepath.Join(a.out(), "root-cert.pem"))
	if err != nil {
		return nil, err
	}
	anchors, err := decode(roots)
	if err != nil {
		return nil, err
	}
	id := &identity{roots: bytes.TrimSpace(roots), key: pair.PrivateKey}
	for _, der := range pair.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		// The agent writes the whole cert_chain of the response into the file, and its last element is the bundle.
		if !slices.ContainsFunc(anchors, cert.Equal) {
			id.chain = append(id.chain, cert)
		}
	}
	if len(id.chain) == 0 {
		return nil, errors.New("cert-chain.pem holds nothing but roots")
	}
	return id, nil
}

// waitForCertificate waits for a certificate other than those it had.
func (a *agent) waitForCertificate(t *testing.T, had ...*identity) (id *identity) {
	t.Helper()
	eventually(t, "the agent's next certificate", func() (err error) {
		if err := a.process.running(); err != nil {
			t.Fatal(err)
		}
		if id, err = a.read(); err != nil {
			return err
		}
		for _, old := range had {
			if old.leaf().SerialNumber.Cmp(id.leaf().SerialNumber) == 0 {
				return errors.New("the agent still has the certificate that it had")
			}
		}
		return nil
	})
	return id
}

// waitForLog waits until the agent has logged something.
func (a *agent) waitForLog(t *testing.T, text string) {
	t.Helper()
	eventually(t, fmt.Sprintf("the agent to log %q", text), func() error {
		if !bytes.Contains(a.process.log(), []byte(text)) {
			return errors.New("it has not")
		}
		return nil
	})
}
