// Package serving keeps the certificate with which this CA's TLS servers prove themselves: issued by the CA itself, renewed
// at half of its life and whenever another issuing CA takes over, without a restart. A CA that cannot issue one, since its disk is full or
// its root is away, has none at first: handshakes fail until there is one, and everything that needs none goes on.
package serving

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"kedge/ca"
	"kedge/ca/ledger"
)

const (
	tick      = time.Minute      // how often, at least, it is looked whether a renewal is due: the clock may be set in between
	pause     = time.Second      // between two tries, whatever happens; after failed ones it is doubled, up to …
	maxPause  = 10 * time.Second // … which is short, since without a certificate nobody is served
	callLimit = 30 * time.Second // how long one renewal may take
)

// Certificate is the serving certificate of now.
type Certificate struct {
	ca      *ca.CA
	names   []string
	ttl     time.Duration
	log     *slog.Logger
	current atomic.Pointer[held]
	retry   time.Duration // wait after the next failure; used by one goroutine
}

// held is a certificate with what it takes to know when the next one is due. It is never changed, only replaced.
type held struct {
	tls       *tls.Certificate // nil while there is none
	authority ledger.Hash      // that signed it
	renew     time.Time        // when half of its life is over
	failed    error            // why there is none
}

// New tries for the first certificate for names (DNS names and IPs). When there is none to be had that is one of the CA's problems, and Run
// tries again.
func New(ctx context.Context, c *ca.CA, names []string, ttl time.Duration, log *slog.Logger) (*Certificate, error) {
	if len(names) == 0 {
		return nil, errors.New("a serving certificate needs at least one DNS name or IP")
	}
	s := &Certificate{ca: c, names: names, ttl: ttl, log: log, retry: pause}
	s.current.Store(&held{})
	s.look(ctx)
	return s, nil
}

// TLS is the configuration for a server: TLS 1.2 with ECDHE and AES-GCM, and 1.3. Client certificates are asked for and not verified: a
// handshake that failed over a client's stale certificate would lock out a client whose token is good, so that is each call's business.
func (s *Certificate) TLS() *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384}, // of 1.2; 1.3 has its own
		ClientAuth:   tls.RequestClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if h := s.current.Load(); h.tls != nil {
				return h.tls, nil
			}
			return nil, errors.New("there is no serving certificate yet")
		},
	}
}

// Ready says why no client can connect, and nil when they can.
func (s *Certificate) Ready() error {
	h, now := s.current.Load(), s.ca.Now()
	switch {
	case h.tls == nil:
		return fmt.Errorf("there is no serving certificate yet, so that no client can connect: %w", h.failed)
	case now.Before(h.tls.Leaf.NotBefore):
		return fmt.Errorf("the serving certificate is valid from %s on, and this machine's clock says %s: no client can connect",
			h.tls.Leaf.NotBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case now.After(h.tls.Leaf.NotAfter):
		return fmt.Errorf("the serving certificate expired at %s, so that no client can connect", h.tls.Leaf.NotAfter.Format(time.RFC3339))
	}
	return nil
}

// NotAfter is when the certificate of now expires; zero while there is none.
func (s *Certificate) NotAfter() time.Time {
	if h := s.current.Load(); h.tls != nil {
		return h.tls.Leaf.NotAfter
	}
	return time.Time{}
}

// Run renews the certificate until ctx ends. While a renewal fails the old one is served.
func (s *Certificate) Run(ctx context.Context) error {
	for {
		changed := s.ca.Changed() // asked for before looking, so that no change is lost
		least, most := s.look(ctx)
		if !wait(ctx, least, nil) || !wait(ctx, most-least, changed) {
			return nil
		}
	}
}

// wait waits for d, or until changed is closed; false says that ctx has ended.
func wait(ctx context.Context, d time.Duration, changed <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-changed:
	case <-timer.C:
	}
	return true
}

// look renews the certificate if that is due. It returns how long to wait until the next look: least whatever happens, most when nothing changes.
func (s *Certificate) look(ctx context.Context) (least, most time.Duration) {
	const about = "serving certificate"
	h, now := s.current.Load(), s.ca.Now()
	if !s.due(h, now) {
		s.ca.Note(about, nil)
		s.retry = pause
		return 0, min(tick, h.renew.Sub(now))
	}
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	err := s.renew(ctx)
	s.ca.Note(about, err)
	if err != nil {
		if h.tls == nil {
			s.current.Store(&held{failed: err})
		}
		most, s.retry = s.retry, min(2*s.retry, maxPause)
		return pause, most
	}
	s.retry = pause
	s.log.Info("there is a new serving certificate", "not_after", s.NotAfter())
	return pause, pause
}

// due says whether h is to be replaced: there is none, half of its life is over, another issuing CA signs, or it was made while the clock was ahead.
func (s *Certificate) due(h *held, now time.Time) bool {
	active, ok := s.ca.Active()
	return h.tls == nil || !now.Before(h.renew) || ok && active != h.authority || now.Before(h.tls.Leaf.NotBefore)
}

func (s *Certificate) renew(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("making its key: %w", err)
	}
	issued, err := s.ca.IssueServing(ctx, key.Public(), s.names, s.ttl)
	if err != nil {
		return fmt.Errorf("issuing it: %w", err)
	}
	leaf, err := x509.ParseCertificate(issued.DER)
	if err != nil {
		return fmt.Errorf("parsing it: %w", err)
	}
	certificate := &tls.Certificate{PrivateKey: key, Leaf: leaf}
	for _, link := range issued.Chain {
		block, _ := pem.Decode([]byte(link))
		certificate.Certificate = append(certificate.Certificate, block.Bytes)
	}
	now := s.ca.Now()
	s.current.Store(&held{tls: certificate, authority: issued.Authority, renew: now.Add(issued.NotAfter.Sub(now) / 2)})
	return nil
}
