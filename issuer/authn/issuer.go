package authn

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/ledger"
)

// The kinds of token issuers.
const (
	KindKubernetes = "kubernetes" // service account tokens: the holder becomes /ns/NAMESPACE/sa/ACCOUNT
	KindOIDC       = "oidc"       // any other OpenID Connect token: a template makes the path of its claims
)

// IssuerConfig is a token issuer whose word counts.
type IssuerConfig struct {
	Name            string   // in the ledger, logs and problems
	Kind            string   // KindKubernetes or KindOIDC
	Issuer          string   // the token's "iss", to the letter
	Audiences       []string // a token must name one of these; at least one
	JWKSFile        string   // where the keys are: a file, …
	JWKSURL         string   // … a URL, or with neither OpenID Connect discovery at Issuer
	CAFile          string   // PEM with the roots that the key server proves itself under; "": the system's
	BearerTokenFile string   // shown to the key server, read again each time; "": none
	Identity        string   // for KindOIDC: template of the path, like "ci/{claim:repository}"
	RefreshInterval time.Duration
	MinRefetch      time.Duration // no more than one fetch in this time, however many unknown key ids come; defaults below
	Algorithms      []string      // only these of the algorithms that count; nil: all
}

// issuer is a token issuer that can be used.
type issuer struct {
	name       string
	kind       string
	issuer     string
	audiences  []string
	algorithms []string
	skew       time.Duration
	td         spiffeid.TrustDomain
	template   []templatePart
	keys       *keySet
}

var issuerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

func newIssuer(c IssuerConfig, a *Authenticator, cacheDir string) (*issuer, error) {
	i := &issuer{name: c.Name, kind: c.Kind, issuer: c.Issuer, audiences: c.Audiences, algorithms: c.Algorithms, skew: a.skew, td: a.td}
	if !issuerName.MatchString(c.Name) {
		return nil, errors.New("its name is not 1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit")
	}
	if c.Issuer == "" || len(c.Audiences) == 0 {
		return nil, errors.New("it needs an issuer, and at least one audience")
	}
	switch c.Kind {
	case KindKubernetes:
		if c.Identity != "" {
			return nil, errors.New("identity is for kind oidc: a Kubernetes token's is ns/NAMESPACE/sa/ACCOUNT")
		}
	case KindOIDC:
		template, err := parseTemplate(c.Identity)
		if err != nil {
			return nil, err
		}
		i.template = template
	default:
		return nil, fmt.Errorf("its kind %q is neither %s nor %s", c.Kind, KindKubernetes, KindOIDC)
	}
	cache := ""
	if cacheDir != "" && c.JWKSFile == "" {
		cache = filepath.Join(cacheDir, c.Name+".jwks")
	}
	keys, err := newKeySet(c, cache, a.now, a.log)
	i.keys = keys
	return i, err
}

// identify makes a SPIFFE ID of verified claims.
func (i *issuer) identify(c *claims, raw map[string]json.RawMessage) (*proven, error) {
	p := &proven{proof: ledger.Proof{Method: ca.MethodOIDC, Issuer: i.name, Subject: bounded(c.Subject), Time: ledger.At(i.keys.now())},
		holder: ledger.Holder{Kind: "subject", ID: i.name + " " + bounded(c.Subject)}}
	var err error
	if i.kind == KindKubernetes {
		p.proof.Method = ca.MethodKubernetes
		p.id, err = i.kubernetesID(c)
		if k := c.Kubernetes; err == nil && k != nil && k.Pod != nil && k.Pod.UID != "" {
			p.holder = ledger.Holder{Kind: "pod", ID: bounded(k.Pod.UID)}
		}
	} else {
		p.id, err = i.templateID(raw)
	}
	if err != nil {
		return nil, ca.Unauthenticated(fmt.Errorf("token of issuer %q: %w", i.name, err))
	}
	return p, nil
}

// kubernetesID reads the service account from "sub", and makes sure that the claim kubernetes.io, where there is one, says the same.
func (i *issuer) kubernetesID(c *claims) (spiffeid.ID, error) {
	parts := strings.Split(c.Subject, ":")
	if len(parts) != 4 || parts[0] != "system" || parts[1] != "serviceaccount" {
		return spiffeid.ID{}, fmt.Errorf("its subject %.200q is not system:serviceaccount:NAMESPACE:ACCOUNT", c.Subject)
	}
	namespace, account := parts[2], parts[3]
	if k := c.Kubernetes; k != nil && (k.Namespace != namespace || k.ServiceAccount == nil || k.ServiceAccount.Name != account) {
		return spiffeid.ID{}, fmt.Errorf("its subject %.200q and its claim kubernetes.io name different service accounts", c.Subject)
	}
	return makeID(i.td, "ns", namespace, "sa", account)
}

