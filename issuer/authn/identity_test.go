package authn_test

import (
	"strings"
	"testing"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/authn"
)

func TestServiceAccountsMapToTheirNamespaceAndNameOrToNothing(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	b := start(t, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
	good := b.claims(server.URL)
	account := claims{"name": "web", "uid": "sa-uid"}
	bound := func(fields claims) any { return with(claims{"namespace": "prod", "serviceaccount": account}, fields) }
	const sub = "system:serviceaccount:prod:web"

	for name, c := range map[string]struct {
		changes claims
		holder  ledger.Holder
	}{
		"bound to a pod":            {nil, ledger.Holder{Kind: "pod", ID: "pod-uid"}},
		"bound to a node":           {claims{"kubernetes.io": bound(claims{"node": claims{"name": "n", "uid": "u"}})}, ledger.Holder{Kind: "subject", ID: "cluster " + sub}},
		"not bound":                 {claims{"kubernetes.io": bound(nil)}, ledger.Holder{Kind: "subject", ID: "cluster " + sub}},
		"legacy, without the claim": {claims{"kubernetes.io": nil}, ledger.Holder{Kind: "subject", ID: "cluster " + sub}},
	} {
		caller := b.accepts(t, key.sign(t, with(good, c.changes)))
		if caller.ID.String() != "spiffe://example.org/ns/prod/sa/web" || caller.Holder != c.holder {
			t.Errorf("%s: got %s, held by %+v", name, caller.ID, caller.Holder)
		}
	}

	for name, c := range map[string]struct {
		changes claims
		reason  string
	}{
		"another namespace in the claim":      {claims{"kubernetes.io": bound(claims{"namespace": "root"})}, "names the service account"},
		"another account in the claim":        {claims{"kubernetes.io": bound(claims{"serviceaccount": claims{"name": "admin"}})}, "names the service account"},
		"no account in the claim":             {claims{"kubernetes.io": bound(claims{"serviceaccount": nil})}, "names the service account"},
		"an empty claim":                      {claims{"kubernetes.io": claims{}}, "names the service account"},
		"a claim that is text":                {claims{"kubernetes.io": "prod"}, "claim kubernetes.io cannot be read"},
		"a claim whose namespace is a number": {claims{"kubernetes.io": bound(claims{"namespace": 1})}, "claim kubernetes.io cannot be read"},
		"a long pod UID":                      {claims{"kubernetes.io": bound(claims{"pod": claims{"uid": strings.Repeat("u", 129)}})}, "pod UID has 129 octets"},
		"a user":                              {claims{"sub": "alice"}, "is not system:serviceaccount:"},
		"a node":                              {claims{"sub": "system:node:a"}, "is not system:serviceaccount:"},
		"too many parts":                      {claims{"sub": sub + ":x"}, "is not system:serviceaccount:"},
		"too few parts":                       {claims{"sub": "system:serviceaccount:prod"}, "is not system:serviceaccount:"},
		"another prefix":                      {claims{"sub": "xsystem:serviceaccount:prod:web"}, "is not system:serviceaccount:"},
		"no namespace":                        {claims{"sub": "system:serviceaccount::web", "kubernetes.io": nil}, "cannot be a segment"},
		"no account":                          {claims{"sub": "system:serviceaccount:prod:", "kubernetes.io": nil}, "cannot be a segment"},
		"a way up":                            {claims{"sub": "system:serviceaccount:..:web", "kubernetes.io": nil}, "cannot be a segment"},
		"a slash":                             {claims{"sub": "system:serviceaccount:prod/sa/admin:web", "kubernetes.io": nil}, "cannot be a segment"},
		"beyond ASCII":                        {claims{"sub": "system:serviceaccount:pröd:web", "kubernetes.io": nil}, "cannot be a segment"},
		"a line break":                        {claims{"sub": "system:serviceaccount:prod:web\n", "kubernetes.io": nil}, "cannot be a segment"},
	} {
		t.Run(name, func(t *testing.T) {
			token := key.sign(t, with(good, c.changes))
			_, err := b.ask("Bearer " + token)
			refuses(t, err, ca.ErrUnauthenticated, c.reason, token)
		})
	}
}

func TestATemplateMakesThePathOfClaimsAndNothingElse(t *testing.T) {
	key := newSigner(t, "k1")
	server := newKeyServer(t, key)
	oidc := func(template string) *bench {
		c := server.config()
		c.Name, c.Kind, c.Identity = "ci", authn.KindOIDC, template
		return start(t, authn.Options{Issuers: []authn.IssuerConfig{c}})
	}
	const template = "ci/{claim:owner}/job-{claim:job.name}.x"
	b := oidc(template)
	good := with(b.claims(server.URL), claims{"sub": "repo:a/b", "owner": "acme", "job": claims{"name": "build"}, "kubernetes.io": "ignored"})
	caller := b.accepts(t, key.sign(t, good))
	if caller.ID.String() != "spiffe://example.org/ci/acme/job-build.x" || caller.Holder != (ledger.Holder{Kind: "subject", ID: "ci repo:a/b"}) {
		t.Errorf("got %s, held by %+v", caller.ID, caller.Holder)
	}
	if p := caller.Proofs[0]; p.Method != ca.MethodOIDC || p.Issuer != "ci" || p.Subject != "repo:a/b" || !caller.IssuedAt.Equal(b.clock.Now()) {
		t.Errorf("got %+v", caller)
	}

	for name, c := range map[string]struct {
		changes claims
		reason  string
	}{
		"no claim":          {claims{"owner": nil}, `it has no claim "owner"`},
		"no inner claim":    {claims{"job": claims{}}, `it has no claim "job.name"`},
		"no outer claim":    {claims{"job": nil}, `it has no claim "job.name"`},
		"outer is text":     {claims{"job": "build"}, `it has no claim "job.name"`},
		"number":            {claims{"owner": 7}, "is not a string"},
		"list":              {claims{"owner": []string{"acme"}}, "is not a string"},
		"empty":             {claims{"owner": ""}, "cannot be a segment"},
		"way up":            {claims{"owner": ".."}, "cannot be a segment"},
		"way up and on":     {claims{"owner": "../root"}, "cannot be a segment"},
		"dot":               {claims{"owner": "."}, "cannot be a segment"},
		"dot beside text":   {claims{"job": claims{"name": ".."}}, "cannot be a segment"},
		"slash":             {claims{"owner": "acme/b"}, "cannot be a segment"},
		"backslash":         {claims{"owner": `acme\b`}, "cannot be a segment"},
		"encoded slash":     {claims{"owner": "acme%2fb"}, "cannot be a segment"},
		"beyond ASCII":      {claims{"owner": "açme"}, "cannot be a segment"},
		"full-width dots":   {claims{"owner": "．．"}, "cannot be a segment"},
		"space":             {claims{"owner": "ac me"}, "cannot be a segment"},
		"null octet":        {claims{"owner": "acme\x00"}, "cannot be a segment"},
		"a brace":           {claims{"owner": "{claim:sub}"}, "cannot be a segment"},
		"very long":         {claims{"owner": strings.Repeat("a", 8000)}, "and at most 2048 are allowed"},
		"one octet too far": {claims{"owner": strings.Repeat("a", 2049-len("spiffe://example.org/ci//job-build.x"))}, "would have 2049 octets"},
	} {
		t.Run(name, func(t *testing.T) {
			token := key.sign(t, with(good, c.changes))
			_, err := b.ask("Bearer " + token)
			refuses(t, err, ca.ErrUnauthenticated, c.reason, token)
		})
	}
	long := strings.Repeat("a", 2048-len("spiffe://example.org/ci//job-build.x"))
	b.accepts(t, key.sign(t, with(good, claims{"owner": long})))
	b.accepts(t, key.sign(t, with(good, claims{"owner": "null"})))

	b = oidc("ci/static")
	if caller := b.accepts(t, key.sign(t, good)); caller.ID.Path() != "/ci/static" {
		t.Errorf("got %s", caller.ID)
	}
}

func TestTemplatesThatCouldMakeTwoNamesOneAreRefused(t *testing.T) {
	for _, text := range []string{"a", "ci/{claim:repository_owner}/{claim:sub}", "ns/{claim:https://x.example/ns}/sa/x", "{claim:a.b.c}", "x-{claim:a}-y"} {
		if _, err := authn.ParseIdentityTemplate(text); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	for text, reason := range map[string]string{
		"":                        "is empty",
		"/ci":                     "a segment that no SPIFFE ID has",
		"ci/":                     "a segment that no SPIFFE ID has",
		"ci//{claim:a}":           "a segment that no SPIFFE ID has",
		"ci/../x":                 "a segment that no SPIFFE ID has",
		"ci/a b":                  "a segment that no SPIFFE ID has",
		"ci/{claim:a}}":           "a segment that no SPIFFE ID has",
		"ci/{sub}":                "a brace that does not begin {claim:NAME}",
		"ci/{claim:}":             "a brace that does not begin {claim:NAME}",
		"ci/{claim:a":             "a brace that does not begin {claim:NAME}",
		"ci/{claim:a..b}":         "a brace that does not begin {claim:NAME}",
		"ci/{claim:a b}":          "a brace that does not begin {claim:NAME}",
		"ci/{claim:{claim:a}}":    "a brace that does not begin {claim:NAME}",
		"{claim:a}{claim:b}":      "two claims in one segment",
		"{claim:a}-{claim:b}/x":   "two claims in one segment",
		strings.Repeat("a", 1025): "more than 1024 octets",
	} {
		if _, err := authn.ParseIdentityTemplate(text); err == nil || !strings.Contains(err.Error(), reason) || len(err.Error()) > 600 {
			t.Errorf("%.40q: %v, want it to be about %q", text, err, reason)
		}
	}
}

func TestAConfigurationThatCannotBeMeantIsRefused(t *testing.T) {
	good := authn.IssuerConfig{Name: "a", Kind: authn.KindKubernetes, Issuer: "https://a.example", Audiences: []string{"istio-ca"}}
	changed := func(change func(*authn.IssuerConfig)) []authn.IssuerConfig {
		c := good
		change(&c)
		return []authn.IssuerConfig{c}
	}
	for reason, o := range map[string]authn.Options{
		"the issuer \"https://a.example\" is taken": {Issuers: []authn.IssuerConfig{good, {Name: "b", Kind: "kubernetes", Issuer: good.Issuer, Audiences: []string{"x"}}}},
		"there are two of that name":                {Issuers: []authn.IssuerConfig{good, {Name: "a", Kind: "kubernetes", Issuer: "https://b.example", Audiences: []string{"x"}}}},
		"the issuer \"kedge\" is taken":             {Issuers: changed(func(c *authn.IssuerConfig) { c.Issuer, c.JWKSFile = "kedge", "f" })},
		"needs an issuer":                           {Issuers: changed(func(c *authn.IssuerConfig) { c.Issuer = "" })},
		"at least one audience":                     {Issuers: changed(func(c *authn.IssuerConfig) { c.Audiences = nil })},
		"none of them empty":                        {Issuers: changed(func(c *authn.IssuerConfig) { c.Audiences = []string{"x", ""} })},
		"its name is not":                           {Issuers: changed(func(c *authn.IssuerConfig) { c.Name = "../a" })},
		"is neither kubernetes nor oidc":            {Issuers: changed(func(c *authn.IssuerConfig) { c.Kind = "x" })},
		"identity is for kind oidc":                 {Issuers: changed(func(c *authn.IssuerConfig) { c.Identity = "a" })},
		"the identity template \"\" is empty":       {Issuers: changed(func(c *authn.IssuerConfig) { c.Kind = "oidc" })},
		"its algorithm \"HS256\" is none of":        {Issuers: changed(func(c *authn.IssuerConfig) { c.Algorithms = []string{"HS256"} })},
		"keys come from one place":                  {Issuers: changed(func(c *authn.IssuerConfig) { c.JWKSFile, c.JWKSURL = "f", "https://a.example/keys" })},
		"which are for fetching":                    {Issuers: changed(func(c *authn.IssuerConfig) { c.JWKSFile, c.BearerTokenFile = "f", "t" })},
		"takes an https URL":                        {Issuers: changed(func(c *authn.IssuerConfig) { c.Issuer = "kubernetes/serviceaccount" })},
		"reading the roots":                         {Issuers: changed(func(c *authn.IssuerConfig) { c.CAFile = "no-such-file" })},
		"less than 1ms":                             {Issuers: changed(func(c *authn.IssuerConfig) { c.MinRefetch = -1 })},
		"the clock skew -1s":                        {Skew: -1e9},
		"the clock skew 6m0s":                       {Skew: 360e9},
	} {
		o.TrustDomain = td
		if _, err := authn.New(o); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("want an error about %q, got %v", reason, err)
		}
	}
	if _, err := authn.New(authn.Options{}); err == nil {
		t.Error("there is no trust domain, and no error")
	}
}
