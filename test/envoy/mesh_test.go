//go:build e2e

package envoy_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/test/envoy"
	"kedge/test/process"
)

// The lifetimes of a hurried mesh.
const (
	certificateLife = 8 * time.Second
	tokenLife       = 12 * time.Second
	tokenReplaced   = 3 * time.Second
)

// mesh is a CA whose root is istiod's, and workloads whose tokens are replaced all the time.
type mesh struct {
	*process.Kedge
	address string // HOST:PORT
	cluster *process.Cluster
	secret  string // the folder of the root
	roots   []*authority
	places  map[string]*place
}

// place is where a workload is.
type place struct {
	account string
	dir     string
	envoy   *envoy.Envoy
	agent   *agent // nil: it has none
}

func (p *place) token() string  { return filepath.Join(p.dir, "tokens", "kedge-token") }
func (p *place) socket() string { return filepath.Join(p.dir, "run", "sds.sock") }

// startMesh starts a CA, and replaces the tokens of these service accounts until the test ends.
func startMesh(t *testing.T, accounts ...string) *mesh {
	t.Helper()
	m := &mesh{Kedge: process.New(t, ""), address: fmt.Sprintf("127.0.0.1:%d", process.FreePort(t)), cluster: process.NewCluster(t), secret: t.TempDir(), places: map[string]*place{}}
	m.roots = []*authority{newAuthority(t, "Root 1", nil)}
	m.sign(t, "Intermediate 1")
	process.Write(t, m.Config, envoy.Page(t, "kedge.yaml", map[string]string{
		`"0.0.0.0:15012"`: fmt.Sprintf("%q, serverCertificateTTL: 10s", m.address), "[kedge.kedge-system.svc]": "[kedge.kedge-system.svc, 127.0.0.1]",
	})+fmt.Sprintf(`
operations: {listen: "127.0.0.1:0"}
log: {level: debug}
root: {kind: cacerts, cacerts: {dir: %q}, foreignWindow: 1s}
profiles: {default: {defaultTTL: %[2]s, maxTTL: %[2]s, minTTL: 1s, backdate: 0s}}
`, m.secret, certificateLife)+strings.Replace(m.cluster.Configuration(t, m.Dir), "{tokenIssuers", "{clockSkew: 1s, tokenIssuers", 1))
	m.Start(t)
	ctx, cancel := context.WithCancel(context.Background())
	var kubelets sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		kubelets.Wait()
	})
	for _, account := range accounts {
		p := &place{account: account, dir: shortDir(t)}
		m.places[account] = p
		for _, folder := range []string{"tokens", "run"} {
			if err := os.Mkdir(filepath.Join(p.dir, folder), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		project := func() {
			process.Mount(t, filepath.Dir(p.token()), map[string]string{"kedge-token": m.cluster.ShortToken(t, "default", account, tokenLife)})
		}
		project()
		kubelets.Go(func() {
			tick := time.NewTicker(tokenReplaced)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
					project()
				}
			}
		})
	}
	return m
}

// shortDir is like t.TempDir, with room for the name of a socket, which has 107 octets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kedge-envoy-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// sign gives the CA an intermediate under its newest root, and all of the roots, as the kubelet would.
func (m *mesh) sign(t *testing.T, name string) {
	t.Helper()
	root := m.roots[len(m.roots)-1]
	intermediate := newAuthority(t, name, root)
	key, err := x509.MarshalPKCS8PrivateKey(intermediate.key)
	if err != nil {
		t.Fatal(err)
	}
	var anchors string
	for _, r := range m.roots {
		anchors += inPEM("CERTIFICATE", r.cert.Raw)
	}
	process.Mount(t, m.secret, map[string]string{"ca-cert.pem": inPEM("CERTIFICATE", intermediate.cert.Raw), "ca-key.pem": inPEM("PRIVATE KEY", key),
		"cert-chain.pem": inPEM("CERTIFICATE", intermediate.cert.Raw) + inPEM("CERTIFICATE", root.cert.Raw), "root-cert.pem": anchors})
}

