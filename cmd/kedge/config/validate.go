package config

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/cfsslprofile"
	"kedge/issuer/authn"
)

// How lifetimes fit together.
const (
	issuingPerLeaf   = 3 // an issuing CA lives at least so many times the longest leaf, so that a leaf of its last day as signer ends before it
	rootPerIssuing   = 2 // a root lives at least so many times the issuing CA
	issuingPerServer = 3 // as for leaves
)

const (
	maxClockSkew   = 5 * time.Minute
	maxCallTimeout = 10 * time.Minute

	minConnections       = 32
	maxSlowClientTimeout = time.Minute
	maxJoinToken         = 7 * day
	minKeepalive         = 10 * time.Second // gRPC itself pings no faster
	shortIssuing         = time.Hour
)

// Validate says whether the values make sense, each by itself and together. It reads cfsslProfilesFile, and no other file that is
// named: those are for whoever reads them. Warnings are about what is allowed and rarely meant.
// The error is an *Error with everything that is wrong.
func (c *Config) Validate() (warnings []string, err error) {
	v := validation{}
	v.trustDomain(c)
	v.csr(c)
	v.operations(c)
	v.tracing(c.Tracing)
	v.root(c)
	v.lifetimes(c, v.profiles(c))
	v.callers(c.Callers)
	v.ledger(c.Ledger)
	if len(v.problems) > 0 {
		return v.warnings, &Error{Problems: v.problems}
	}
	return v.warnings, nil
}

// SigningProfiles makes the profiles that callers can name, from those of the file and of cfsslProfilesFile, which it reads. The one named
// "default" is always there. Without problems found by Validate it fails only when that file has changed.
func (c *Config) SigningProfiles() (map[string]*ca.Profile, error) {
	v := validation{}
	profiles := v.profiles(c)
	if len(v.problems) > 0 {
		return nil, &Error{Problems: v.problems}
	}
	return profiles, nil
}

// validation gathers what is wrong and what is odd.
type validation struct {
	problems
	warnings []string
}

func (v *validation) warn(path, format string, args ...any) {
	v.warnings = append(v.warnings, Problem{path, fmt.Sprintf(format, args...)}.String())
}

func (v *validation) trustDomain(c *Config) {
	if td, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil {
		v.refuse("trustDomain", "%q is not the name of a trust domain: %v", shorten(c.TrustDomain), err)
	} else if td.Name() != c.TrustDomain {
		v.refuse("trustDomain", "%q: write the name alone, %q", shorten(c.TrustDomain), td.Name())
	}
	if c.DataDir == "" {
		v.refuse("dataDir", "it is empty: name a folder")
	}
}

