package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"kedge/issuer/admin"
)

// patience is how long a server may take to start or to stop.
const patience = time.Minute

// server is a process under measurement.
type server struct {
	name       string
	address    string // of the CSR API
	operations string // of /metrics; of Kedge only
	roots      *x509.CertPool
	command    *exec.Cmd
	ended      chan struct{}
	log        string // file of its standard output and error
}

// launch starts a program on the server's core and waits until ready finds it so.
func (b *bench) launch(ctx context.Context, dir string, env []string, ready func(s *server) error, name string, args ...string) (*server, error) {
	return b.launchOn(ctx, func(c *exec.Cmd) error { return b.cores.start(b.cores.server, c) }, dir, env, ready, name, args...)
}

// launchOn is launch with another way to start the program.
func (b *bench) launchOn(ctx context.Context, start func(*exec.Cmd) error, dir string, env []string, ready func(s *server) error, name string, args ...string) (*server, error) {
	s := &server{name: filepath.Base(name), log: filepath.Join(dir, "log"), command: exec.Command(name, args...), ended: make(chan struct{})}
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the process has its own
	s.command.Dir, s.command.Env, s.command.Stdout, s.command.Stderr = dir, append(os.Environ(), env...), log, log
	if err := start(s.command); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		_ = s.command.Wait() // the state says how it ended
		close(s.ended)
	}()
	if err := poll(ctx, func() error { return ready(s) }, s.ended); err != nil {
		return nil, errors.Join(fmt.Errorf("%s is not ready: %w\n%s", s.name, err, s.tail()), s.stop())
	}
	return s, nil
}

// poll tries until there is no error, ctx or patience ends, or ended is closed.
func poll(ctx context.Context, try func() error, ended <-chan struct{}) error {
	deadline, tick := time.After(patience), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-deadline:
			return err
		case <-ended:
			return fmt.Errorf("the process ended: %w", err)
		}
	}
}

// tail is the end of the log.
func (s *server) tail() string {
	text, err := os.ReadFile(s.log)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-2000):])
}

// stop ends the process, in good order if it can.
func (s *server) stop() error {
	_ = s.command.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-s.ended:
	case <-time.After(patience):
		_ = s.command.Process.Kill()
		<-s.ended
		return fmt.Errorf("%s did not stop within %s", s.name, patience)
	}
	return nil
}

func (s *server) cpu() (time.Duration, error) { return cpuTime(s.command.Process.Pid) }

// startKedge runs 'kedge serve' in a folder that fill made.
func (b *bench) startKedge(ctx context.Context, program, dir string, env ...string) (*server, error) {
	config := filepath.Join(dir, "kedge.yaml")
	jwks := filepath.Join(dir, "cluster.jwks")
	text := fmt.Sprintf(`dataDir: %q
csr: {listen: "127.0.0.1:0"}
operations: {listen: "127.0.0.1:0"}
callers: {tokenIssuers: [{name: cluster-1, kind: kubernetes, issuer: %q, jwksFile: %q}]}
`, dataFolder(dir), issuerName, jwks)
	if err := errors.Join(os.WriteFile(config, []byte(text), 0o600), os.WriteFile(jwks, b.crowd.jwks, 0o600)); err != nil {
		return nil, err
	}
	return b.launch(ctx, dir, env, func(s *server) error {
		status, err := admin.NewClient(filepath.Join(dataFolder(dir), "admin.sock")).Status(ctx)
		if err != nil {
			return err
		}
		s.name, s.address, s.operations = "Kedge", status.CSRAddress, status.OpsAddress
		s.roots, err = readRoots(status.RootFile)
		return err
	}, program, "serve", "--config", config)
}

// dataFolder is that of the CA whose configuration is in dir.
func dataFolder(dir string) string { return filepath.Join(dir, "data") }

func readRoots(path string) (*x509.CertPool, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s has no certificate", path)
	}
	return pool, nil
}

// startIstio runs Istio's CA server in a folder that prepareIstio made.
func (b *bench) startIstio(ctx context.Context, dir string) (*server, error) {
	address := filepath.Join(dir, "address")
	if err := os.RemoveAll(address); err != nil {
		return nil, err
	}
	return b.launch(ctx, dir, nil, func(s *server) error {
		text, err := os.ReadFile(address)
		if err != nil {
			return err
		}
		s.name, s.address = "Istio", string(text)
		s.roots, err = readRoots(filepath.Join(dir, "root-cert.pem"))
		return err
	}, b.istio, dir, "127.0.0.1:0")
}

// prepareIstio makes what Istio's CA server reads: a root, an issuing CA under it and a server certificate under that, all P-256, as Kedge has them.
func (b *bench) prepareIstio(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	now := time.Now()
	template := func(serial int64, name string) *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{Organization: []string{name}}, NotBefore: now.Add(-time.Hour),
			NotAfter: now.Add(365 * 24 * time.Hour), BasicConstraintsValid: true}
	}
	root, issuing, leaf := template(1, "root"), template(2, "issuing CA"), template(3, "server")
	for _, authority := range []*x509.Certificate{root, issuing} {
		authority.IsCA, authority.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	}
	issuing.MaxPathLenZero = true
	leaf.KeyUsage, leaf.ExtKeyUsage, leaf.IPAddresses = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, []net.IP{net.IPv4(127, 0, 0, 1)}
	var keys [3]*ecdsa.PrivateKey
	var certs, keyTexts [3][]byte
	parents := [3]int{0, 0, 1}
	for i, t := range []*x509.Certificate{root, issuing, leaf} {
		var err error
		if keys[i], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return err
		}
		der, err := x509.CreateCertificate(rand.Reader, t, []*x509.Certificate{root, issuing, leaf}[parents[i]], keys[i].Public(), keys[parents[i]])
		if err != nil {
			return err
		}
		parsed, err := x509.ParseCertificate(der) // with the key identifiers that its children name
		if err != nil {
			return err
		}
		*t = *parsed
		pkcs8, err := x509.MarshalPKCS8PrivateKey(keys[i])
		if err != nil {
			return err
		}
		certs[i] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		keyTexts[i] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	}
	for name, text := range map[string][]byte{
		"root-cert.pem": certs[0], "ca-cert.pem": certs[1], "cert-chain.pem": certs[1], "ca-key.pem": keyTexts[1],
		"tls-cert.pem": append(certs[2], certs[1]...), "tls-key.pem": keyTexts[2], "jwks.json": b.crowd.jwks, "issuer": []byte(issuerName),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// tlsCertificate is what a client shows that holds the key and what was issued for it.
func tlsCertificate(key *ecdsa.PrivateKey, chain []string) (*tls.Certificate, error) {
	certificate := &tls.Certificate{PrivateKey: key}
	for _, link := range chain {
		block, _ := pem.Decode([]byte(link))
		if block == nil {
			return nil, errors.New("an element of the chain is not PEM")
		}
		certificate.Certificate = append(certificate.Certificate, block.Bytes)
	}
	var err error
	certificate.Leaf, err = x509.ParseCertificate(certificate.Certificate[0])
	return certificate, err
}