// authority is a CA that was made elsewhere.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string, by *authority) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().AddDate(1, 0, 0), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true}
	parent, signer := template, key
	if by != nil {
		template.MaxPathLenZero, template.NotAfter = true, time.Now().AddDate(0, 6, 0)
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

func inPEM(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// agent is a 'kedge agent', over all its restarts.
type agent struct {
	args    []string
	log     string
	command *exec.Cmd
	ended   chan struct{}
}

// startAgent starts the agent of a workload.
func (m *mesh) startAgent(t *testing.T, p *place) {
	t.Helper()
	config := filepath.Join(p.dir, "agent.yaml")
	process.Write(t, config, fmt.Sprintf("{server: %q, rootFile: %q, consumerGrace: 2s, workloads: [{name: %s, tokenFile: %q, sockets: [{path: %q}]}]}", m.address, m.Status(t).RootFile,
		p.account, p.token(), p.socket()))
	p.agent = &agent{log: filepath.Join(p.dir, "agent.log"), args: []string{"agent", "--config", config}}
	p.agent.start(t)
	t.Cleanup(func() {
		p.agent.end(syscall.SIGKILL)
		if t.Failed() {
			text := process.Read(t, p.agent.log)
			t.Logf("the agent of %s logged:\n%s", p.account, text[max(0, len(text)-4000):])
		}
	})
}

func (a *agent) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(a.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	command, ended := exec.Command(process.Binary(), a.args...), make(chan struct{})
	command.Stdout, command.Stderr = log, log
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	a.command, a.ended = command, ended
	go func() {
		_ = command.Wait() // it is killed, as a rule
		close(ended)
	}()
}

func (a *agent) end(signal os.Signal) {
	_ = a.command.Process.Signal(signal) // it may have ended
	<-a.ended
}

// startEnvoys starts an Envoy at each of two places, which speak to each other.
func (m *mesh) startEnvoys(t *testing.T, door envoy.Door, spiffeNames bool, one, other string) {
	t.Helper()
	first, second := process.FreePort(t), process.FreePort(t)
	for _, b := range []envoy.Bootstrap{{Self: one, Peer: other, Inbound: first, PeerInbound: second}, {Self: other, Peer: one, Inbound: second, PeerInbound: first}} {
		b.Door, b.SPIFFENames = door, spiffeNames
		m.places[b.Self].envoy = m.startEnvoy(t, b)
	}
	for _, p := range m.places {
		if p.envoy != nil {
			p.envoy.Ready(t)
		}
	}
}

// startEnvoy starts one, and its agent if it is to have one.
func (m *mesh) startEnvoy(t *testing.T, b envoy.Bootstrap) *envoy.Envoy {
	t.Helper()
	p := m.places[b.Self]
	if b.Door == envoy.Agent && p.agent == nil {
		m.startAgent(t, p)
	}
	b.Socket, b.CA, b.RootFile, b.TokenFile = p.socket(), m.address, m.Status(t).RootFile, p.token()
	b.Admin, b.Outbound, b.Program = process.FreePort(t), process.FreePort(t), envoy.Program(t)
	return envoy.Start(t, b)
}

// renews waits until a workload has had so many other certificates than it has now.
func (m *mesh) renews(t *testing.T, p *place, times int) {
	t.Helper()
	seen := map[string]bool{}
	process.Eventually(t, fmt.Sprintf("%s to renew its certificate %d times", p.account, times), func() error {
		for _, serial := range p.envoy.Holds(t).Serials {
			seen[serial] = true
		}
		if len(seen) <= times {
			return fmt.Errorf("it had %d", len(seen))
		}
		return nil
	})
}

// eachRenews waits until each workload has had so many other certificates.
func (m *mesh) eachRenews(t *testing.T, times int) {
	t.Helper()
	for _, p := range m.places {
		m.renews(t, p, times)
	}
}

// acknowledges waits until the ledger has it from each workload that it holds a newer trust bundle than it was given its certificate with.
func (m *mesh) acknowledges(t *testing.T) {
	t.Helper()
	for account := range m.places {
		process.Eventually(t, account+" to acknowledge a trust bundle", func() error {
			if issued, confirmed, bundles := m.evidence(t, account); bundles == 0 {
				return fmt.Errorf("the ledger has %d certificates and %d confirmations", len(issued), confirmed)
			}
			return nil
		})
	}
}

// evidence is what the ledger has of a workload: its certificates by serial number, how many of them their holder confirmed, and how many confirmations named a trust bundle.
func (m *mesh) evidence(t *testing.T, account string) (serials map[string]bool, confirmed, bundles int) {
	t.Helper()
	serials, numbers := map[string]bool{}, map[uint64]bool{}
	for _, event := range m.Export(t) {
		switch {
		case event.Issue != nil && event.Issue.SPIFFEID == envoy.ID(account):
			serials[event.Issue.Serial.String()], numbers[event.Number] = true, true
		case event.Confirm != nil && numbers[event.Confirm.Number]:
			confirmed++
			if event.Confirm.Bundle > 0 {
				bundles++
			}
		}
	}
	return serials, confirmed, bundles
}
