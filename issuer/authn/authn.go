// Package authn finds out who is asking: it turns what a call brought (bearer token, client certificate) into a ca.Caller, or a refusal
// whose full reason is for the log.
//
// Begin with New, let Run fetch the keys of the token issuers and keep them fresh, and ask Authenticate for each call.
//
// Tokens are checked here, with keys that were fetched before: no issuer is asked about a single token. An issuer that cannot be reached
// keeps its last keys, also over a restart; while it never had any, its tokens are ca.ErrUnavailable rather than refused for good.
package authn

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/ledger"
)

// Credentials is what a call brought.
type Credentials struct {
	Tokens       []string            // the values of its authorization headers, as they came
	Certificates []*x509.Certificate // of the TLS peer, leaf first, not verified
	Peer         string              // network address
	ClusterID    string              // the caller's own word
	RequestID    string              // as in the logs
	// Aside, if set, is called before the call is kept waiting for an issuer's keys, so that it gives its turn to others. What it returns takes the turn back.
	Aside func() (back func(context.Context) error)
}

// CertificateVerifier decides about client certificates. *ca.ClientCertificates is one.
type CertificateVerifier interface {
	Verify(ctx context.Context, chain []*x509.Certificate) (ca.ClientCertificate, error)
}

// Options says whose word counts.
type Options struct {
	TrustDomain  spiffeid.TrustDomain
	Issuers      []IssuerConfig
	Join         *JoinTokens         // nil: no join tokens
	Certificates CertificateVerifier // nil: no client certificates
	Skew         time.Duration       // how far the clocks of issuers may be off; default 30 s
	CacheDir     string              // where the last keys of each issuer are kept for a start while it is away; "": nowhere
	Now          func() time.Time    // default time.Now
	Logger       *slog.Logger        // default: nothing is logged
}

const (
	defaultSkew = 30 * time.Second
	maxSkew     = 5 * time.Minute // more would let expired tokens count for as long
	maxOwnWord  = 256             // octets of what a caller says of itself
)

// Authenticator knows who is asking. Its methods may be called at once from several goroutines.
type Authenticator struct {
	td           spiffeid.TrustDomain
	issuers      map[string]*issuer // by "iss"
	order        []*issuer          // as configured
	join         *JoinTokens
	certificates CertificateVerifier
	skew         time.Duration
	now          func() time.Time
	log          *slog.Logger
}

