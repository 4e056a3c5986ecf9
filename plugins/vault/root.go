package vault

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
)

const (
	defaultIssuer = "default"
	organization  = "Kedge"
	maxCommonName = 64 // characters (RFC 5280 A.1, ub-common-name)
	maxChain      = 10 // certificates from an issuer to its root
)

// RootOptions say which issuer certifies.
type RootOptions struct {
	Client       *Client
	Mount        string           // of the PKI engine; default "pki"
	Issuer       string           // its name or id in the mount; default "default", which is whichever the mount has made its default
	TrustDomain  string           // name without scheme
	PollInterval time.Duration    // how often the mount is asked for its roots, a tenth more or less; default 1 min
	Now          func() time.Time // default time.Now
	Logger       *slog.Logger     // default: nothing is logged
}

// Root is a ca.Root over an issuer of a PKI engine. The root is the self-signed certificate at the end of the issuer's chain; when the issuer is an
// intermediate, it and what stands above it are part of every chain that is handed out.
type Root struct {
	o           RootOptions
	trustDomain spiffeid.TrustDomain
	watch       *watch

	mu   sync.Mutex
	seen []*x509.Certificate // the roots that the watch compares with
}

var (
	_ ca.Root = (*Root)(nil)

	issuerName = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?$`)
)

// OpenRoot checks the options and begins to watch the mount's roots. It asks Vault nothing: see Check. Close ends the watch.
func OpenRoot(o RootOptions) (*Root, error) {
	if o.Client == nil {
		return nil, errors.New("the root in Vault has no login: open a Client first")
	}
	var err error
	if o.Mount, err = checkMount("the PKI engine", o.Mount, "pki"); err != nil {
		return nil, err
	}
	if o.Issuer == "" {
		o.Issuer = defaultIssuer
	}
	if !issuerName.MatchString(o.Issuer) {
		return nil, fmt.Errorf("the issuer %.80q is no name or id of one: 'vault list -detailed %s/issuers' shows them", o.Issuer, o.Mount)
	}
	r := &Root{o: o}
	if r.trustDomain, err = spiffeid.TrustDomainFromString(o.TrustDomain); err != nil {
		return nil, fmt.Errorf("the trust domain %q of the root in Vault: %w", o.TrustDomain, err)
	}
	if r.o.Now == nil {
		r.o.Now = time.Now
	}
	if r.o.Logger == nil {
		r.o.Logger = slog.New(slog.DiscardHandler)
	}
	if r.watch, err = startWatch(o.PollInterval, r.look); err != nil {
		return nil, fmt.Errorf("the root in Vault: %w", err)
	}
	return r, nil
}

// Close ends the watch.
func (r *Root) Close() error { return r.watch.close() }

// Changed receives after the mount's roots have changed.
func (r *Root) Changed() <-chan struct{} { return r.watch.changed }

// Problem says why the roots could not be read when they were last looked at, or else what is wrong with the login, and what to do; nil when all is well.
func (r *Root) Problem() error { return cmp.Or(r.watch.problem(), r.o.Client.Problem()) }

// String names the issuer for people.
func (r *Root) String() string { return fmt.Sprintf("the issuer %s of %s", r.o.Issuer, r.o.Mount) }

// Check asks Vault whether this root can certify now, without certifying: the issuer, its chain, and the permission.
func (r *Root) Check(ctx context.Context) error {
	i, err := r.issuer(ctx)
	if err != nil {
		return err
	}
	return r.o.Client.checkPermissions(ctx, map[string]string{i.path: http.MethodPut})
}

// Roots asks Vault for the root that the issuer chains to.
func (r *Root) Roots(ctx context.Context) ([]*x509.Certificate, error) {
	i, err := r.issuer(ctx)
	if err != nil {
		return nil, err
	}
	roots := []*x509.Certificate{i.root()}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen == nil { // what changes between this and the first look of the watch is a change
		r.seen = roots
	}
	return slices.Clone(roots), nil
}

// look is what the watch does. It says whether the roots have changed.
func (r *Root) look(ctx context.Context) (bool, error) {
	i, err := r.issuer(ctx)
	if err != nil {
		return false, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.seen
	r.seen = []*x509.Certificate{i.root()}
	if before == nil || before[0].Equal(i.root()) {
		return false, nil
	}
	r.o.Logger.Warn("the root in Vault has changed", "mount", r.o.Mount, "issuer", r.o.Issuer, "subject", i.root().Subject.String(), "not_after", i.root().NotAfter)
	return true, nil
}

// issuer is what signs: its chain, it first, up to and with its root; and the path of the call by which it signs.
type issuer struct {
	chain []*x509.Certificate
	path  string
	old   bool // the mount is of a Vault before 1.11, which knows one issuer a mount, and no not_after
}

func (i *issuer) root() *x509.Certificate { return i.chain[len(i.chain)-1] }

// validity is the time in which every certificate of the chain is valid.
func (i *issuer) validity() (notBefore, notAfter time.Time) {
	notBefore, notAfter = i.chain[0].NotBefore, i.chain[0].NotAfter
	for _, cert := range i.chain[1:] {
		if cert.NotBefore.After(notBefore) {
			notBefore = cert.NotBefore
		}
		if cert.NotAfter.Before(notAfter) {
			notAfter = cert.NotAfter
		}
	}
	return notBefore, notAfter
}

// issuer reads the issuer from Vault, and makes sure that it can certify an issuing CA.
func (r *Root) issuer(ctx context.Context) (*issuer, error) {
	base := r.o.Mount + "/issuer/" + r.o.Issuer
	var answer struct {
		Data struct {
			Certificate string   `json:"certificate"`
			CAChain     []string `json:"ca_chain"`
			Revoked     bool     `json:"revoked"`
			Usage       string   `json:"usage"`
		} `json:"data"`
	}
	i := &issuer{path: base + "/sign-intermediate"}
	err := r.o.Client.read(ctx, base, &answer)
	if answer := refused(err); answer != nil && answer.status == http.StatusNotFound && answer.says("unsupported path") && r.o.Issuer == defaultIssuer {
		return r.oldIssuer(ctx)
	}
	if err != nil {
		return nil, err
	}
	switch d := answer.Data; {
	case d.Revoked:
		return nil, fmt.Errorf("%s is revoked: configure another issuer, or make another one the mount's default", r)
	case d.Usage != "" && !strings.Contains(d.Usage, "issuing-certificates"):
		return nil, fmt.Errorf("%s may not issue certificates (its usage is %s): 'vault write %s usage=…,issuing-certificates' allows it", r, d.Usage, base)
	}
	if i.chain, err = r.chain(answer.Data.Certificate, answer.Data.CAChain); err != nil {
		return nil, err
	}
	return i, nil
}

// oldIssuer reads the only issuer of a mount of before Vault 1.11.
func (r *Root) oldIssuer(ctx context.Context) (*issuer, error) {
	type answer struct {
		Data struct {
			Certificate string `json:"certificate"`
		} `json:"data"`
	}
	var own, above answer
	if err := r.o.Client.read(ctx, r.o.Mount+"/cert/ca", &own); err != nil {
		return nil, err
	}
	if err := r.o.Client.read(ctx, r.o.Mount+"/cert/ca_chain", &above); err != nil && !isAbsent(err) {
		return nil, err
	}
	chain, err := r.chain(own.Data.Certificate, []string{above.Data.Certificate})
	if err != nil {
		return nil, err
	}
	return &issuer{chain: chain, path: r.o.Mount + "/root/sign-intermediate", old: true}, nil
}

// chain puts what the mount says of an issuer in order: the issuer first, its self-signed root last. It makes sure that each certifies the one before it, and that an
// issuing CA may stand below.
func (r *Root) chain(own string, others []string) ([]*x509.Certificate, error) {
	cert, err := parseOne(own)
	if err != nil {
		return nil, fmt.Errorf("%s: what Vault gives as its certificate: %w", r, err)
	}
	pool, err := parse(strings.Join(others, "\n"))
	if err != nil {
		return nil, fmt.Errorf("%s: what Vault gives as its chain: %w", r, err)
	}
	chain := climb(cert, pool)
	if chain == nil {
		return nil, fmt.Errorf("%s (%s) does not lead to a self-signed root in its mount: import what is missing of its chain with "+
			"'vault write %s/issuers/import/cert pem_bundle=@root.pem'", r, cert.Subject, r.o.Mount)
	}
	now := r.o.Now()
	for depth, cert := range chain {
		var wrong string
		switch {
		case !cert.BasicConstraintsValid || !cert.IsCA:
			wrong = "is not a CA's (basicConstraints cA is not true)"
		case cert.KeyUsage&x509.KeyUsageCertSign == 0:
			wrong = "may not sign certificates (its keyUsage lacks keyCertSign)"
		case cert.MaxPathLen >= 0 && (cert.MaxPathLen > 0 || cert.MaxPathLenZero) && cert.MaxPathLen < depth+1:
			wrong = fmt.Sprintf("has the path length constraint %d, which does not allow an issuing CA %d below it (RFC 5280 4.2.1.9)", cert.MaxPathLen, depth+1)
		case now.After(cert.NotAfter):
			wrong = "expired at " + cert.NotAfter.Format(time.RFC3339)
		case now.Before(cert.NotBefore):
			wrong = fmt.Sprintf("is valid from %s on, and this machine's clock says %s", cert.NotBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
		default:
			continue
		}
		return nil, fmt.Errorf("%s: the certificate of %s %s: configure another issuer, or mend this one", r, cert.Subject, wrong)
	}
	return chain, nil
}

// climb returns the shortest way from cert over others to a self-signed certificate, or nil.
func climb(cert *x509.Certificate, others []*x509.Certificate) []*x509.Certificate {
	ways := [][]*x509.Certificate{{cert}}
	for length := 1; length <= maxChain; length++ {
		var longer [][]*x509.Certificate
		for _, way := range ways {
			last := way[len(way)-1]
			if last.CheckSignatureFrom(last) == nil {
				return way
			}
			for _, next := range others {
				if !slices.ContainsFunc(way, next.Equal) && last.CheckSignatureFrom(next) == nil && string(last.RawIssuer) == string(next.RawSubject) {
					longer = append(longer, append(slices.Clone(way), next))
				}
			}
		}
		ways = longer[:min(len(longer), 4*maxChain)] // cross-signing makes a few ways; a hostile answer gets no further
	}
	return nil
}

// parse reads certificates in PEM.
func parse(text string) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for rest := []byte(strings.TrimSpace(text)); len(rest) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("it is not certificates in PEM")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(certs, cert.Equal) {
			certs = append(certs, cert)
		}
		if len(certs) > 2*maxChain {
			return nil, fmt.Errorf("it has more than %d certificates", 2*maxChain)
		}
		rest = []byte(strings.TrimSpace(string(rest)))
	}
	return certs, nil
}

func parseOne(text string) (*x509.Certificate, error) {
	certs, err := parse(text)
	if err != nil {
		return nil, err
	}
	if len(certs) != 1 {
		return nil, fmt.Errorf("it is %d certificates instead of one", len(certs))
	}
	return certs[0], nil
}

// Certify has Vault sign the request's CSR. Validity is cut to what the whole chain above allows. What comes back is verified.
func (r *Root) Certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	chain, err := r.certify(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("certifying the issuing CA %.80q with %s in Vault: %w", request.CommonName, r, err)
	}
	return chain, nil
}

func (r *Root) certify(ctx context.Context, request ca.CertifyRequest) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	switch {
	case request.TrustDomain != r.trustDomain.Name():
		return nil, fmt.Errorf("it is for the trust domain %.80q, and this root is for %s", request.TrustDomain, r.trustDomain)
	case request.CommonName == "" || utf8.RuneCountInString(request.CommonName) > maxCommonName:
		return nil, fmt.Errorf("its common name has not 1 to %d characters (RFC 5280 A.1)", maxCommonName)
	}
	csr, err := x509.ParseCertificateRequest(request.CSR)
	if err != nil {
		return nil, fmt.Errorf("its CSR: %w", err)
	}
	if !sameKey(request.PublicKey, csr.PublicKey) {
		return nil, errors.New("its CSR is for another public key, or there is none")
	}
	i, err := r.issuer(ctx)
	if err != nil {
		return nil, err
	}
	now := r.o.Now()
	first, last := i.validity()
	notBefore, notAfter := request.NotBefore.UTC(), request.NotAfter.UTC().Truncate(time.Second)
	if notBefore.Before(first) {
		notBefore = first
	}
	if notAfter.After(last) {
		notAfter = last
	}
	if !notBefore.Before(notAfter) {
		return nil, fmt.Errorf("no time is left between %s and %s (its issuers are valid from %s to %s)", request.NotBefore.UTC().Format(time.RFC3339),
			request.NotAfter.UTC().Format(time.RFC3339), first.Format(time.RFC3339), last.Format(time.RFC3339))
	}
	order := map[string]any{
		"csr":                  string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: request.CSR})),
		"common_name":          request.CommonName,
		"organization":         organization,
		"uri_sans":             r.trustDomain.IDString(),
		"exclude_cn_from_sans": true,
		"use_csr_values":       false,
		"max_path_length":      0,
		"format":               "pem",
		// Whole seconds, rounded so that the certificate begins no earlier than asked for; Vault takes 0 for its own default of 30.
		"not_before_duration": max(int64(now.Sub(notBefore)/time.Second), 1),
	}
	if i.old {
		order["ttl"] = int64(notAfter.Sub(now) / time.Second)
	} else {
		order["not_after"] = notAfter.Format(time.RFC3339) // as a point in time it does not depend on Vault's clock
	}
	var answer struct {
		Data struct {
			Certificate string `json:"certificate"`
		} `json:"data"`
	}
	if err := r.o.Client.write(ctx, r.o.Client.o.Timeout, i.path, order, &answer); err != nil {
		return nil, err
	}
	cert, err := parseOne(answer.Data.Certificate)
	if err != nil {
		return nil, fmt.Errorf("what Vault gives as the certificate: %w", err)
	}
	if err := r.verify(cert, i, request, notAfter); err != nil {
		return nil, fmt.Errorf("what Vault signed is not what it was asked to sign, and is not used: %w", err)
	}
	return append([]*x509.Certificate{cert}, i.chain[:len(i.chain)-1]...), nil
}

// verify makes sure of everything about a certificate that Vault signed.
func (r *Root) verify(cert *x509.Certificate, i *issuer, request ca.CertifyRequest, notAfter time.Time) error {
	first, _ := i.validity()
	now := r.o.Now()
	switch {
	case !sameKey(request.PublicKey, cert.PublicKey):
		return errors.New("it is for another public key")
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return errors.New("it is not a CA's (basicConstraints cA is not true)")
	case cert.MaxPathLen != 0 || !cert.MaxPathLenZero:
		return fmt.Errorf("its path length constraint is %d, not 0: it could make further CAs (RFC 5280 4.2.1.9)", cert.MaxPathLen)
	case cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign:
		return fmt.Errorf("its keyUsage is %#x instead of keyCertSign and cRLSign", cert.KeyUsage)
	case len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) != 0:
		return errors.New("its extKeyUsage would limit what leaves may be for")
	case len(cert.UnhandledCriticalExtensions) != 0:
		return fmt.Errorf("it has the critical extensions %v, which verifiers need not know", cert.UnhandledCriticalExtensions)
	case len(cert.URIs) != 1 || cert.URIs[0].String() != r.trustDomain.IDString():
		return fmt.Errorf("its URI SANs are %v instead of %s alone (X509-SVID 3.1)", cert.URIs, r.trustDomain.IDString())
	case len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) != 0:
		return errors.New("it has further names")
	case constrained(cert):
		return errors.New("it has name constraints, which nobody asked for")
	case cert.Subject.CommonName != request.CommonName:
		return fmt.Errorf("its common name is %.80q", cert.Subject.CommonName)
	case slices.ContainsFunc(i.chain, func(above *x509.Certificate) bool { return string(above.RawSubject) == string(cert.RawSubject) }):
		return errors.New("it has the name of one of its issuers, and verifiers would take it for self-issued (RFC 5280 4.2.1.1)")
	case len(cert.SubjectKeyId) == 0 || len(cert.AuthorityKeyId) == 0:
		return errors.New("a key identifier is missing, of the subject or of the authority (RFC 5280 4.2.1.1 and 4.2.1.2)")
	case cert.SerialNumber.Sign() <= 0 || cert.SerialNumber.BitLen() < 64:
		return errors.New("its serial number is not positive, or too short (RFC 5280 4.1.2.2)")
	case cert.NotAfter.After(notAfter):
		return fmt.Errorf("it is valid until %s, longer than the %s that were asked for", cert.NotAfter.Format(time.RFC3339), notAfter.Format(time.RFC3339))
	case cert.NotBefore.Before(first.Truncate(time.Second)):
		return fmt.Errorf("it is valid from %s on, before its issuer is (%s): Vault's clock is behind, set it", cert.NotBefore.Format(time.RFC3339), first.Format(time.RFC3339))
	case cert.NotBefore.After(now):
		return fmt.Errorf("it is valid from %s on, and this machine's clock says %s: one of the two clocks is wrong, set it", cert.NotBefore.Format(time.RFC3339),
			now.UTC().Format(time.RFC3339))
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(i.root())
	for _, link := range i.chain[:len(i.chain)-1] {
		between.AddCert(link)
	}
	if err := cert.CheckSignatureFrom(i.chain[0]); err != nil {
		return fmt.Errorf("it is not signed by %s (perhaps another issuer became the default meanwhile, then the next try works): %w", i.chain[0].Subject, err)
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: cert.NotBefore, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return fmt.Errorf("it does not verify under the root: %w", err)
	}
	return nil
}

func constrained(cert *x509.Certificate) bool {
	return cert.PermittedDNSDomainsCritical || len(cert.PermittedDNSDomains)+len(cert.ExcludedDNSDomains)+len(cert.PermittedURIDomains)+len(cert.ExcludedURIDomains)+
		len(cert.PermittedIPRanges)+len(cert.ExcludedIPRanges)+len(cert.PermittedEmailAddresses)+len(cert.ExcludedEmailAddresses) != 0
}

func sameKey(a, b crypto.PublicKey) bool {
	key, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && key.Equal(b)
}
