// Package serving keeps the certificate with which this CA's TLS servers prove themselves: issued by the CA itself, renewed
// at half of its life and whenever another issuing CA takes over, without a restart.
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
	firstRetry = time.Second // wait after a failed renewal, doubled up to …
	maxRetry   = time.Minute
	callLimit  = 30 * time.Second // how long one renewal may take
)

// Certificate is the serving certificate of now.
type Certificate struct {
	ca      *ca.CA
	names   []string
	ttl     time.Duration
	log     *slog.Logger
	current atomic.Pointer[held]
}

// held is a certificate with what it takes to know when the next one is due.
type held struct {
	tls       *tls.Certificate
	authority ledger.Hash
	renew     time.Time
}

// New gets the first certificate for names (DNS names and IPs).
func New(ctx context.Context, c *ca.CA, names []string, ttl time.Duration, log *slog.Logger) (*Certificate, error) {
	if len(names) == 0 {
		return nil, errors.New("a serving certificate needs at least one DNS name or IP")
	}
	s := &Certificate{ca: c, names: names, ttl: ttl, log: log}
	if err := s.renew(ctx); err != nil {
		return nil, fmt.Errorf("getting the serving certificate: %w", err)
	}
	return s, nil
}

// TLS is the configuration for a server: TLS 1.2 with ECDHE and AES-GCM, and 1.3. Client certificates are asked for and not verified: a
// handshake that failed over a client's stale certificate would lock out a client whose token is good, so that is each call's business.
func (s *Certificate) TLS() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		CipherSuites:   []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384}, // of 1.2; 1.3 has its own
		ClientAuth:     tls.RequestClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.current.Load().tls, nil },
	}
}

// NotAfter is when the certificate of now expires.
func (s *Certificate) NotAfter() time.Time { return s.current.Load().tls.Leaf.NotAfter }

// Run renews the certificate until ctx ends. While a renewal fails the old one is served.
func (s *Certificate) Run(ctx context.Context) error {
	wait := firstRetry
	var failed bool
	for {
		changed, now := s.ca.Changed(), s.current.Load()
		due := max(time.Until(now.renew), 0)
		if failed {
			due = wait
			wait = min(2*wait, maxRetry)
		}
		timer := time.NewTimer(due)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-changed:
			timer.Stop()
			if !failed && s.signedByActive(now) {
				continue
			}
		case <-timer.C:
		}
		call, cancel := context.WithTimeout(ctx, callLimit)
		err := s.renew(call)
		cancel()
		switch {
		case err != nil && !failed:
			s.log.Error("renewing the serving certificate failed and is tried again", "error", err, "served_until", s.NotAfter())
		case err == nil:
			s.log.Info("serving certificate renewed", "not_after", s.NotAfter())
			wait = firstRetry
		}
		failed = err != nil
	}
}

// signedByActive says whether the issuing CA that signed it still signs.
func (s *Certificate) signedByActive(h *held) bool {
	active, ok := s.ca.Active()
	return ok && active == h.authority
}

func (s *Certificate) renew(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("making its key: %w", err)
	}
	issued, err := s.ca.IssueServing(ctx, key.Public(), s.names, s.ttl)
	if err != nil {
		return err
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
	now := time.Now()
	s.current.Store(&held{tls: certificate, authority: issued.Authority, renew: now.Add(issued.NotAfter.Sub(now) / 2)})
	return nil
}