func (v *validation) csr(c *Config) {
	s := c.CSR
	v.address("csr.listen", s.Listen)
	v.serverNames(s.ServerNames)
	if v.seconds("csr.serverCertificateTTL", s.ServerCertificateTTL) && s.ServerCertificateTTL.Std() < ca.ShortTTL {
		v.warn("csr.serverCertificateTTL", "%s is less than %s: clients whose clocks are late or early may refuse it",
			s.ServerCertificateTTL, Duration(ca.ShortTTL))
	}
	if s.CallTimeout <= 0 || s.CallTimeout.Std() > maxCallTimeout {
		v.refuse("csr.callTimeout", "%s is not more than 0 and at most %s", s.CallTimeout, Duration(maxCallTimeout))
	}
	if s.MaxConnectionAge > 0 && s.MaxConnectionAge.Std() < time.Second {
		v.refuse("csr.maxConnectionAge", "%s is less than 1s, so that clients would do nothing but connect; 0s means never", s.MaxConnectionAge)
	}
	if s.WaitTimeout <= 0 || s.WaitTimeout.Std() > maxCallTimeout {
		v.refuse("csr.waitTimeout", "%s is not more than 0 and at most %s", s.WaitTimeout, Duration(maxCallTimeout))
	}
	if least := s.WaitTimeout + s.CallTimeout; s.MaxConnectionAgeGrace < least {
		v.refuse("csr.maxConnectionAgeGrace", "%s is less than csr.waitTimeout %s and csr.callTimeout %s together: calls under way would be cut off: raise it to %s or more",
			s.MaxConnectionAgeGrace, s.WaitTimeout, s.CallTimeout, least)
	}
	if s.MaxConnections < 0 || s.MaxConnections > 0 && s.MaxConnections < minConnections {
		v.refuse("csr.maxConnections", "%d is less than %d; 0 means as many as the process may open files", s.MaxConnections, minConnections)
	}
	if s.SlowClientTimeout.Std() < time.Second || s.SlowClientTimeout.Std() > maxSlowClientTimeout {
		v.refuse("csr.slowClientTimeout", "%s is not between 1s and %s", s.SlowClientTimeout, Duration(maxSlowClientTimeout))
	}
	if s.KeepaliveTime.Std() < minKeepalive {
		v.refuse("csr.keepaliveTime", "%s is less than %s", s.KeepaliveTime, Duration(minKeepalive))
	}
	if s.KeepaliveTimeout.Std() < time.Second {
		v.refuse("csr.keepaliveTimeout", "%s is less than 1s: clients on slow links would be cut off", s.KeepaliveTimeout)
	}
	if s.KeepaliveMinTime.Std() < time.Second { // gRPC would take 0 for five minutes
		v.refuse("csr.keepaliveMinTime", "%s is less than 1s", s.KeepaliveMinTime)
	}
	if s.KeepaliveMinTime.Std() > 30*time.Second {
		v.warn("csr.keepaliveMinTime", "%s is more than the 30s after which istio-agents ping: they will be cut off", s.KeepaliveMinTime)
	}
}

func (v *validation) serverNames(names []string) {
	if len(names) == 0 {
		v.refuse("csr.serverNames", "the list is empty: no client could check whom it talks to. Give the names that clients dial")
	}
	seen := map[string]bool{}
	for i, name := range names {
		path := fmt.Sprintf("csr.serverNames[%d]", i)
		same := strings.ToLower(name)
		if address, err := netip.ParseAddr(name); err == nil && address.Zone() == "" {
			same = address.Unmap().String()
		} else if !dnsName(name) {
			v.refuse(path, "%q is neither a DNS name nor an IP address", shorten(name))
			continue
		}
		if seen[same] {
			v.refuse(path, "%q is there twice", name)
		}
		seen[same] = true
	}
}

func (v *validation) operations(c *Config) {
	v.address("operations.listen", c.Operations.Listen)
	host, port, err := net.SplitHostPort(c.Operations.Listen)
	csrHost, csrPort, csrErr := net.SplitHostPort(c.CSR.Listen)
	if err == nil && csrErr == nil && port == csrPort && port != "0" && (host == csrHost || anyAddress(host) || anyAddress(csrHost)) {
		v.refuse("operations.listen", "%s takes the port of csr.listen %s: give one of them another port", c.Operations.Listen, c.CSR.Listen)
	}
	v.log(c.Log)
}

func (v *validation) log(l Log) {
	v.oneOf("log.level", l.Level, "debug", "info", "warn", "error")
	v.oneOf("log.format", l.Format, "json", "text")
}

func (v *validation) tracing(t Tracing) {
	if !(t.SampleRatio >= 0 && t.SampleRatio <= 1) { // NaN is neither
		v.refuse("tracing.sampleRatio", "%v is not from 0 to 1", t.SampleRatio)
	}
	if t.Insecure && t.CAFile != "" {
		v.refuse("tracing.caFile", "tracing.insecure is true, so there is no certificate to check: remove one of the two")
	}
	if t.Endpoint == "" {
		return
	}
	if !v.address("tracing.endpoint", t.Endpoint) {
		return
	}
	host, port, _ := net.SplitHostPort(t.Endpoint) // it is an address
	if host == "" || port == "0" {
		v.refuse("tracing.endpoint", `%q is not host and port of a receiver, like "127.0.0.1:4317"`, t.Endpoint)
	}
	if t.Insecure && !loopback(host) {
		v.warn("tracing.insecure", "traces name SPIFFE IDs and addresses, and travel to %s without TLS", t.Endpoint)
	}
}

