package ca

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// IdentityPattern matches the paths of SPIFFE IDs, segment by segment: "ns/*/sa/web-*". A "*" stands for any run of characters
// within one segment, the empty one included where it stands beside others; it never reaches over a "/".
type IdentityPattern struct {
	text     string
	segments []string
}

const (
	maxPattern      = 1024 // octets
	maxPatternStars = 8    // in one segment
)

// ParseIdentityPattern reads a pattern, with or without a leading slash.
func ParseIdentityPattern(text string) (IdentityPattern, error) {
	fail := func(format string, args ...any) (IdentityPattern, error) {
		return IdentityPattern{}, fmt.Errorf("the identity pattern %.80q %s; write it like ns/*/sa/web", text, fmt.Sprintf(format, args...))
	}
	if len(text) > maxPattern {
		return fail("has more than %d octets", maxPattern)
	}
	segments := strings.Split(strings.TrimPrefix(text, "/"), "/")
	for _, segment := range segments {
		if strings.Contains(segment, "**") { // elsewhere that means any number of segments
			return fail(`has "**", and a star stays within one segment: write one segment for each, with one star`)
		}
		if strings.Count(segment, "*") > maxPatternStars {
			return fail("has more than %d stars in one segment", maxPatternStars)
		}
		// A star stands for characters that a segment may have, so the rest is a segment on its own.
		if err := spiffeid.ValidatePathSegment(strings.ReplaceAll(segment, "*", "x")); err != nil {
			return fail("has the segment %q, which no SPIFFE ID has (%v)", segment, err)
		}
	}
	return IdentityPattern{text: strings.Join(segments, "/"), segments: segments}, nil
}

// String is the pattern without a leading slash.
func (p IdentityPattern) String() string { return p.text }

// Matches says whether the path of a SPIFFE ID ("/ns/default/sa/web") is one that the pattern means. The zero pattern matches nothing.
func (p IdentityPattern) Matches(path string) bool {
	segments := strings.Split(strings.TrimPrefix(path, "/"), "/")
	if len(p.segments) == 0 || len(segments) != len(p.segments) {
		return false
	}
	for i, pattern := range p.segments {
		if segments[i] == "" || !matchSegment(pattern, segments[i]) {
			return false
		}
	}
	return true
}

// matchSegment matches greedily from the left: the first part at the beginning, the last at the end, each other at its first place.
func matchSegment(pattern, text string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == text
	}
	first, last := parts[0], parts[len(parts)-1]
	if len(text) < len(first)+len(last) || !strings.HasPrefix(text, first) || !strings.HasSuffix(text, last) {
		return false
	}
	text = text[len(first) : len(text)-len(last)]
	for _, part := range parts[1 : len(parts)-1] {
		_, after, found := strings.Cut(text, part)
		if !found {
			return false
		}
		text = after
	}
	return true
}
