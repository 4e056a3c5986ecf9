package authn_test

import (
	"testing"

	"github.com/go-jose/go-jose/v4"

	"kedge/issuer/authn"
)

// BenchmarkToken is what it costs to find out who holds a service account token, verifying its signature included.
func BenchmarkToken(b *testing.B) {
	for _, key := range []signer{newSigner(b, "k1"), {"rs", jose.RS256, rsaKey()}} {
		b.Run(string(key.alg), func(b *testing.B) {
			server := newKeyServer(b, key)
			a := start(b, authn.Options{Issuers: []authn.IssuerConfig{server.config()}})
			token := key.sign(b, a.claims(server.URL))
			a.accepts(b, token)
			for b.Loop() {
				if _, err := a.ask("Bearer " + token); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