// profiles checks each profile and gives back those that are valid, by name.
func (v *validation) profiles(c *Config) map[string]*ca.Profile {
	valid := map[string]*ca.Profile{}
	add := func(path, name string, config ca.ProfileConfig) {
		profile, err := ca.NewProfile(name, config)
		if err != nil {
			for _, problem := range strings.Split(err.Error(), "\n") { // NewProfile joins them
				v.refuse(path, "%s", problem)
			}
			return
		}
		valid[name] = profile
		v.warnings = append(v.warnings, profile.Warnings()...)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Profiles)) {
		add(at("profiles", name), name, c.Profiles[name].signing())
	}
	if c.CFSSLProfilesFile != "" {
		theirs, err := cfsslprofile.Load(c.CFSSLProfilesFile)
		if err != nil {
			v.refuse("cfsslProfilesFile", "%v", err)
		}
		for _, name := range slices.Sorted(maps.Keys(theirs)) {
			if _, ours := c.Profiles[name]; ours {
				v.refuse(at("profiles", name), "%s has a profile of this name too: remove one of them", c.CFSSLProfilesFile)
				continue
			}
			add("cfsslProfilesFile", name, theirs[name])
		}
	}
	_, written := c.Profiles[ca.DefaultProfile]
	if !written && valid[ca.DefaultProfile] == nil {
		add(at("profiles", ca.DefaultProfile), ca.DefaultProfile, ca.DefaultProfileConfig())
	}
	return valid
}

func (v *validation) lifetimes(c *Config, profiles map[string]*ca.Profile) {
	v.keyType("root.file.keyType", c.Root.File.KeyType)
	v.keyType("issuingCA.keyType", c.IssuingCA.KeyType)
	issuing, root, server := c.IssuingCA.Lifetime, c.Root.File.Lifetime, c.CSR.ServerCertificateTTL
	issuingFits := v.seconds("issuingCA.lifetime", issuing)
	if v.seconds("root.file.lifetime", root) && issuingFits && c.Root.Kind == RootKindFile && root < rootPerIssuing*issuing {
		v.refuse("root.file.lifetime", "%s is shorter than %d × issuingCA.lifetime %s = %s: raise root.file.lifetime or lower issuingCA.lifetime",
			root, rootPerIssuing, issuing, rootPerIssuing*issuing)
	}
	if !issuingFits {
		return
	}
	if issuing.Std() < shortIssuing {
		v.warn("issuingCA.lifetime", "%s is less than %s: when its renewal fails for half of that, nothing more is issued", issuing, Duration(shortIssuing))
	}
	var longest *ca.Profile
	for _, name := range slices.Sorted(maps.Keys(profiles)) {
		if longest == nil || profiles[name].MaxTTL() > longest.MaxTTL() {
			longest = profiles[name]
		}
	}
	if longest != nil {
		ttl := Duration(longest.MaxTTL())
		if issuing < issuingPerLeaf*ttl {
			where := at("profiles", longest.Name()) + ".maxTTL"
			if _, written := c.Profiles[longest.Name()]; !written && c.CFSSLProfilesFile != "" {
				where = fmt.Sprintf("the expiry of profile %q in cfsslProfilesFile", longest.Name())
			}
			v.refuse("issuingCA.lifetime", "%s is shorter than %d × %s %s = %s: raise issuingCA.lifetime or lower %s",
				issuing, issuingPerLeaf, where, ttl, issuingPerLeaf*ttl, where)
		}
	}
	if issuing < issuingPerServer*server {
		v.refuse("issuingCA.lifetime",
			"%s is shorter than %d × csr.serverCertificateTTL %s = %s: raise issuingCA.lifetime or lower csr.serverCertificateTTL",
			issuing, issuingPerServer, server, issuingPerServer*server)
	}
}

