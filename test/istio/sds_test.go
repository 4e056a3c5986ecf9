package istio

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	transport "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
)

// socket is where pilot-agent looks for the SDS of somebody else, and otherwise serves its own.
const socket = "var/run/secrets/workload-spiffe-uds/socket"

// proxied is a pilot-agent with a proxy, which does nothing.
func proxied(t *testing.T, a *agent) {
	t.Helper()
	script, config := filepath.Join(a.dir, "envoy"), filepath.Join(a.dir, "envoy.yaml")
	write(t, config, []byte("{}\n"))
	write(t, script, []byte("#!/bin/sh\n: >"+a.dir+"/envoy-started\nexec sleep 600\n"))
	if err := os.Chmod(script, 0o700); err != nil {
		t.Fatal(err)
	}
	a.start(t, "DISABLE_ENVOY=false", "GRPC_XDS_BOOTSTRAP=", "OUTPUT_CERTS=", "ECC_SIGNATURE_ALGORITHM=ECDSA", "SECRET_TTL=1h",
		fmt.Sprintf(`PROXY_CONFIG={"controlPlaneAuthPolicy":"NONE","discoveryAddress":"127.0.0.1:1","statusPort":%d,"binaryPath":%q,"customConfigFile":%q}`, freePort(t), script, config))
	eventually(t, "the agent to start its proxy", func() error {
		if err := a.process.running(); err != nil {
			t.Fatal(err)
		}
		_, err := os.Stat(filepath.Join(a.dir, "envoy-started"))
		return err
	})
}

// beside is a 'kedge agent' with its socket in the working folder of a pilot-agent.
func beside(t *testing.T, a *agent, token []byte) {
	t.Helper()
	file := filepath.Join(a.dir, "kedge-token")
	write(t, file, token)
	if err := os.MkdirAll(filepath.Dir(filepath.Join(a.dir, socket)), 0o700); err != nil {
		t.Fatal(err)
	}
	p := start(t, "kedge-agent", a.dir, nil, kedgeBin, "agent", "--server", a.kedge.address, "--root", a.kedge.rootFile(), "--token-file", file, "--socket", filepath.Join(a.dir, socket))
	eventually(t, "kedge agent to serve", func() error {
		if err := p.running(); err != nil {
			t.Fatal(err)
		}
		_, err := secrets(a, "default")
		return err
	})
}

// nearby is an agent whose folder has a name so short that a socket in it has room for its own, which is at most 107 octets.
func nearby(t *testing.T, k *kedge, token []byte) *agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	a := &agent{dir: dir, kedge: k}
	write(t, a.tokenFile(), token)
	return a
}

