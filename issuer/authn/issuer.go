package authn

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
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
	Name            string        // in the ledger, logs and problems
	Kind            string        // KindKubernetes or KindOIDC
	Issuer          string        // the token's "iss", to the letter
	Audiences       []string      // a token must name one of these; at least one
	JWKSFile        string        // where the keys are: a file, …
	JWKSURL         string        // … a URL, or with neither OpenID Connect discovery at Issuer
	CAFile          string        // PEM with the roots that the key server proves itself under, read again for each fetch; "": the system's
	BearerTokenFile string        // with the token that is shown to the key server, read again for each fetch; "": none
	Identity        string        // for KindOIDC: an IdentityTemplate
	RefreshInterval time.Duration // how often the keys are had anew, give or take a quarter; default 5 min, of a file 30 s
	MinRefetch      time.Duration // no more than one fetch in this time, however many unknown key ids come; default 10 s
	Algorithms      []string      // only these of the algorithms that count; empty: all
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
	template   IdentityTemplate
	keys       *keySet
}

var issuerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

func newIssuer(c IssuerConfig, a *Authenticator, cacheDir string) (*issuer, error) {
	i := &issuer{name: c.Name, kind: c.Kind, issuer: c.Issuer, audiences: slices.Clone(c.Audiences), algorithms: slices.Clone(c.Algorithms), skew: a.skew, td: a.td}
	if !issuerName.MatchString(c.Name) {
		return nil, errors.New("its name is not 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit")
	}
	if c.Issuer == "" || len(c.Audiences) == 0 || slices.Contains(c.Audiences, "") {
		return nil, errors.New("it needs an issuer, and at least one audience, none of them empty: else tokens that are meant for others would count")
	}
	for _, algorithm := range c.Algorithms {
		if !slices.Contains(algorithms, jose.SignatureAlgorithm(algorithm)) {
			return nil, fmt.Errorf("its algorithm %.40q is none of %v", algorithm, algorithms)
		}
	}
	switch c.Kind {
	case KindKubernetes:
		if c.Identity != "" {
			return nil, errors.New("identity is for kind oidc: a Kubernetes token's is ns/NAMESPACE/sa/ACCOUNT")
		}
	case KindOIDC:
		template, err := ParseIdentityTemplate(c.Identity)
		if err != nil {
			return nil, err
		}
		i.template = template
	default:
		return nil, fmt.Errorf("its kind %.40q is neither %s nor %s", c.Kind, KindKubernetes, KindOIDC)
	}
	cache := ""
	if cacheDir != "" && c.JWKSFile == "" {
		cache = filepath.Join(cacheDir, c.Name+".json")
	}
	keys, err := newKeySet(c, cache, a.now, a.log)
	i.keys = keys
	return i, err
}

const (
	maxID      = 2048 // octets of a SPIFFE ID (SPIFFE-ID 2.4)
	maxSubject = 1024 // octets of a foreign name that goes into the ledger; OpenID Connect Core 2 allows 255
	maxUID     = 128  // octets; Kubernetes has UUIDs of 36
)

// identify makes a SPIFFE ID of verified claims.
func (i *issuer) identify(token signedToken, now time.Time) (*proven, error) {
	subject := token.claims.Subject
	if subject == "" || len(subject) > maxSubject {
		return nil, fmt.Errorf("its subject has %d octets; it needs one of at most %d", len(subject), maxSubject)
	}
	p := &proven{
		proof:  ledger.Proof{Method: ca.MethodOIDC, Issuer: i.name, Subject: subject, Time: ledger.At(now)},
		holder: ledger.Holder{Kind: "subject", ID: i.name + " " + subject}, // a subject is unique with its issuer only
	}
	if i.kind == KindKubernetes {
		var podUID string
		var err error
		p.proof.Method = ca.MethodKubernetes
		if p.id, podUID, err = i.kubernetesID(subject, token.claims.Kubernetes); podUID != "" {
			p.holder = ledger.Holder{Kind: "pod", ID: podUID}
		}
		return p, err
	}
	var claims map[string]json.RawMessage
	if err := json.Unmarshal(token.payload, &claims); err != nil {
		return nil, fmt.Errorf("its claims cannot be read: %s", brief(err))
	}
	segments, err := i.template.segmentsFor(claims)
	if err == nil {
		p.id, err = makeID(i.td, segments...)
	}
	return p, err
}

// kubernetesClaim is the claim kubernetes.io of a bound service account token.
type kubernetesClaim struct {
	Namespace      string           `json:"namespace"`
	ServiceAccount kubernetesObject `json:"serviceaccount"`
	Pod            kubernetesObject `json:"pod"`
}

type kubernetesObject struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// kubernetesID reads the service account from "sub", and makes sure that the claim kubernetes.io, where there is one (bound), says the same.
// podUID is "" when the token is not bound to a pod.
func (i *issuer) kubernetesID(subject string, bound json.RawMessage) (id spiffeid.ID, podUID string, err error) {
	parts := strings.Split(subject, ":")
	if len(parts) != 4 || parts[0] != "system" || parts[1] != "serviceaccount" {
		return id, "", fmt.Errorf("its subject %.200q is not system:serviceaccount:NAMESPACE:ACCOUNT", subject)
	}
	namespace, account := parts[2], parts[3]
	if bound != nil {
		var claim kubernetesClaim
		if err := json.Unmarshal(bound, &claim); err != nil {
			return id, "", fmt.Errorf("its claim kubernetes.io cannot be read: %s", brief(err))
		}
		if claim.Namespace != namespace || claim.ServiceAccount.Name != account {
			return id, "", fmt.Errorf("its subject is %.200q, and its claim kubernetes.io names the service account %.100q of the namespace %.100q",
				subject, claim.ServiceAccount.Name, claim.Namespace)
		}
		if podUID = claim.Pod.UID; len(podUID) > maxUID {
			return id, "", fmt.Errorf("its pod UID has %d octets, more than %d", len(podUID), maxUID)
		}
	}
	id, err = makeID(i.td, "ns", namespace, "sa", account)
	return id, podUID, err
}

// makeID validates each segment (SPIFFE-ID 2.2), and the length of the whole.
func makeID(td spiffeid.TrustDomain, segments ...string) (spiffeid.ID, error) {
	for _, segment := range segments {
		if err := spiffeid.ValidatePathSegment(segment); err != nil {
			return spiffeid.ID{}, fmt.Errorf("%.200q cannot be a segment of a SPIFFE ID: %w", segment, err)
		}
	}
	id, err := spiffeid.FromSegments(td, segments...)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("making a SPIFFE ID: %w", err)
	}
	if octets := len(id.String()); octets > maxID {
		return spiffeid.ID{}, fmt.Errorf("its SPIFFE ID would have %d octets, and at most %d are allowed", octets, maxID)
	}
	return id, nil
}
