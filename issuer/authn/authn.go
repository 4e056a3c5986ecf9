// Package authn finds out who is asking: it turns what a call brought (bearer token, client certificate) into a ca.Caller, or a refusal
// whose full reason is for the log.
//
// Begin with New, let Run keep the keys of the token issuers fresh, and ask Authenticate for each call.
package authn

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
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
	Logger       *slog.Logger
}

const defaultSkew = 30 * time.Second

// Authenticator knows who is asking. Its methods may be called at once from several goroutines.
type Authenticator struct {
	td           spiffeid.TrustDomain
	issuers      map[string]*issuer // by "iss"
	join         *JoinTokens
	certificates CertificateVerifier
	skew         time.Duration
	now          func() time.Time
	log          *slog.Logger
}

// New checks the configuration. It asks no issuer for anything: one that is away is no reason not to start.
func New(o Options) (*Authenticator, error) {
	a := &Authenticator{td: o.TrustDomain, issuers: map[string]*issuer{}, join: o.Join, certificates: o.Certificates, skew: o.Skew, now: o.Now, log: o.Logger}
	if a.skew == 0 {
		a.skew = defaultSkew
	}
	if a.now == nil {
		a.now = time.Now
	}
	names := map[string]bool{}
	for _, c := range o.Issuers {
		i, err := newIssuer(c, a, o.CacheDir)
		if err != nil {
			return nil, fmt.Errorf("token issuer %q: %w", c.Name, err)
		}
		if a.issuers[c.Issuer] != nil || c.Issuer == joinIssuer {
			return nil, fmt.Errorf("token issuer %q: the issuer %q is taken: tokens are told apart by it", c.Name, c.Issuer)
		}
		if names[c.Name] {
			return nil, fmt.Errorf("token issuer %q: there are two of that name", c.Name)
		}
		a.issuers[c.Issuer], names[c.Name] = i, true
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
}

// Authenticate says who is asking. A token and a certificate must agree; if one of them is invalid the other counts, and the log says so.
// Errors are ca.ErrUnauthenticated, ca.ErrDenied, or ca.ErrUnavailable when it cannot be known now; none contains a token.
func (a *Authenticator) Authenticate(ctx context.Context, c Credentials) (ca.Caller, error) {
	caller := ca.Caller{Peer: c.Peer, ClusterID: c.ClusterID}
	if len(c.Tokens) == 0 && (len(c.Certificates) == 0 || a.certificates == nil) {
		return caller, ca.Unauthenticated(errors.New("the call brought neither a token nor a client certificate that counts"))
	}
	var token *proven
	var certificate *ca.ClientCertificate
	var tokenErr, certErr error
	if len(c.Tokens) > 0 {
		token, tokenErr = a.token(ctx, c.Tokens)
	}
	if len(c.Certificates) > 0 && a.certificates != nil {
		var verified ca.ClientCertificate
		if verified, certErr = a.certificates.Verify(ctx, c.Certificates); certErr == nil {
			certificate = &verified
		}
	}
	switch {
	case token == nil && certificate == nil:
		return caller, refusal(tokenErr, certErr)
	case token != nil && certificate != nil && token.id != certificate.ID:
		return caller, ca.Denied(fmt.Errorf("the token is for %s and the client certificate for %s", token.id, certificate.ID))
	case tokenErr != nil:
		a.log.Warn("the token does not count, the client certificate does", "request_id", c.RequestID, "spiffe_id", certificate.ID, "reason", tokenErr, "peer", c.Peer)
	case certErr != nil:
		a.log.Warn("the client certificate does not count, the token does", "request_id", c.RequestID, "spiffe_id", token.id, "reason", certErr, "peer", c.Peer)
	}
	if certificate != nil {
		caller.ID, caller.Proofs, caller.First, caller.Holder = certificate.ID, []ledger.Proof{certificate.Proof}, certificate.First, certificate.Holder
		if certificate.Own && certificate.Number > 0 {
			caller.Presented = &ca.Presented{Number: certificate.Number, Serial: certificate.Serial}
			caller.Replaces = certificate.Number
		} else if token == nil {
			a.log.Info("the ledger does not know where the lineage of a client certificate began", "request_id", c.RequestID, "spiffe_id", caller.ID, "serial", certificate.Serial)
		}
	}
	if token != nil {
		caller.ID, caller.Holder, caller.JoinToken, caller.IssuedAt = token.id, token.holder, token.join, token.issuedAt
		caller.Proofs = append([]ledger.Proof{token.proof}, caller.Proofs...)
		caller.First = &token.proof
	}
	return caller, nil
}

// refusal joins why neither counted. What may work later is Unavailable, what is known and forbidden is Denied.
func refusal(errs ...error) error {
	err := errors.Join(errs...)
	switch {
	case errors.Is(err, ca.ErrUnavailable), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return ca.Unavailable(errors.New(err.Error()))
	case errors.Is(err, ca.ErrDenied):
		return ca.Denied(errors.New(err.Error()))
	}
	return ca.Unauthenticated(errors.New(err.Error()))
}

// Run keeps the issuers' keys fresh until ctx ends.
func (a *Authenticator) Run(ctx context.Context) error {
	done := make(chan struct{})
	for _, i := range a.issuers {
		go func() {
			i.keys.run(ctx)
			done <- struct{}{}
		}()
	}
	for range a.issuers {
		<-done
	}
	return nil
}

// Problems says which issuers are away, and what that means.
func (a *Authenticator) Problems() []string {
	var all []string
	for _, i := range a.issuers {
		if problem := i.keys.problem(); problem != "" {
			all = append(all, fmt.Sprintf("token issuer %q: %s", i.name, problem))
		}
	}
	return all
}