// secrets asks the socket in an agent's folder, as its Envoy would.
func secrets(a *agent, names ...string) (all []*transport.Secret, err error) {
	conn, err := grpc.NewClient("unix:"+filepath.Join(a.dir, socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := secret.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		return nil, err
	}
	const kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	if err := stream.Send(&discovery.DiscoveryRequest{Node: &core.Node{Id: "sidecar~127.0.0.1~pod-1.ns1~ns1.svc.cluster.local"}, ResourceNames: names, TypeUrl: kind}); err != nil {
		return nil, err
	}
	response, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	if response.GetTypeUrl() != kind || response.GetNonce() == "" || response.GetVersionInfo() == "" || len(response.GetResources()) != len(names) {
		return nil, fmt.Errorf("a response of the type %q with the nonce %q, the version %q and %d resources", response.GetTypeUrl(), response.GetNonce(), response.GetVersionInfo(),
			len(response.GetResources()))
	}
	for _, resource := range response.GetResources() {
		s := &transport.Secret{}
		if err := resource.UnmarshalTo(s); err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}

// held is the pair in a secret.
func held(t *testing.T, s *transport.Secret) tls.Certificate {
	t.Helper()
	pair, err := tls.X509KeyPair(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), s.GetTlsCertificate().GetPrivateKey().GetInlineBytes())
	if err != nil {
		t.Fatalf("the secret %q: %v", s.GetName(), err)
	}
	return pair
}

// TestPilotAgentAdoptsTheSocketOfKedgesAgent and leaves the CA alone. That it would call the CA by itself shows a second one, without the socket.
func TestPilotAgentAdoptsTheSocketOfKedgesAgent(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	adopting, alone := nearby(t, k, k.issuer.sign(t, token{account: "adopting"})), nearby(t, k, k.issuer.sign(t, token{account: "alone"}))
	beside(t, adopting, k.issuer.sign(t, token{account: "beside"}))
	proxied(t, adopting)
	proxied(t, alone)
	adopting.waitForLog(t, "Existing workload SDS socket found at "+socket)
	const own = "Existing workload SDS socket found"
	if bytes.Contains(alone.process.log(), []byte(own)) {
		t.Error("the agent without a socket adopted one")
	}
	for a, account := range map[*agent]string{adopting: "beside", alone: "alone"} {
		var all []*transport.Secret
		eventually(t, "the secret of "+account, func() (err error) {
			all, err = secrets(a, "default")
			return err
		})
		if leaf := held(t, all[0]).Leaf; len(leaf.URIs) != 1 || !strings.HasSuffix(leaf.URIs[0].String(), "/sa/"+account) {
			t.Errorf("the socket beside %s has the certificate of %v", account, leaf.URIs)
		}
	}
	for _, r := range k.ledger(t) {
		if strings.HasSuffix(r.Issue.SPIFFEID, "/sa/adopting") {
			t.Errorf("the agent that adopted a socket asked the CA by itself: %+v", r)
		}
	}
}

// TestKedgesAgentServesIstiosNamesAsPilotAgentDoes compares the messages, field by field. One thing differs on purpose: pilot-agent appends the roots to the certificate chain,
// which every peer has to have anyway, and which every handshake would carry.
func TestKedgesAgentServesIstiosNamesAsPilotAgentDoes(t *testing.T) {
	t.Parallel()
	k := startKedge(t)
	proof := k.issuer.sign(t, token{})
	istios, kedges := nearby(t, k, proof), nearby(t, k, proof)
	proxied(t, istios)
	beside(t, kedges, proof)
	for _, names := range [][]string{{"default"}, {"ROOTCA"}} {
		var shapes [2]*transport.Secret
		for i, a := range []*agent{istios, kedges} {
			var all []*transport.Secret
			eventually(t, fmt.Sprintf("the secret %s", names), func() (err error) {
				all, err = secrets(a, names...)
				return err
			})
			shapes[i] = all[0]
		}
		if names[0] == "default" {
			var leaves [2][]byte
			for i, s := range shapes {
				pair := held(t, s)
				anchors, err := os.ReadFile(k.rootFile())
				if err != nil {
					t.Fatal(err)
				}
				chain := bytes.ReplaceAll(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), bytes.TrimSpace(anchors), nil)
				certs, err := decode(chain)
				if err != nil {
					t.Fatal(err)
				}
				k.checkSVID(t, certs, agentID)
				leaves[i] = pair.Leaf.Raw
				s.GetTlsCertificate().CertificateChain.Specifier = &core.DataSource_InlineBytes{InlineBytes: encode(certs[1:]...)}
				s.GetTlsCertificate().PrivateKey.Specifier = &core.DataSource_InlineBytes{InlineBytes: fmt.Appendf(nil, "%T", pair.PrivateKey)}
			}
			if bytes.Equal(leaves[0], leaves[1]) {
				t.Error("both have the same certificate: who serves whom?")
			}
		} else {
			for _, s := range shapes {
				anchors := s.GetValidationContext().GetTrustedCa().GetInlineBytes()
				s.GetValidationContext().TrustedCa.Specifier = &core.DataSource_InlineBytes{InlineBytes: bytes.TrimSpace(anchors)}
			}
		}
		if !proto.Equal(shapes[0], shapes[1]) {
			t.Errorf("pilot-agent serves %v as\n%v\nand kedge agent as\n%v", names, shapes[0], shapes[1])
		}
	}
}
