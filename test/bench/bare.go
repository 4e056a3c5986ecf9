package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"runtime"
	"time"
)

// bareVerb is the argument that makes this program measure bare cryptography and print the result.
const bareVerb = "bare"

// The least that a certificate takes. Nothing is parsed and nothing is allocated but by the operation itself.
const (
	bareCSR       = "CSR: verify "         // its own signature, with SHA-256; followed by the kind of key
	bareToken     = "token: verify RS256"  // with SHA-256
	bareChain     = "client chain: verify" // x509.Certificate.Verify of a leaf under an issuing CA, P-256
	bareSign      = "leaf: sign P-256"     // with SHA-256
	bareHandshake = "handshake, server"    // TLS 1.3, X25519MLKEM768, a P-256 leaf with an issuing CA, over memory
)

// bareFor is what each operation is repeated for.
const bareFor = 150 * time.Millisecond

// bare prints what each operation takes, in µs of CPU time.
func bare() {
	results := map[string]float64{}
	for name, operation := range bareOperations() {
		results[name] = micros(repeat(operation))
	}
	results[bareHandshake] = micros(handshakes())
	if err := json.NewEncoder(os.Stdout).Encode(results); err != nil {
		panic(err)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err) // this process does nothing else
	}
	return v
}

// repeat returns the CPU time of one operation.
func repeat(operation func(i int)) time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for i := range 20 {
		operation(i)
	}
	began := threadCPU()
	for n := 1; ; n++ {
		operation(n)
		if n%20 == 0 {
			if took := threadCPU() - began; took > bareFor {
				return took / time.Duration(n)
			}
		}
	}
}

func require(good bool) {
	if !good {
		panic("a good signature does not verify")
	}
}

func bareOperations() map[string]func(i int) {
	const different = 64
	operations := map[string]func(int){}

	rsaKey := must(rsa.GenerateKey(rand.Reader, 2048))
	for _, kind := range keyKinds {
		var csrs []*x509.CertificateRequest
		for i := range different {
			var key crypto.Signer = rsaKey
			if kind == keyP256 {
				key = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
			}
			block, _ := pem.Decode([]byte(must(newCSR(key, i))))
			csrs = append(csrs, must(x509.ParseCertificateRequest(block.Bytes)))
		}
		operations[bareCSR+kind] = func(i int) { require(csrs[i%different].CheckSignature() == nil) }
	}

	type signed struct{ text, signature []byte }
	var tokens []signed
	for i := range different {
		text := bytes.Repeat([]byte{byte(i)}, 800) // header and payload of a bound token
		digest := sha256.Sum256(text)
		tokens = append(tokens, signed{text, must(rsa.SignPKCS1v15(rand.Reader, rsaKey, crypto.SHA256, digest[:]))})
	}
	operations[bareToken] = func(i int) {
		token := tokens[i%different]
		digest := sha256.Sum256(token.text)
		require(rsa.VerifyPKCS1v15(&rsaKey.PublicKey, crypto.SHA256, digest[:], token.signature) == nil)
	}

	authority := newAuthority()
	anchor := x509.NewCertPool()
	anchor.AddCert(authority.cert)
	var leaves []*x509.Certificate
	for i := range different {
		leaves = append(leaves, authority.leaf(int64(i+2), nil).Leaf)
	}
	usage := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	operations[bareChain] = func(i int) {
		_ = must(leaves[i%different].Verify(x509.VerifyOptions{Roots: anchor, KeyUsages: usage}))
	}
	tbs := leaves[0].RawTBSCertificate
	operations[bareSign] = func(int) {
		digest := sha256.Sum256(tbs)
		_ = must(ecdsa.SignASN1(rand.Reader, authority.key, digest[:]))
	}
	return operations
}

// authority is an issuing CA.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority() authority {
	a := authority{key: must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "issuing CA"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
	a.cert = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key))))
	return a
}

// leaf is a certificate for client and server, for an IP address if one is given, with its chain.
func (a authority) leaf(serial int64, address net.IP) tls.Certificate {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	if address != nil {
		template.IPAddresses = []net.IP{address}
	}
	der := must(x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key))
	return tls.Certificate{Certificate: [][]byte{der, a.cert.Raw}, PrivateKey: key, Leaf: must(x509.ParseCertificate(der))}
}

// handshakes returns the CPU time of the server's half of a handshake. The halves run on threads of their own, so that their time can be told apart.
func handshakes() time.Duration {
	authority, address := newAuthority(), net.IPv4(127, 0, 0, 1)
	roots := x509.NewCertPool()
	roots.AddCert(authority.cert)
	forServer := &tls.Config{Certificates: []tls.Certificate{authority.leaf(2, address)}, MinVersion: tls.VersionTLS12, ClientAuth: tls.RequestClientCert, NextProtos: []string{"h2"}}
	forClient := &tls.Config{RootCAs: roots, ServerName: address.String(), MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}
	conns := make(chan net.Conn)
	defer close(conns)
	go func() {
		runtime.LockOSThread()
		for conn := range conns {
			if err := tls.Client(conn, forClient).Handshake(); err != nil {
				panic(err)
			}
		}
	}()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var took time.Duration
	const warmUp = 10
	for n := 1; ; n++ {
		client, server := net.Pipe()
		conns <- client
		conn := tls.Server(server, forServer)
		began := threadCPU()
		if err := conn.Handshake(); err != nil {
			panic(err)
		}
		if n > warmUp {
			took += threadCPU() - began
		}
		if state := conn.ConnectionState(); state.Version != tls.VersionTLS13 || state.CurveID != tls.X25519MLKEM768 {
			panic(fmt.Sprintf("the handshake settled on %s with %s", tls.VersionName(state.Version), state.CurveID))
		}
		if took > 2*bareFor {
			return took / time.Duration(n-warmUp)
		}
	}
}

// measureBare measures on the server's core and on the other one at the same time, since that is how busy they are under load.
func (b *bench) measureBare(ctx context.Context) (onServer, onOther map[string]float64, err error) {
	program, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	results := make([]map[string]float64, 2)
	outs := make([]io.Reader, 2)
	commands := make([]*exec.Cmd, 2)
	for i, core := range []int{b.cores.server, b.cores.generator} {
		commands[i] = exec.CommandContext(ctx, program, bareVerb)
		commands[i].Stderr = os.Stderr
		if outs[i], err = commands[i].StdoutPipe(); err != nil {
			return nil, nil, err
		}
		if err := b.cores.start(core, commands[i]); err != nil {
			return nil, nil, err
		}
	}
	for i, command := range commands {
		err = errors.Join(err, json.NewDecoder(outs[i]).Decode(&results[i]), command.Wait())
	}
	if err != nil {
		return nil, nil, fmt.Errorf("measuring bare cryptography: %w", err)
	}
	return results[0], results[1], nil
}