// New checks the configuration, and takes up the keys that an earlier run kept. It asks no issuer for anything: one that is away is
// no reason not to start.
func New(o Options) (*Authenticator, error) {
	a := &Authenticator{td: o.TrustDomain, issuers: map[string]*issuer{}, join: o.Join, certificates: o.Certificates, skew: o.Skew, now: o.Now, log: o.Logger}
	if a.td.IsZero() {
		return nil, errors.New("there is no trust domain")
	}
	if a.skew == 0 {
		a.skew = defaultSkew
	}
	if a.skew < 0 || a.skew > maxSkew {
		return nil, fmt.Errorf("the clock skew %s is not between 0 and %s", a.skew, maxSkew)
	}
	if a.now == nil {
		a.now = time.Now
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	names := map[string]bool{}
	for _, c := range o.Issuers {
		i, err := newIssuer(c, a, o.CacheDir)
		if err != nil {
			return nil, fmt.Errorf("token issuer %.80q: %w", c.Name, err)
		}
		if a.issuers[c.Issuer] != nil || c.Issuer == joinIssuer {
			return nil, fmt.Errorf("token issuer %q: the issuer %q is taken: tokens are told apart by it", c.Name, c.Issuer)
		}
		if names[c.Name] {
			return nil, fmt.Errorf("token issuer %q: there are two of that name", c.Name)
		}
		a.issuers[c.Issuer], names[c.Name] = i, true
		a.order = append(a.order, i)
	}
	return a, nil
}

// proven is what one credential proved.
type proven struct {
	id       spiffeid.ID
	proof    ledger.Proof
	holder   ledger.Holder
	join     string    // id of the join token
	issuedAt time.Time // of a token from outside
	until    time.Time // when the token stops being a proof
}

// Authenticate says who is asking. A token and a certificate must agree; if one of them is invalid the other counts, and the log says so.
//
// Every error is one of ca.ErrUnauthenticated, ca.ErrDenied (the credentials are good and contradict each other, or are no longer
// allowed) and ca.ErrUnavailable (it cannot be known now). Its text is for the log and contains no token. The Caller that comes with
// an error has only the network address and the cluster.
func (a *Authenticator) Authenticate(ctx context.Context, c Credentials) (ca.Caller, error) {
	caller := ca.Caller{Peer: ownWord(c.Peer), ClusterID: ownWord(c.ClusterID)}
	presented := len(c.Certificates) > 0 && a.certificates != nil
	if len(c.Tokens) == 0 && !presented {
		return caller, ca.Unauthenticated(errors.New("the call brought neither a token nor a client certificate that could count"))
	}
	var token *proven
	var certificate *ca.ClientCertificate
	var tokenErr, certErr error
	if len(c.Tokens) > 0 {
		token, tokenErr = a.token(ctx, c.Tokens, c.Aside)
	}
	if presented {
		var verified ca.ClientCertificate
		if verified, certErr = a.certificates.Verify(ctx, c.Certificates); certErr == nil {
			certificate = &verified
		}
	}
	switch {
	case token == nil && certificate == nil:
		return caller, refusal(tokenErr, certErr)
	case token != nil && certificate != nil && token.id != certificate.ID:
		return caller, ca.Denied(fmt.Errorf("the token is for %s and the client certificate for %s: a call has one identity", token.id, certificate.ID))
	case tokenErr != nil:
		a.log.Warn("the token does not count, the client certificate does", "request_id", c.RequestID, "spiffe_id", certificate.ID.String(),
			"reason", tokenErr.Error(), "peer", c.Peer)
	case certErr != nil:
		level := slog.LevelWarn
		if errors.Is(certErr, ledger.ErrSuperseded) { // a join token is in two hands
			level = slog.LevelError
		}
		a.log.Log(ctx, level, "the client certificate does not count, the token does", "request_id", c.RequestID, "spiffe_id", token.id.String(),
			"reason", certErr.Error(), "peer", c.Peer)
	}
	if certificate != nil {
		caller.ID, caller.Proofs, caller.First, caller.Holder = certificate.ID, []ledger.Proof{certificate.Proof}, certificate.First, certificate.Holder
		caller.Until = certificate.Until
		if certificate.Own && certificate.Number > 0 {
			caller.Presented = &ca.Presented{Number: certificate.Number, Serial: certificate.Serial}
			caller.Replaces = certificate.Number
		} else {
			a.log.Info("the ledger has no record of this client certificate, so that it is not known where its lineage began", "request_id", c.RequestID,
				"spiffe_id", caller.ID.String(), "serial", certificate.Serial.String(), "own", certificate.Own)
		}
	}
	if token != nil {
		caller.ID, caller.Holder, caller.JoinToken, caller.IssuedAt = token.id, token.holder, token.join, token.issuedAt
		caller.Proofs = append([]ledger.Proof{token.proof}, caller.Proofs...)
		caller.First = &token.proof
		if caller.Until.IsZero() || token.until.Before(caller.Until) {
			caller.Until = token.until
		}
	}
	return caller, nil
}

// ownWord bounds what a caller says of itself, and makes it text that the ledger takes.
func ownWord(text string) string {
	return strings.ToValidUTF8(text[:min(len(text), maxOwnWord)], "\ufffd")
}

// refusal says why nothing counted. When one of two credentials could not be judged now, trying again may help.
func refusal(token, certificate error) error {
	switch {
	case certificate == nil:
		return token
	case token == nil:
		return certificate
	case errors.Is(token, ca.ErrUnavailable):
		return fmt.Errorf("%w; %v", token, certificate)
	case errors.Is(certificate, ca.ErrUnavailable):
		return fmt.Errorf("%v; %w", token, certificate)
	}
	return ca.Unauthenticated(fmt.Errorf("%v; %v", token, certificate)) // of two kinds only this one remains
}

// Run fetches the issuers' keys and keeps them fresh until ctx ends. It is called once. Before it runs, a token whose key is not known
// yet waits; after it ended, such a token is ca.ErrUnavailable.
func (a *Authenticator) Run(ctx context.Context) error {
	var running sync.WaitGroup
	for _, i := range a.order {
		running.Go(func() { i.keys.run(ctx) })
	}
	running.Wait()
	return nil
}

// Problems says which issuers' keys cannot be had, since when, why, and what that means; for people.
func (a *Authenticator) Problems() []string {
	var all []string
	for _, i := range a.order {
		if problem := i.keys.problem(); problem != "" {
			all = append(all, fmt.Sprintf("%q: %s", i.name, problem))
		}
	}
	return all
}

// IssuerStatus is how things stand with one token issuer.
type IssuerStatus struct {
	Name, Kind, Issuer string
	Keys               int       // that can be used now
	Fetched            time.Time // when they were had; zero: never
	FailingSince       time.Time // when the first of the latest failures was; zero: the last fetch was good
	Failure            string    // what the last fetch failed with; "": it was good, or there was none yet
	Fetches, Failures  uint64    // since the start of the process
}

// Issuers says how things stand with each issuer, in the order of the configuration.
func (a *Authenticator) Issuers() []IssuerStatus {
	all := make([]IssuerStatus, 0, len(a.order))
	for _, i := range a.order {
		status := i.keys.status()
		status.Name, status.Kind, status.Issuer = i.name, i.kind, i.issuer
		all = append(all, status)
	}
	return all
}
