package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"
)

// ProfileConfig is a signing profile as a person writes it. NewProfile makes a Profile of it, which is valid.
// Begin with DefaultProfileConfig: a zero ProfileConfig is not valid. All durations are whole seconds, as X.509 times are.
type ProfileConfig struct {
	DefaultTTL    time.Duration // granted when the caller names none
	MaxTTL        time.Duration // never more than this
	MinTTL        time.Duration // below this nothing is issued
	OverMax       string        // "clamp": grant MaxTTL and count it; "refuse": the call is invalid
	Backdate      time.Duration // how far notBefore lies before now, at most; never more than a tenth of the TTL
	ExtraKeys     []string      // key types allowed besides RSA 2048–4096, P-256 and P-384: "P-521", "Ed25519"
	MaxLineageAge time.Duration // how long client certificates may renew each other since the last other proof; 0: for ever
	Identities    []string      // patterns of the SPIFFE ID paths that may ask for this profile; empty: all
}

// What a ProfileConfig says about a caller that asks for more than MaxTTL.
const (
	OverMaxClamp  = "clamp"
	OverMaxRefuse = "refuse"
)

const (
	// ShortTTL is the shortest lifetime that needs no warning: agents renew at half of it, and need time for some retries.
	ShortTTL = 5 * time.Minute
	// LimitTTL is the longest lifetime that a profile can have.
	LimitTTL = 10 * 365 * 24 * time.Hour

	longTTL       = 90 * 24 * time.Hour        // istiod's own maximum, and the longest lifetime that needs no warning
	limitBackdate = time.Hour                  // more hides a broken clock
	limitLineage  = 100 * 365 * 24 * time.Hour //

	minRSABits = 2048
	maxRSABits = 4096
	// minRSAExponent is the smallest public exponent that FIPS 186-5 A.1.1 allows (2^16 < e < 2^256, odd); crypto/rsa takes 31 bits.
	minRSAExponent = 1<<16 + 1
	maxRSAExponent = 1<<31 - 1
)

// DefaultProfileConfig is what holds where nothing is configured: 24 hours and never more, at least 5 minutes, a longer wish
// is clamped, backdated by a minute.
func DefaultProfileConfig() ProfileConfig {
	return ProfileConfig{
		DefaultTTL: 24 * time.Hour,
		MaxTTL:     24 * time.Hour,
		MinTTL:     ShortTTL,
		OverMax:    OverMaxClamp,
		Backdate:   time.Minute,
	}
}

// Profile decides what an SVID may be: how long it lives, for which keys, for whom. It is valid, since it comes from
// NewProfile only, and never changes, so that its methods may be called at once from several goroutines.
type Profile struct {
	name        string
	config      ProfileConfig
	extraKeys   map[string]bool
	identities  []IdentityPattern
	allowedKeys string // for error texts
	warnings    []string
}

