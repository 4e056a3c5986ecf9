package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"maps"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	pb "istio.io/api/security/v1alpha1"

	"kedge/ca/atomicfile"
	"kedge/issuer/istio"
	"kedge/test/process"
)

// tokenFile makes a join token, and the file that holds it.
func tokenFile(t *testing.T, k *process.Kedge) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "token")
	process.Write(t, path, k.Must(t, "token", "create", "--identity", "ns/default/sa/web"))
	return path
}

// checkPair makes sure that a folder has an SVID that programs can use.
func checkPair(t *testing.T, dir string) {
	t.Helper()
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, istio.ChainFile), filepath.Join(dir, istio.KeyFile)); err != nil {
		t.Error(err)
	}
}

func TestFetchWaitsForACAThatIsNotThereYet(t *testing.T) {
	t.Parallel()
	k := process.New(t, "")
	k.Start(t)
	token, localToken, root := tokenFile(t, k), tokenFile(t, k), filepath.Join(t.TempDir(), "root.pem")
	process.Write(t, root, process.Read(t, k.Status(t).RootFile))
	k.Stop(t)

	front := newFront(t)
	out, localOut := filepath.Join(t.TempDir(), "svid"), filepath.Join(t.TempDir(), "svid")
	elsewhere := launch(t, nil, "svid", "fetch", "--server", front.address, "--root", root, "--token-file", token, "--out", out, "--timeout", "10m")
	local := launch(t, nil, "svid", "fetch", "--config", k.Config, "--token-file", localToken, "--out", localOut, "--timeout", "10m")
	elsewhere.awaitLog(t, "kedge: trying again until 10m have passed (--timeout): ")
	local.awaitLog(t, "kedge: trying again until 10m have passed (--timeout): no CA is running there")
	if _, err := os.Stat(filepath.Join(out, istio.KeyFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there is a key before there is a CA: %v", err)
	}
	k.Start(t)
	front.lead(k.Status(t).CSRAddress)
	elsewhere.wait(t, 0)
	local.wait(t, 0)
	checkPair(t, out)
	checkPair(t, localOut)
}

// scripted is a CSR API that answers each call with the next code, the last one over and over.
type scripted struct {
	pb.UnimplementedIstioCertificateServiceServer
	answers []codes.Code

	mu    sync.Mutex
	calls []string // the CSR and the token of each
}

func (s *scripted) CreateCertificate(ctx context.Context, request *pb.IstioCertificateRequest) (*pb.IstioCertificateResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	code := s.answers[min(len(s.calls), len(s.answers)-1)]
	md, _ := metadata.FromIncomingContext(ctx)
	s.calls = append(s.calls, request.GetCsr()+strings.Join(md.Get("authorization"), ","))
	return nil, status.Error(code, "as the test wants it")
}

// TestFetchRepeatsWhatMayPassAndNothingElse gives the real program every answer that a server can give.
func TestFetchRepeatsWhatMayPassAndNothingElse(t *testing.T) {
	t.Parallel()
	passing := []codes.Code{codes.Canceled, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Aborted, codes.Internal, codes.Unavailable}
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		t.Run(code.String(), func(t *testing.T) {
			t.Parallel()
			api := &scripted{answers: []codes.Code{code}}
			if slices.Contains(passing, code) {
				api.answers = []codes.Code{code, code, codes.PermissionDenied}
			}
			address, root := serve(t, api)
			token := filepath.Join(t.TempDir(), "token")
			process.Write(t, token, "the-token\n")
			out := filepath.Join(t.TempDir(), "svid")
			said := launch(t, nil, "svid", "fetch", "--server", address, "--root", root, "--token-file", token, "--out", out, "--timeout", "10m").wait(t, 1)
			api.mu.Lock()
			defer api.mu.Unlock()
			if len(api.calls) != len(api.answers) {
				t.Errorf("it was asked %d times, not %d", len(api.calls), len(api.answers))
			}
			for _, call := range api.calls {
				if call != api.calls[0] || !strings.HasSuffix(call, "Bearer the-token") {
					t.Errorf("a call was another than the first: %q", call)
				}
			}
			if repeated := strings.Contains(said, "trying again"); repeated != (len(api.answers) > 1) {
				t.Errorf("it says %s", said)
			}
			if !strings.Contains(said, "kedge: the CA at "+address+" gave no SVID: ") || !strings.Contains(said, "as the test wants it") {
				t.Errorf("it does not say why: %s", said)
			}
			if _, err := os.Stat(filepath.Join(out, istio.KeyFile)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("there is a key without a certificate: %v", err)
			}
		})
	}
}

