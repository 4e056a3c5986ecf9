package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"path/filepath"
	"time"
)

// scenario is a way to ask for a certificate.
type scenario struct {
	name         string
	certificates bool    // callers prove themselves with client certificates; else with tokens
	connect      bool    // each call is made on a connection of its own
	share        float64 // of what it may cost at most of what Istio's costs
	over         float64 // µs that it may cost at most over bare cryptography; 0: any
	bare         []string
}

var (
	byToken       = scenario{name: "token", share: 0.6, over: 120, bare: []string{bareToken}}
	byCertificate = scenario{name: "client certificate", certificates: true, share: 0.6, over: 120, bare: []string{bareChain}}
	byConnection  = scenario{name: "token, new TLS connection", connect: true, share: 0.75, bare: []string{bareToken, bareHandshake}}
	scenarios     = []scenario{byToken, byCertificate, byConnection}
)

// measured is one measurement of a server.
type measured struct {
	cpu     float64 // µs of the server's CPU time a certificate
	rate    float64 // certificates a second
	commits commits // of Kedge
}

// costOf measures a scenario: a tenth of the calls first, to warm up, and then all.
func (b *bench) costOf(ctx context.Context, s *server, sc scenario, kind string, certificates []*tls.Certificate) (m measured, err error) {
	n := b.calls
	if sc.connect {
		n /= 2
	}
	warmUp, err := b.crowd.take(kind, n/10, !sc.certificates)
	if err != nil {
		return m, err
	}
	requests, err := b.crowd.take(kind, n, !sc.certificates)
	if err != nil {
		return m, err
	}
	ask, release, err := s.asking(ctx, sc, certificates)
	if err != nil {
		return m, err
	}
	defer release()
	failed := func(err error) (measured, error) {
		return m, fmt.Errorf("%s, %s, %s: %w\n%s", s.name, sc.name, kind, err, s.tail())
	}
	err = closed(ctx, inFlight, len(warmUp), func(ctx context.Context, slot, i int) error {
		chain, err := ask(ctx, slot, warmUp[i])
		if err == nil {
			err = check(warmUp[i], chain, s.roots)
		}
		return err
	})
	if err != nil {
		return failed(err)
	}
	var before commits
	if s.operations != "" {
		if before, err = s.commits(ctx); err != nil {
			return failed(err)
		}
	}
	cpuBefore, err := s.cpu()
	if err != nil {
		return failed(err)
	}
	began := time.Now()
	err = closed(ctx, inFlight, len(requests), func(ctx context.Context, slot, i int) error {
		_, err := ask(ctx, slot, requests[i])
		return err
	})
	if err != nil {
		return failed(err)
	}
	took := time.Since(began)
	cpuAfter, err := s.cpu()
	if err != nil {
		return failed(err)
	}
	if s.operations != "" {
		after, err := s.commits(ctx)
		if err != nil {
			return failed(err)
		}
		m.commits = after.since(before)
	}
	m.cpu, m.rate = micros(cpuAfter-cpuBefore)/float64(n), float64(n)/took.Seconds()
	return m, nil
}

// asking connects the callers of a scenario, and says how one of them asks.
func (s *server) asking(ctx context.Context, sc scenario, certificates []*tls.Certificate) (ask func(ctx context.Context, slot int, r request) ([]string, error), release func(), err error) {
	if sc.connect {
		return func(ctx context.Context, _ int, r request) ([]string, error) {
			c, err := s.dial(nil)
			if err != nil {
				return nil, err
			}
			defer c.conn.Close()
			return c.ask(ctx, r)
		}, func() {}, nil
	}
	if !sc.certificates {
		certificates = nil
	}
	callers, release, err := s.crew(ctx, inFlight, certificates)
	return func(ctx context.Context, slot int, r request) ([]string, error) { return callers[slot].ask(ctx, r) }, release, err
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// enrol gets client certificates from a server by tokens.
func (b *bench) enrol(ctx context.Context, s *server) ([]*tls.Certificate, error) {
	requests, err := b.crowd.take(keyP256, inFlight, true)
	if err != nil {
		return nil, err
	}
	c, err := s.dial(nil)
	if err != nil {
		return nil, err
	}
	defer c.conn.Close()
	var certificates []*tls.Certificate
	for i, r := range requests {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		if r.csr, err = newCSR(key, i); err != nil {
			return nil, err
		}
		chain, err := c.ask(ctx, r)
		if err != nil {
			return nil, fmt.Errorf("%s: %w\n%s", s.name, err, s.tail())
		}
		certificate, err := tlsCertificate(key, chain[:2])
		if err != nil {
			return nil, err
		}
		certificates = append(certificates, certificate)
	}
	return certificates, nil
}

// costRound is what one round measured, by scenario and kind of key.
type costRound struct {
	kedge, istio map[[2]string]measured
	bare, other  map[string]float64 // µs, on the server's core and on the other one
}

// smallLedger is how many records the ledger has when a call's cost is measured.
const smallLedger = 1000

// costs measures what a certificate costs, in Kedge, in Istio's CA server, and at least.
func (b *bench) costs(ctx context.Context) (string, error) {
	kedgeDir, istioDir := filepath.Join(b.dir, "kedge"), filepath.Join(b.dir, "istio")
	kedgeCerts, err := fill(ctx, dataFolder(kedgeDir), smallLedger, 0)
	if err != nil {
		return "", err
	}
	if err := b.prepareIstio(istioDir); err != nil {
		return "", err
	}
	var istioCerts []*tls.Certificate
	var rounds []costRound
	for round := range b.rounds {
		b.progress("cost of a call: round %d of %d", round+1, b.rounds)
		r, err := b.costRound(ctx, round, kedgeDir, istioDir, kedgeCerts, &istioCerts)
		if err != nil {
			return "", err
		}
		rounds = append(rounds, r)
	}
	return costTables(rounds), nil
}

func (b *bench) costRound(ctx context.Context, round int, kedgeDir, istioDir string, kedgeCerts []*tls.Certificate, istioCerts *[]*tls.Certificate) (r costRound, err error) {
	r = costRound{kedge: map[[2]string]measured{}, istio: map[[2]string]measured{}}
	if r.bare, r.other, err = b.measureBare(ctx); err != nil {
		return r, err
	}
	kedge, err := b.startKedge(ctx, b.kedge, kedgeDir)
	if err != nil {
		return r, err
	}
	defer stopped(kedge, &err)
	istio, err := b.startIstio(ctx, istioDir)
	if err != nil {
		return r, err
	}
	defer stopped(istio, &err)
	if *istioCerts == nil {
		b.crowd.used = mark{}
		if *istioCerts, err = b.enrol(ctx, istio); err != nil {
			return r, err
		}
	}
	b.crowd.used = mark{}
	turns := []struct {
		server       *server
		certificates []*tls.Certificate
		into         map[[2]string]measured
	}{{kedge, kedgeCerts, r.kedge}, {istio, *istioCerts, r.istio}}
	for _, sc := range scenarios {
		for _, kind := range keyKinds {
			used := b.crowd.used
			for turn := range turns {
				t := turns[(turn+round)%len(turns)]
				b.crowd.used = used // each sees the same requests
				if t.into[[2]string{sc.name, kind}], err = b.costOf(ctx, t.server, sc, kind, t.certificates); err != nil {
					return r, err
				}
			}
		}
	}
	return r, nil
}

// stopped stops a server at the end of a function that returns err.
func stopped(s *server, err *error) {
	if stopErr := s.stop(); stopErr != nil && *err == nil {
		*err = stopErr
	}
}