// profileName is what a profile may be called: what a caller writes as CertSigner.
var profileName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$`)

// NewProfile makes a valid profile, or joins everything that is wrong: each error names a field, as it is called in the
// configuration, and its value.
func NewProfile(name string, c ProfileConfig) (*Profile, error) {
	var wrong []error
	refuse := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }
	if !profileName.MatchString(name) {
		refuse("the name %.64q is not 1 to 64 letters, digits, '.', '_', '-' and '/', beginning with a letter or digit", name)
	}
	whole := true // the durations are each fit to be compared
	positive := func(field string, d time.Duration) {
		switch {
		case d <= 0:
			refuse("%s %s is not more than 0", field, DurationText(d))
		case d > LimitTTL:
			refuse("%s %s is more than 10 years", field, DurationText(d))
		case d%time.Second != 0:
			refuse("%s %s is not a whole number of seconds", field, DurationText(d))
		default:
			return
		}
		whole = false
	}
	positive("minTTL", c.MinTTL)
	positive("defaultTTL", c.DefaultTTL)
	positive("maxTTL", c.MaxTTL)
	if whole && c.MinTTL > c.DefaultTTL {
		refuse("minTTL %s is more than defaultTTL %s", DurationText(c.MinTTL), DurationText(c.DefaultTTL))
	}
	if whole && c.DefaultTTL > c.MaxTTL {
		refuse("defaultTTL %s is more than maxTTL %s", DurationText(c.DefaultTTL), DurationText(c.MaxTTL))
	}
	switch {
	case c.Backdate < 0:
		refuse("backdate %s is negative", DurationText(c.Backdate))
	case c.Backdate > limitBackdate:
		refuse("backdate %s is more than %s: set the clocks that differ by so much", DurationText(c.Backdate), DurationText(limitBackdate))
	case c.Backdate%time.Second != 0:
		refuse("backdate %s is not a whole number of seconds", DurationText(c.Backdate))
	}
	switch {
	case c.MaxLineageAge < 0:
		refuse("maxLineageAge %s is negative; 0 means for ever", DurationText(c.MaxLineageAge))
	case c.MaxLineageAge > limitLineage:
		refuse("maxLineageAge %s is more than 100 years; 0 means for ever", DurationText(c.MaxLineageAge))
	}
	if c.OverMax != OverMaxClamp && c.OverMax != OverMaxRefuse {
		refuse("overMax %.40q is neither %q nor %q", c.OverMax, OverMaxClamp, OverMaxRefuse)
	}
	extra := map[string]bool{}
	for _, key := range c.ExtraKeys {
		switch {
		case key != "P-521" && key != "Ed25519":
			refuse(`extraKeys: %.40q is neither "P-521" nor "Ed25519"; RSA of 2048 to 4096 bits, P-256 and P-384 are always allowed`, key)
		case extra[key]:
			refuse("extraKeys: %q is there twice", key)
		}
		extra[key] = true
	}
	var identities []IdentityPattern
	for _, text := range c.Identities {
		pattern, err := ParseIdentityPattern(text)
		if err != nil {
			refuse("identities: %w", err)
			continue
		}
		identities = append(identities, pattern)
	}
	if len(wrong) > 0 {
		return nil, errors.Join(wrong...)
	}
	c.ExtraKeys, c.Identities = slices.Clone(c.ExtraKeys), slices.Clone(c.Identities)
	allowed := append([]string{fmt.Sprintf("RSA of %d to %d bits", minRSABits, maxRSABits), "P-256", "P-384"}, c.ExtraKeys...)
	last := len(allowed) - 1
	return &Profile{
		name: name, config: c, extraKeys: extra, identities: identities,
		allowedKeys: strings.Join(allowed[:last], ", ") + " and " + allowed[last], warnings: c.warnings(name),
	}, nil
}

// warnings are about what is allowed and rarely meant.
func (c ProfileConfig) warnings(name string) []string {
	var all []string
	warn := func(format string, args ...any) {
		all = append(all, fmt.Sprintf("profile %q: ", name)+fmt.Sprintf(format, args...))
	}
	if c.MinTTL < ShortTTL {
		warn("minTTL %s is less than %s: a workload whose renewal fails for half of that is cut off", DurationText(c.MinTTL), DurationText(ShortTTL))
	}
	if c.MaxTTL > longTTL {
		warn("maxTTL %s is more than %s: a stolen key is of use for as long", DurationText(c.MaxTTL), DurationText(longTTL))
	}
	if c.MaxLineageAge > 0 && c.MaxLineageAge < c.DefaultTTL/2 {
		warn("maxLineageAge %s is less than half of defaultTTL %s, which is when agents renew: no client certificate will ever renew itself",
			DurationText(c.MaxLineageAge), DurationText(c.DefaultTTL))
	}
	return all
}

// Name is what callers give as CertSigner.
func (p *Profile) Name() string { return p.name }

// MinTTL is the shortest lifetime of a certificate; when the chain leaves less, nothing is issued.
func (p *Profile) MinTTL() time.Duration { return p.config.MinTTL }

// MaxTTL is the longest lifetime of a certificate.
func (p *Profile) MaxTTL() time.Duration { return p.config.MaxTTL }

// MaxLineageAge is how long client certificates may renew each other since the last other proof. 0: for ever.
func (p *Profile) MaxLineageAge() time.Duration { return p.config.MaxLineageAge }

// Warnings are sentences about what is allowed and rarely meant, for the person who wrote the profile.
func (p *Profile) Warnings() []string { return slices.Clone(p.warnings) }

// Lifetime settles how long a certificate lives for which asked was asked; 0 means that nothing was. It is never more than
// MaxTTL: clamped says that more was asked. Parts of a second do not count. Errors are ErrInvalid.
func (p *Profile) Lifetime(asked time.Duration) (granted time.Duration, clamped bool, err error) {
	c := p.config
	switch {
	case asked < 0:
		return 0, false, Invalid(fmt.Errorf("the validity duration %s is negative: leave it 0 for the default of %s",
			DurationText(asked), DurationText(c.DefaultTTL)))
	case asked == 0:
		return c.DefaultTTL, false, nil
	case asked < c.MinTTL:
		return 0, false, Invalid(fmt.Errorf("the validity duration %s is less than the %s that the profile %q grants at least: "+
			"ask for %d seconds or more, or leave it 0 for the default of %s",
			DurationText(asked), DurationText(c.MinTTL), p.name, c.MinTTL/time.Second, DurationText(c.DefaultTTL)))
	case asked <= c.MaxTTL:
		return asked.Truncate(time.Second), false, nil
	case c.OverMax == OverMaxClamp:
		return c.MaxTTL, true, nil
	}
	return 0, false, Invalid(fmt.Errorf("the validity duration %s is more than the %s that the profile %q grants at most: "+
		"ask for %d seconds or less, or leave it 0 for the default of %s",
		DurationText(asked), DurationText(c.MaxTTL), p.name, c.MaxTTL/time.Second, DurationText(c.DefaultTTL)))
}

// Seconds makes a duration of a number of seconds from outside. What a Duration cannot hold becomes the longest one, or the
// most negative, so that it stays absurd.
func Seconds(n int64) time.Duration {
	switch {
	case n > math.MaxInt64/int64(time.Second):
		return math.MaxInt64
	case n < math.MinInt64/int64(time.Second):
		return math.MinInt64
	}
	return time.Duration(n) * time.Second
}

// Backdate is how far notBefore lies before now in a certificate that lives for ttl from now: what is configured, and at most
// a tenth of ttl. ztunnel renews at notBefore + lifetime/2: were the backdate as long as the TTL, it would renew without pause.
func (p *Profile) Backdate(ttl time.Duration) time.Duration {
	return max(0, min(p.config.Backdate, ttl/10)).Truncate(time.Second)
}

// AllowsIdentity says whether a caller whose SPIFFE ID has this path ("/ns/default/sa/web") may use the profile.
func (p *Profile) AllowsIdentity(path string) bool {
	return len(p.identities) == 0 || slices.ContainsFunc(p.identities, func(pattern IdentityPattern) bool { return pattern.Matches(path) })
}

// AllowsKey judges the public key of a CSR before anything is verified with it. Errors are ErrInvalid and say what was sent
// and what is allowed. RSA: 2048 to 4096 bits, an odd modulus, an odd public exponent of at least 65537 (FIPS 186-5 A.1.1).
func (p *Profile) AllowsKey(pub crypto.PublicKey) error {
	refused := func(format string, args ...any) error {
		return Invalid(fmt.Errorf("%s; the profile %q allows %s", fmt.Sprintf(format, args...), p.name, p.allowedKeys))
	}
	switch key := pub.(type) {
	case *rsa.PublicKey:
		bits := key.N.BitLen()
		switch {
		case bits < minRSABits || bits > maxRSABits:
			return refused("RSA of %d bits", bits)
		case key.N.Bit(0) == 0:
			return refused("RSA with an even modulus, which is no product of two primes")
		case key.E < minRSAExponent || key.E > maxRSAExponent || key.E%2 == 0:
			return refused("RSA with the public exponent %d, which is not an odd number from %d to %d", key.E, minRSAExponent, maxRSAExponent)
		}
		return nil
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P256() || key.Curve == elliptic.P384() || key.Curve == elliptic.P521() && p.extraKeys["P-521"] {
			return nil
		}
	case ed25519.PublicKey:
		if len(key) == ed25519.PublicKeySize && p.extraKeys["Ed25519"] {
			return nil
		}
	}
	return refused("%s", KeyType(pub))
}

// DurationText writes a duration as people do: no zeros, and days where that is exact: 24h, 7d, 1h30m.
func DurationText(d time.Duration) string {
	const day = 24 * time.Hour
	if d >= 2*day && d%day == 0 {
		return fmt.Sprintf("%dd", d/day)
	}
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}