// serve runs a CSR API on loopback, with a certificate for 127.0.0.1. It returns its address and the file with the root that it proves itself under.
func serve(t *testing.T, api pb.IstioCertificateServiceServer) (address, root string) {
	t.Helper()
	return serveUntil(t, api, time.Now().Add(time.Hour))
}

// serveUntil is serve with a certificate that ends then.
func serveUntil(t *testing.T, api pb.IstioCertificateServiceServer, end time.Time) (address, root string) {
	t.Helper()
	key := process.NewKey(t).Signer
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: end.Add(-2 * time.Hour), NotAfter: end, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root = filepath.Join(t.TempDir(), "root.pem")
	process.Write(t, root, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})))
	pb.RegisterIstioCertificateServiceServer(server, api)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return listener.Addr().String(), root
}

// TestFetchGivesNothingToAServerThatDoesNotProveItself, and waits for it only when a clock may be the reason.
func TestFetchGivesNothingToAServerThatDoesNotProveItself(t *testing.T) {
	t.Parallel()
	token := filepath.Join(t.TempDir(), "token")
	process.Write(t, token, "the-token")
	api := &scripted{answers: []codes.Code{codes.PermissionDenied}}
	address, root := serve(t, api)
	_, otherRoot := serve(t, api)
	expired, expiredRoot := serveUntil(t, api, time.Now().Add(-time.Hour))
	for _, c := range []struct {
		address, root, timeout, text string
		again                        bool
	}{
		{address, otherRoot, "10m", "certificate signed by unknown authority", false},
		{strings.Replace(address, "127.0.0.1", "localhost", 1), root, "10m", "is the name among its csr.serverNames?", false},
		{expired, expiredRoot, "1s", "certificate has expired or is not yet valid", true},
	} {
		said := launch(t, nil, "svid", "fetch", "--server", c.address, "--root", c.root, "--token-file", token, "--out", t.TempDir(), "--timeout", c.timeout).wait(t, 1)
		if !strings.Contains(said, c.text) || strings.Contains(said, "trying again") != c.again {
			t.Errorf("%s under %s: it says %s", c.address, c.root, said)
		}
	}
	api.mu.Lock()
	defer api.mu.Unlock()
	if len(api.calls) != 0 {
		t.Errorf("the server was asked: %q", api.calls)
	}
}

// TestFetchWaitsForItsTokenNoLongerThanItsTimeout: whoever holds the other end of the pipe may never write.
func TestFetchWaitsForItsTokenNoLongerThanItsTimeout(t *testing.T) {
	t.Parallel()
	stdin, held, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	v := launch(t, stdin, "svid", "fetch", "--token-file", "-", "--out", filepath.Join(t.TempDir(), "svid"), "--timeout", "1s")
	if said := v.wait(t, 1); said != "kedge: reading the token: standard input did not come to its end: not within 1s (--timeout)\n" {
		t.Errorf("it says %s", said)
	}
	// A token that ends only after a while is as good as any.
	k := process.New(t, "")
	k.Start(t)
	late, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "svid")
	v = launch(t, late, "svid", "fetch", "--config", k.Config, "--token-file", "-", "--out", out, "--timeout", "10m")
	for _, part := range strings.SplitAfter(process.Read(t, tokenFile(t, k)), ".") {
		if _, err := writer.WriteString(part); err != nil {
			t.Fatal(err)
		}
	}
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	v.wait(t, 0)
	checkPair(t, out)
}