func (v *validation) callers(c Callers) {
	if c.ClockSkew.Std() > maxClockSkew {
		v.refuse("callers.clockSkew", "%s is more than %s: expired tokens would count for as long; set the clocks that differ",
			c.ClockSkew, Duration(maxClockSkew))
	} else if c.ClockSkew.Std() < time.Second {
		v.refuse("callers.clockSkew", "%s is less than 1s: times in tokens are whole seconds", c.ClockSkew)
	}
	if v.seconds("callers.joinTokens.maxTTL", c.JoinTokens.MaxTTL) && c.JoinTokens.MaxTTL.Std() > maxJoinToken {
		v.refuse("callers.joinTokens.maxTTL", "%s is more than %s: whoever finds a join token becomes the machine that it was made for",
			c.JoinTokens.MaxTTL, Duration(maxJoinToken))
	}
	for i, text := range c.JoinTokens.Identities {
		if _, err := ca.ParseIdentityPattern(text); err != nil {
			v.refuse(fmt.Sprintf("callers.joinTokens.identities[%d]", i), "%v", err)
		}
	}
	v.once("callers.joinTokens.identities", c.JoinTokens.Identities)
	v.once("callers.clientCertificates.otherIssuers", c.ClientCertificates.OtherIssuers)
	for i, path := range c.ClientCertificates.OtherIssuers {
		if path == "" {
			v.refuse(fmt.Sprintf("callers.clientCertificates.otherIssuers[%d]", i), "it is empty: name a PEM file")
		}
	}
	names, issuers := map[string]int{}, map[string]int{}
	for i, issuer := range c.TokenIssuers {
		path := fmt.Sprintf("callers.tokenIssuers[%d]", i)
		if first, twice := names[issuer.Name]; twice && issuer.Name != "" {
			v.refuse(path+".name", "%q is the name of callers.tokenIssuers[%d] too: the ledger could not tell them apart", shorten(issuer.Name), first)
		}
		if first, twice := issuers[issuer.Issuer]; twice && issuer.Issuer != "" {
			v.refuse(path+".issuer", "%s is the issuer of callers.tokenIssuers[%d] too: a token could not be told whose it is", shorten(issuer.Issuer), first)
		}
		names[issuer.Name], issuers[issuer.Issuer] = i, i
		v.tokenIssuer(path, issuer)
	}
}

var issuerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

func (v *validation) tokenIssuer(path string, t TokenIssuer) {
	if t.Name == "" {
		v.refuse(path+".name", "it is required: it names the issuer in the ledger and in logs")
	} else if !issuerName.MatchString(t.Name) {
		v.refuse(path+".name", "%q is not 1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit", shorten(t.Name))
	}
	if v.oneOf(path+".kind", t.Kind, KindKubernetes, KindOIDC) {
		switch {
		case t.Kind == KindOIDC && t.Identity == "":
			v.refuse(path+".identity", "it is required for %s: it makes a SPIFFE ID path of the token's claims", KindOIDC)
		case t.Kind == KindKubernetes && t.Identity != "":
			v.refuse(path+".identity", "it is for %s only: a %s token is for ns/NAMESPACE/sa/ACCOUNT", KindOIDC, KindKubernetes)
		case t.Kind == KindOIDC:
			if _, err := authn.ParseIdentityTemplate(t.Identity); err != nil {
				v.refuse(path+".identity", "%v", err)
			}
		}
	}
	if len(t.Audiences) == 0 {
		v.refuse(path+".audiences", "it is required: without it every token of the issuer would count, whomever it is meant for")
	}
	v.once(path+".audiences", t.Audiences)
	for i, audience := range t.Audiences {
		if audience == "" {
			v.refuse(fmt.Sprintf("%s.audiences[%d]", path, i), "it is empty")
		}
	}
	discovery := t.JWKSFile == "" && t.JWKSURL == ""
	switch {
	case t.Issuer == "":
		v.refuse(path+".issuer", `it is required: the "iss" of its tokens, to the letter`)
	case discovery:
		v.webAddress(path+".issuer", t.Issuer, "; or give jwksFile or jwksURL, and no discovery is needed")
	}
	if t.JWKSFile != "" && t.JWKSURL != "" {
		v.refuse(path+".jwksURL", "jwksFile is given too: keys come from one place. Remove one of the two")
	} else if t.JWKSURL != "" {
		v.webAddress(path+".jwksURL", t.JWKSURL, "")
	}
	if t.JWKSFile != "" && t.CAFile != "" {
		v.refuse(path+".caFile", "with jwksFile nothing is fetched, and no certificate checked: remove one of the two")
	}
	if t.JWKSFile != "" && t.BearerTokenFile != "" {
		v.refuse(path+".bearerTokenFile", "with jwksFile nothing is fetched: remove one of the two")
	}
}

