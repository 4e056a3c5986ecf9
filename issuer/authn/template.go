package authn

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/go-jose/go-jose/v4/json"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// IdentityTemplate says how claims of a token make the path of a SPIFFE ID: segments such as "ci/{claim:repository_owner}/{claim:job.name}".
// A dot leads into a claim that is an object. Each segment has at most one claim, besides which it may have text ("web-{claim:env}"): of two
// side by side nobody could tell where one value ends and the other begins.
type IdentityTemplate struct {
	segments []templateSegment
}

// templateSegment is "before{claim:…}after", or only before.
type templateSegment struct {
	before, after string
	claim         []string // the way into nested claims; nil: there is none
}

const maxTemplate = 1024 // octets

var claimName = regexp.MustCompile(`^[A-Za-z0-9_:/-]+(\.[A-Za-z0-9_:/-]+)*$`)

// ParseIdentityTemplate reads a template.
func ParseIdentityTemplate(text string) (IdentityTemplate, error) {
	fail := func(format string, args ...any) (IdentityTemplate, error) {
		return IdentityTemplate{}, fmt.Errorf("the identity template %.200q %s: write it like ci/{claim:repository_owner}", text, fmt.Sprintf(format, args...))
	}
	if text == "" {
		return fail("is empty")
	}
	if len(text) > maxTemplate {
		return fail("has more than %d octets", maxTemplate)
	}
	var t IdentityTemplate
	for rest, more := text, true; more; {
		var s templateSegment
		end := strings.IndexAny(rest, "/{")
		if end >= 0 && rest[end] == '{' {
			name, after, closed := strings.Cut(rest[end+1:], "}") // a claim's name may have slashes
			claim, named := strings.CutPrefix(name, "claim:")
			if !closed || !named || !claimName.MatchString(claim) {
				return fail("has a brace that does not begin {claim:NAME}")
			}
			s.before, s.claim = rest[:end], strings.Split(claim, ".")
			s.after, rest, more = strings.Cut(after, "/")
			if strings.Contains(s.after, "{") {
				return fail("has two claims in one segment: put a slash between them")
			}
		} else {
			s.before, rest, more = strings.Cut(rest, "/")
		}
		if err := spiffeid.ValidatePathSegment(s.fill("x")); err != nil {
			return fail("has a segment that no SPIFFE ID has (%v)", err)
		}
		t.segments = append(t.segments, s)
	}
	return t, nil
}

func (s templateSegment) fill(value string) string {
	if s.claim == nil {
		return s.before
	}
	return s.before + value + s.after
}

// segmentsFor fills the template. A claim's value is validated on its own first, so that it can neither add a segment nor vanish.
func (t IdentityTemplate) segmentsFor(claims map[string]json.RawMessage) ([]string, error) {
	segments := make([]string, 0, len(t.segments))
	for _, s := range t.segments {
		var value string
		if s.claim != nil {
			var err error
			if value, err = stringClaim(claims, s.claim); err != nil {
				return nil, err
			}
		}
		segments = append(segments, s.fill(value))
	}
	return segments, nil
}

func stringClaim(claims map[string]json.RawMessage, path []string) (value string, err error) {
	name, last := strings.Join(path, "."), len(path)-1
	for _, step := range path[:last] {
		var inner map[string]json.RawMessage
		if json.Unmarshal(claims[step], &inner) != nil {
			return "", fmt.Errorf("it has no claim %q", name)
		}
		claims = inner
	}
	raw, there := claims[path[last]]
	if !there {
		return "", fmt.Errorf("it has no claim %q", name)
	}
	if json.Unmarshal(raw, &value) != nil {
		return "", fmt.Errorf("its claim %q is not a string", name)
	}
	if err := spiffeid.ValidatePathSegment(value); err != nil {
		return "", fmt.Errorf("its claim %q has the value %.200q, which cannot be a segment of a SPIFFE ID: %w", name, value, err)
	}
	return value, nil
}