// makeID validates each segment (SPIFFE-ID 2.2), and the whole.
func makeID(td spiffeid.TrustDomain, segments ...string) (spiffeid.ID, error) {
	for _, segment := range segments {
		if err := spiffeid.ValidatePathSegment(segment); err != nil {
			return spiffeid.ID{}, fmt.Errorf("%.200q cannot be a segment of a SPIFFE ID: %w", segment, err)
		}
	}
	id, err := spiffeid.FromSegments(td, segments...)
	if err == nil && len(id.String()) > maxID {
		err = fmt.Errorf("its SPIFFE ID would have %d octets, and at most %d are allowed", len(id.String()), maxID)
	}
	return id, err
}

const (
	maxID      = 2048 // octets (SPIFFE-ID 2.3)
	maxSubject = 512  // octets of a foreign name that go into the ledger
)

func bounded(text string) string { return text[:min(len(text), maxSubject)] }

// templatePart is a piece of text, or the value of a claim.
type templatePart struct {
	text  string
	claim []string // path into nested claims; nil: text
}

var claimName = regexp.MustCompile(`^[A-Za-z0-9_:/-]+(\.[A-Za-z0-9_:/-]+)*$`)

// parseTemplate reads segments like "ci/{claim:repository}/{claim:job.name}". A claim's value fills its place within one segment.
func parseTemplate(text string) ([]templatePart, error) {
	fail := func(why string) ([]templatePart, error) {
		return nil, fmt.Errorf("the identity template %.200q %s: write it like ci/{claim:repository}", text, why)
	}
	if text == "" {
		return fail("is empty")
	}
	var parts []templatePart
	sample := ""
	for rest := text; rest != ""; {
		before, after, open := strings.Cut(rest, "{")
		if before != "" {
			parts, sample = append(parts, templatePart{text: before}), sample+before
		}
		if !open {
			break
		}
		name, remains, closed := strings.Cut(after, "}")
		claim, ok := strings.CutPrefix(name, "claim:")
		if !closed || !ok || !claimName.MatchString(claim) {
			return fail("has a brace that does not begin {claim:NAME}")
		}
		parts, sample, rest = append(parts, templatePart{claim: strings.Split(claim, ".")}), sample+"x", remains
	}
	for _, segment := range strings.Split(sample, "/") {
		if err := spiffeid.ValidatePathSegment(segment); err != nil {
			return fail(fmt.Sprintf("has a segment that no SPIFFE ID has (%v)", err))
		}
	}
	return parts, nil
}

// templateID fills the template. A claim's value is validated on its own first, so that it can neither add a segment nor vanish.
func (i *issuer) templateID(raw map[string]json.RawMessage) (spiffeid.ID, error) {
	var path strings.Builder
	for _, part := range i.template {
		if part.claim == nil {
			path.WriteString(part.text)
			continue
		}
		value, err := stringClaim(raw, part.claim)
		if err != nil {
			return spiffeid.ID{}, err
		}
		if err := spiffeid.ValidatePathSegment(value); err != nil {
			return spiffeid.ID{}, fmt.Errorf("its claim %q has the value %.200q, which cannot be a segment of a SPIFFE ID: %w", strings.Join(part.claim, "."), value, err)
		}
		path.WriteString(value)
	}
	return makeID(i.td, strings.Split(path.String(), "/")...)
}

func stringClaim(raw map[string]json.RawMessage, path []string) (string, error) {
	name := strings.Join(path, ".")
	for _, step := range path[:len(path)-1] {
		var inner map[string]json.RawMessage
		if json.Unmarshal(raw[step], &inner) != nil {
			return "", fmt.Errorf("it has no claim %q", name)
		}
		raw = inner
	}
	var value string
	if json.Unmarshal(raw[path[len(path)-1]], &value) != nil {
		return "", fmt.Errorf("it has no claim %q that is a string", name)
	}
	return value, nil
}