func (v *validation) ledger(l Ledger) {
	if l.Retention.Std() < time.Second {
		v.refuse("ledger.retention", "%s is less than 1s", l.Retention)
	} else if l.Retention.Std() < day {
		v.warn("ledger.retention", "%s is less than %s: who had a certificate cannot be looked up for long", l.Retention, Duration(day))
	}
}

// seconds makes sure that a lifetime is one that a certificate or token can have.
func (v *validation) seconds(path string, d Duration) bool {
	switch {
	case d <= 0:
		v.refuse(path, "%s is not more than 0", d)
	case d.Std() > maxDuration:
		v.refuse(path, "%s is more than 100 years", d)
	case d.Std()%time.Second != 0:
		v.refuse(path, "%s is not a whole number of seconds", d)
	default:
		return true
	}
	return false
}

func (v *validation) keyType(path, text string) {
	v.oneOf(path, text, string(ca.P256), string(ca.P384), string(ca.RSA2048), string(ca.RSA3072), string(ca.RSA4096))
}

func (v *validation) oneOf(path, text string, valid ...string) bool {
	if slices.Contains(valid, text) {
		return true
	}
	last := len(valid) - 1
	v.refuse(path, "%q is not %s or %s", shorten(text), strings.Join(valid[:last], ", "), valid[last])
	return false
}

func (v *validation) once(path string, list []string) {
	seen := map[string]bool{}
	for i, text := range list {
		if seen[text] {
			v.refuse(fmt.Sprintf("%s[%d]", path, i), "%q is there twice", shorten(text))
		}
		seen[text] = true
	}
}

// address makes sure that text is host and port.
func (v *validation) address(path, text string) bool {
	scheme, _, isURL := strings.Cut(text, "://")
	host, port, err := net.SplitHostPort(text)
	_, badPort := strconv.ParseUint(port, 10, 16)
	_, noIP := netip.ParseAddr(host)
	switch {
	case isURL:
		v.refuse(path, "%q is a URL: write HOST:PORT without %s://", shorten(text), shorten(scheme))
	case err != nil:
		v.refuse(path, `%q is not an address and port, like "127.0.0.1:15012" or "[::1]:15012"`, shorten(text))
	case badPort != nil:
		v.refuse(path, "the port %q is not a number from 0 to 65535", shorten(port))
	case noIP != nil && host != "" && !dnsName(host):
		v.refuse(path, "the host %q is neither an IP address nor a DNS name", shorten(host))
	default:
		return true
	}
	return false
}

// webAddress makes sure that text is a URL where keys can be fetched so that nobody in between can change them. No
// error shows a password that stands in it.
func (v *validation) webAddress(path, text, otherwise string) {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		v.refuse(path, "it is not a URL%s", otherwise)
	case u.User != nil:
		v.refuse(path, "it has a user name or password, which would stand in logs: remove them, and see bearerTokenFile")
	case u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "":
		v.refuse(path, "%q is not a URL like https://issuer.example%s", shorten(text), otherwise)
	case u.Scheme == "http" && !loopback(u.Hostname()):
		v.refuse(path, "%q is http, so that anybody on the way could put in keys of their own: use https%s", shorten(text), otherwise)
	case u.Fragment != "" || u.RawQuery != "":
		v.refuse(path, "%q has a query or a fragment: remove it", shorten(text))
	}
}

func loopback(host string) bool {
	address, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && address.IsLoopback()
}

// anyAddress says whether host stands for all addresses of the machine.
func anyAddress(host string) bool {
	address, err := netip.ParseAddr(host)
	return host == "" || err == nil && address.IsUnspecified()
}

var dnsLabel = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)

// dnsName judges by RFC 1123 2.1. A name whose last label is a number would be taken for an address.
func dnsName(name string) bool {
	labels := strings.Split(name, ".")
	for _, label := range labels {
		if !dnsLabel.MatchString(label) {
			return false
		}
	}
	_, err := strconv.ParseUint(labels[len(labels)-1], 10, 64)
	return err != nil && len(name) <= 253
}
