package istio

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// toldAgent is all that a refused agent may learn: the code, and an id to look for in the CA's log.
var toldAgent = regexp.MustCompile(`code = Unauthenticated desc = not authenticated; the CA's log says why \(request id ([0-9a-f]+)\)`)

func TestWhoeverProvesNothingGetsNothingAndTheCAsLogSaysWhy(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		token  func(*testing.T, *kedge) []byte
		reason string // a word that the CA's log must have
	}{
		"wrong audience":   {func(t *testing.T, k *kedge) []byte { return k.issuer.sign(t, token{audience: "vault"}) }, "audience"},
		"expired token":    {func(t *testing.T, k *kedge) []byte { return k.issuer.sign(t, token{expired: true}) }, "expired"},
		"unknown issuer":   {func(t *testing.T, k *kedge) []byte { return newIssuer(t, "https://elsewhere.example").sign(t, token{}) }, "issuer"},
		"a stranger's key": {func(t *testing.T, k *kedge) []byte { return newIssuer(t, k.issuer.url).sign(t, token{}) }, "signature"},
		"not a token":      {func(*testing.T, *kedge) []byte { return []byte("hello") }, "token"},
		"no token":         {func(*testing.T, *kedge) []byte { return nil }, "token"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := startKedge(t)
			a := newAgent(t, k, c.token(t, k))
			a.start(t, "ECC_SIGNATURE_ALGORITHM=ECDSA")
			var told [][][]byte
			eventually(t, "the agent to be refused twice", func() error {
				if told = toldAgent.FindAllSubmatch(a.process.log(), -1); len(told) == 0 || string(told[0][1]) == string(told[len(told)-1][1]) {
					return fmt.Errorf("it logged %d lines about it", len(told))
				}
				return nil
			})
			if err := a.noCertificate(); err != nil {
				t.Error(err)
			}
			id := string(told[0][1])
			reason := ""
			for _, r := range k.refusals() {
				if r.RequestID == id {
					reason = r.Reason
				}
			}
			if !strings.Contains(strings.ToLower(reason), c.reason) {
				t.Errorf("the CA's log gives the reason %q for the request %s, which does not say %q", reason, id, c.reason)
			}
			if text := c.token(t, k); len(text) > 20 && strings.Contains(string(k.process.log()), string(text[:len(text)-10])) {
				t.Error("the CA's log holds the token")
			}
			if records := k.ledger(t); len(records) != 0 {
				t.Errorf("the ledger has %d SVIDs", len(records))
			}
		})
	}
}