// TestAnInterruptedFetchFails, wherever it is: before its token, and between two tries.
func TestAnInterruptedFetchFails(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pipe, out := filepath.Join(dir, "pipe"), filepath.Join(dir, "svid")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	v := launch(t, nil, "svid", "fetch", "--token-file", pipe, "--out", out, "--timeout", "10m")
	var writer *os.File
	process.Eventually(t, "the command to open its token file", func() (err error) {
		writer, err = os.OpenFile(pipe, os.O_WRONLY|syscall.O_NONBLOCK, 0) // fails for as long as nobody reads
		return err
	})
	defer writer.Close()
	v.signal(t, syscall.SIGINT)
	if said := v.wait(t, 1); said != "kedge: reading the token: "+pipe+" did not come to its end: interrupt signal received\n" {
		t.Errorf("it says %s", said)
	}

	token := filepath.Join(dir, "token")
	process.Write(t, token, "the-token")
	address, root := serve(t, &scripted{answers: []codes.Code{codes.Unavailable}})
	v = launch(t, nil, "svid", "fetch", "--server", address, "--root", root, "--token-file", token, "--out", out, "--timeout", "10m")
	v.awaitLog(t, "trying again")
	v.signal(t, syscall.SIGTERM)
	if said := v.wait(t, 1); !strings.Contains(said, "\nkedge: the CA at "+address+" gave no SVID: terminated signal received; tries: ") ||
		!strings.Contains(said, ", the last one: as the test wants it. ") {
		t.Errorf("it says %s", said)
	}
}

// forged is a CSR API that certifies whatever it is asked for, and sends a bundle of the test's choice.
type forged struct {
	pb.UnimplementedIstioCertificateServiceServer
	root   *x509.Certificate
	key    crypto.Signer
	bundle string
	end    time.Time // of the certificates
}

func newRoot(t *testing.T, name string) (root *x509.Certificate, key crypto.Signer) {
	t.Helper()
	key = process.NewKey(t).Signer
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(3 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if root, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return root, key
}

func inPEM(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func (f *forged) CreateCertificate(_ context.Context, request *pb.IstioCertificateRequest) (*pb.IstioCertificateResponse, error) {
	block, _ := pem.Decode([]byte(request.GetCsr()))
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), URIs: []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/default/sa/web"}},
		NotBefore: f.end.Add(-time.Hour), NotAfter: f.end, KeyUsage: x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, template, f.root, csr.PublicKey, f.key)
	if err != nil {
		return nil, err
	}
	return &pb.IstioCertificateResponse{CertChain: []string{inPEM(der), f.bundle}}, nil
}

// TestFetchReplacesNothingByAnSVIDThatItsBundleDoesNotBearOut: the server has proved itself, and what it sends is of no use.
func TestFetchReplacesNothingByAnSVIDThatItsBundleDoesNotBearOut(t *testing.T) {
	t.Parallel()
	root, key := newRoot(t, "its root")
	other, _ := newRoot(t, "another root")
	token, out := filepath.Join(t.TempDir(), "token"), filepath.Join(t.TempDir(), "svid")
	process.Write(t, token, "the-token")
	fetch := func(bundle string, end time.Time, code int) string {
		address, serverRoot := serve(t, &forged{root: root, key: key, bundle: bundle, end: end})
		return launch(t, nil, "svid", "fetch", "--server", address, "--root", serverRoot, "--token-file", token, "--out", out).wait(t, code)
	}
	soon := time.Now().Add(30 * time.Minute)
	fetch(inPEM(root.Raw), soon.Add(time.Hour), 0) // it begins later: a machine's clock may be late
	before, err := atomicfile.ReadSet(out, istio.ChainFile, istio.KeyFile, istio.RootFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		bundle string
		end    time.Time
		reason string
	}{
		{inPEM(other.Raw), soon, "certificate signed by unknown authority"},
		{"no PEM", soon, "no PEM blocks found"},
		{inPEM(root.Raw), time.Now().Add(-time.Minute), "certificate has expired or is not yet valid"},
	} {
		said := fetch(c.bundle, c.end, 1)
		if !strings.Contains(said, " sent is not used, and "+out+" is as it was: it does not verify under the trust bundle that came with it (") || !strings.Contains(said, c.reason) {
			t.Errorf("it says %s", said)
		}
		after, err := atomicfile.ReadSet(out, istio.ChainFile, istio.KeyFile, istio.RootFile)
		if err != nil || !maps.EqualFunc(before, after, bytes.Equal) {
			t.Errorf("%s: the files have changed (%v)", c.reason, err)
		}
	}
}
