package main

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	pb "istio.io/api/security/v1alpha1"
)

// inFlight is how many callers there are when the cost of a call is measured, each on a connection of its own, and each with one call under way at every
// moment: as so many istio-agents would have them.
const inFlight = 64

// validity is what istio-agents ask for, in seconds.
const validity = 86400

// caller is a connection to the CSR API.
type caller struct {
	conn *grpc.ClientConn
	api  pb.IstioCertificateServiceClient
}

// dial prepares a connection; it is made with the first call. certificate, if not nil, proves the caller.
func (s *server) dial(certificate *tls.Certificate) (*caller, error) {
	config := &tls.Config{RootCAs: s.roots, MinVersion: tls.VersionTLS13}
	if certificate != nil {
		config.Certificates = []tls.Certificate{*certificate}
	}
	conn, err := grpc.NewClient("passthrough:///"+s.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		return nil, err
	}
	return &caller{conn, pb.NewIstioCertificateServiceClient(conn)}, nil
}

// ask makes a call. An answer has a leaf, an issuing CA and a bundle.
func (c *caller) ask(ctx context.Context, r request) ([]string, error) {
	if r.token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+r.token)
	}
	answer, err := c.api.CreateCertificate(ctx, &pb.IstioCertificateRequest{Csr: r.csr, ValidityDuration: validity})
	if err != nil {
		return nil, err
	}
	if n := len(answer.GetCertChain()); n != 3 {
		return nil, fmt.Errorf("the answer has %d elements: there are a leaf, an issuing CA and a root", n)
	}
	return answer.GetCertChain(), nil
}

// check makes sure that an answer is what a workload can use: it counts nothing that is fast and wrong.
func check(r request, chain []string, roots *x509.CertPool) error {
	var certs []*x509.Certificate
	for _, element := range chain[:2] {
		block, _ := pem.Decode([]byte(element))
		if block == nil {
			return errors.New("an element of the chain is not PEM")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return err
		}
		certs = append(certs, cert)
	}
	between := x509.NewCertPool()
	between.AddCert(certs[1])
	if _, err := certs[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return err
	}
	block, _ := pem.Decode([]byte(r.csr))
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return err
	}
	if key, ok := csr.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !key.Equal(certs[0].PublicKey) {
		return errors.New("the certificate is for another key than the CSR's")
	}
	if len(certs[0].URIs) != 1 || certs[0].URIs[0].Host != trustDomain {
		return fmt.Errorf("the certificate is for %v", certs[0].URIs)
	}
	return nil
}

// closed makes n calls, so many at a time, each as soon as one before it is answered. ask is told which of those at a time it is, and which of n. The
// first error ends it.
func closed(ctx context.Context, atOnce, n int, ask func(ctx context.Context, slot, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var running sync.WaitGroup
	for slot := range atOnce {
		running.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n || ctx.Err() != nil {
					return
				}
				if err := ask(ctx, slot, i); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	running.Wait()
	return context.Cause(ctx)
}

// crew are callers with long-lived connections, which are made. Without certificates they bring tokens.
func (s *server) crew(ctx context.Context, n int, certificates []*tls.Certificate) (callers []*caller, release func(), err error) {
	callers = make([]*caller, n)
	release = func() {
		for _, c := range callers {
			if c != nil {
				_ = c.conn.Close() // nothing is under way
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err = closed(ctx, inFlight, n, func(ctx context.Context, _, i int) (err error) {
		var certificate *tls.Certificate
		if len(certificates) > 0 {
			certificate = certificates[i%len(certificates)]
		}
		if callers[i], err = s.dial(certificate); err != nil {
			return err
		}
		conn := callers[i].conn
		for conn.Connect(); ; {
			state := conn.GetState()
			if state == connectivity.Ready {
				return nil
			}
			if !conn.WaitForStateChange(ctx, state) {
				return fmt.Errorf("connecting to %s, which is %s: %w", s.name, state, ctx.Err())
			}
		}
	})
	if err != nil {
		release()
		return nil, nil, err
	}
	return callers, release, nil
}

// outcome is how an open loop went.
type outcome struct {
	offered  int
	answered []answer
	refused  map[codes.Code]int
	lag      []time.Duration // by which the generator sent each call later than it should have
}

// answer is a certificate that came.
type answer struct {
	at   time.Duration // since the beginning of the load
	took time.Duration // since the moment at which the call was due
}

// open makes calls at a rate for so long, whether or not those before are answered: at random moments, as a crowd does (a Poisson process,
// the same at each run). A call that waits for the generator counts from when it was due. drain is how long it waits for the last answers.
func open(ctx context.Context, callers []*caller, rate float64, d, drain time.Duration, next func() request) outcome {
	ctx, cancel := context.WithTimeout(ctx, d+drain)
	defer cancel()
	o := outcome{refused: map[codes.Code]int{}}
	random := rand.New(rand.NewPCG(1, 2))
	var mu sync.Mutex
	var running sync.WaitGroup
	timer := time.NewTimer(0)
	defer timer.Stop()
	began := time.Now()
	for due := time.Duration(0); due < d && ctx.Err() == nil; due += time.Duration(random.ExpFloat64() / rate * float64(time.Second)) {
		if wait := due - time.Since(began); wait > 0 {
			timer.Reset(wait)
			<-timer.C
		}
		c, r := callers[o.offered%len(callers)], next()
		o.offered++
		o.lag = append(o.lag, time.Since(began)-due)
		running.Go(func() {
			_, err := c.ask(ctx, r)
			at := time.Since(began)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				o.refused[status.Code(err)]++
				return
			}
			o.answered = append(o.answered, answer{at, at - due})
		})
	}
	running.Wait()
	return o
}
