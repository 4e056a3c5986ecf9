package ca

import (
	"regexp"
	"strings"
	"testing"
)

func TestIdentityPatternsMatchWithinSegments(t *testing.T) {
	for _, c := range []struct {
		pattern string
		yes, no []string
	}{
		{"ns/default/sa/web", []string{"/ns/default/sa/web"}, []string{"/ns/default/sa/webs", "/ns/default/sa", "/ns/default/sa/web/x", "", "/", "/NS/default/sa/web"}},
		{"/ns/default/sa/web", []string{"/ns/default/sa/web"}, []string{"/ns/default/sa/we"}},
		{"ns/*/sa/*", []string{"/ns/a/sa/b", "/ns/a.b/sa/c_d-e"}, []string{"/ns/a/b/sa/c", "/ns/a/sa/", "/ns//sa/b", "/ns/a/sa", "/ns/a/sa/b/c"}},
		{"ns/prod/sa/web-*", []string{"/ns/prod/sa/web-1", "/ns/prod/sa/web-", "/ns/prod/sa/web-a-b"}, []string{"/ns/prod/sa/web", "/ns/prod/sa/xweb-1", "/ns/prod/sa/web-/x"}},
		{"*-web", []string{"/a-web", "/-web", "/-web-web"}, []string{"/a-webs", "/web"}},
		{"a*b*c", []string{"/abc", "/axbxc", "/abbcc", "/abcbc"}, []string{"/ac", "/acb", "/ab", "/abcd"}},
		{"aa*aa", []string{"/aaaa", "/aaxaa"}, []string{"/aaa", "/aa"}},
		{"*", []string{"/a"}, []string{"/", "", "/a/b"}},
	} {
		pattern, err := ParseIdentityPattern(c.pattern)
		if err != nil {
			t.Errorf("%q: %v", c.pattern, err)
			continue
		}
		if want := strings.TrimPrefix(c.pattern, "/"); pattern.String() != want {
			t.Errorf("%q prints as %q", c.pattern, pattern)
		}
		for _, path := range c.yes {
			if !pattern.Matches(path) {
				t.Errorf("%q does not match %q", c.pattern, path)
			}
		}
		for _, path := range c.no {
			if pattern.Matches(path) {
				t.Errorf("%q matches %q", c.pattern, path)
			}
		}
	}
	if (IdentityPattern{}).Matches("") || (IdentityPattern{}).Matches("/a") {
		t.Error("the zero pattern matches")
	}
}

func TestPatternsThatNoIdentityCanHaveAreRefused(t *testing.T) {
	for _, text := range []string{"", "/", "//a", "ns//sa/*", "ns/a/", "ns/./sa/b", "ns/../sa/b", "spiffe://td/ns/a", "ns/a b", "ns/ä", "ns/a%20", "ns/a?", "ns/[ab]",
		"ns/" + strings.Repeat("*a", 9), "**", "ns/**", "ns/**/sa/web", "ns/a**b", strings.Repeat("a", 1025), "ns/a\x00", "{claim:sub}"} {
		if pattern, err := ParseIdentityPattern(text); err == nil {
			t.Errorf("%q is taken as %q", text, pattern)
		} else if !strings.Contains(err.Error(), "write it like ns/*/sa/web") || len(err.Error()) > 400 {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// A pattern means the regular expression that has [^/]* for each star, over paths without empty segments.
func FuzzIdentityPattern(f *testing.F) {
	for _, seed := range [][2]string{{"ns/*/sa/*", "/ns/a/sa/b"}, {"a*b*c", "/abcbc"}, {"web-*", "/web-"}, {"../*", "/x/y"}, {"*", "//"}} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, text, path string) {
		pattern, err := ParseIdentityPattern(text)
		if err != nil {
			return
		}
		expression := regexp.MustCompile(`^/?` + strings.ReplaceAll(regexp.QuoteMeta(pattern.String()), `\*`, `[^/]*`) + `$`)
		want := expression.MatchString(path)
		for _, segment := range strings.Split(strings.TrimPrefix(path, "/"), "/") {
			want = want && segment != ""
		}
		if strings.ContainsAny(path, "\n") || !strings.HasPrefix(path, "/") {
			return // no path of a SPIFFE ID
		}
		if got := pattern.Matches(path); got != want {
			t.Errorf("pattern %q, path %q: %v, want %v", text, path, got, want)
		}
		if again, err := ParseIdentityPattern(pattern.String()); err != nil || again.String() != pattern.String() {
			t.Errorf("%q does not survive being printed: %v", text, err)
		}
	})
}
