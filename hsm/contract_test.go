package hsm_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"strings"
	"sync"
	"testing"

	"kedge/hsm"
	"kedge/test/hsmparts"
)

// each runs a test on a token of each kind.
func each(t *testing.T, test func(t *testing.T, p *hsmparts.Part)) {
	for _, name := range []string{"SoftHSM", "NSS", "TPM", "opencryptoki"} {
		t.Run(name, func(t *testing.T) { test(t, hsmparts.All()[name](t)) })
	}
}

func open(t *testing.T, p *hsmparts.Part, change func(*hsm.Options)) *hsm.Token {
	t.Helper()
	o := p.Options()
	if change != nil {
		change(&o)
	}
	token, err := hsm.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { token.Close() })
	return token
}

func generate(t *testing.T, token *hsm.Token, spec hsm.Spec, label string) (*hsm.Signer, hsm.Key) {
	t.Helper()
	signer, key, err := token.Generate(t.Context(), spec, label, []byte(label))
	if err != nil {
		t.Fatal(err)
	}
	return signer, key
}

// signs makes sure that a signer signs.
func signs(t testing.TB, s *hsm.Signer) {
	t.Helper()
	if err := sign(s); err != nil {
		t.Error(err)
	}
}

func sign(s crypto.Signer) error {
	for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384} {
		h := hash.New()
		h.Write([]byte("a certificate"))
		digest := h.Sum(nil)
		signature, err := s.Sign(rand.Reader, digest, hash)
		if err != nil {
			return err
		}
		if err := goodAs(s, hash, digest, signature); err != nil {
			return err
		}
	}
	return nil
}

// goodAs says whether a signature is what was asked for.
func goodAs(s crypto.Signer, opts crypto.SignerOpts, digest, signature []byte) error {
	pss, isPSS := opts.(*rsa.PSSOptions)
	ok := false
	switch pub := s.Public().(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(pub, digest, signature)
	case *rsa.PublicKey:
		if isPSS {
			ok = rsa.VerifyPSS(pub, opts.HashFunc(), digest, signature, pss) == nil
		} else {
			ok = rsa.VerifyPKCS1v15(pub, opts.HashFunc(), digest, signature) == nil
		}
	}
	if !ok {
		return errors.New("a signature that does not verify was returned")
	}
	return nil
}

func TestEveryModuleMakesFindsAndUsesKeys(t *testing.T) {
	each(t, func(t *testing.T, p *hsmparts.Part) {
		token := open(t, p, nil)
		info, err := token.Info(t.Context())
		if err != nil || info.Label != "tok" || info.Module != p.URI.ModulePath || len(info.Mechanisms) == 0 {
			t.Fatalf("the token says of itself %+v, %v", info, err)
		}
		for _, spec := range p.Specs {
			signer, key := generate(t, token, spec, "kedge-"+string(spec))
			if key.Spec != spec || key.Label != "kedge-"+string(spec) || key.Sensitive == hsm.No || key.Extractable == hsm.Yes || key.AlwaysAuthenticate == hsm.Yes {
				t.Errorf("%s: %+v", spec, key)
			}
			signs(t, signer)
			found, again, err := token.Find(t.Context(), signer.Public())
			if err != nil || again.Label != key.Label {
				t.Fatalf("finding the %s by its public half: %v %v", key, again, err)
			}
			signs(t, found)
			if _, _, err := token.Generate(t.Context(), spec, "kedge-"+string(spec), []byte("other")); !errors.Is(err, hsm.ErrExists) {
				t.Errorf("making it once more: %v", err)
			}
		}
		generate(t, token, p.Specs[0], "kedge-last")
		keys, err := token.Keys(t.Context())
		if err != nil || len(keys) != len(p.Specs)+1 {
			t.Errorf("%d keys are listed, %v", len(keys), err)
		}
		stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := token.Find(t.Context(), stranger.Public()); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("finding a key that is not there: %v", err)
		}
		for range 2 { // the second time it is gone
			if err := token.Delete(t.Context(), keys[0].ID); err != nil {
				t.Error(err)
			}
		}
		if _, _, err := token.Find(t.Context(), keys[0].Public); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("finding a deleted key: %v", err)
		}
		if err := token.Close(); err != nil {
			t.Error(err)
		}
		if _, err := token.Keys(t.Context()); !errors.Is(err, hsm.ErrClosed) {
			t.Errorf("after the end: %v", err)
		}
		again := open(t, p, nil) // another run of the program
		last := keys[len(keys)-1]
		signer, _, err := again.Find(t.Context(), last.Public)
		if err != nil {
			t.Fatal(err)
		}
		signs(t, signer)
	})
}

func TestManySignAtOnce(t *testing.T) {
	each(t, func(t *testing.T, p *hsmparts.Part) {
		token := open(t, p, nil)
		signer, _ := generate(t, token, p.Specs[0], "kedge")
		var all sync.WaitGroup
		for range 16 {
			all.Go(func() {
				for range 4 {
					if err := sign(signer); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		token.Look()
		if n := token.Restarts(); n != 1 || token.Problem() != nil {
			t.Errorf("%d children were started, and the problem is %v", n, token.Problem())
		}
	})
}

func TestPSSIsSignedWithASaltAsLongAsTheHashOrRefusedClearly(t *testing.T) {
	digest := sha256.Sum256([]byte("x"))
	each(t, func(t *testing.T, p *hsmparts.Part) {
		token := open(t, p, nil)
		signer, _ := generate(t, token, hsm.RSA2048, "kedge")
		opts := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
		signature, err := signer.Sign(rand.Reader, digest[:], opts)
		if p.Name == "TPM" { // tpm2-pkcs11 does so for TPMs of which somebody has told it that their salt is as long as the hash
			if err == nil || errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "PKCS #1 v1.5") {
				t.Errorf("a module that makes none: %v", err)
			}
		} else if err != nil {
			t.Error(err)
		} else if err := goodAs(signer, opts, digest[:], signature); err != nil {
			t.Error(err)
		}
		if _, err := signer.Sign(rand.Reader, digest[:], &rsa.PSSOptions{SaltLength: 20, Hash: crypto.SHA256}); err == nil || !strings.Contains(err.Error(), "salt") {
			t.Errorf("another salt: %v", err)
		}
		signs(t, signer)
		if n := token.Restarts(); n != 1 {
			t.Errorf("%d children were started", n)
		}
	})
}

func TestRequestsThatMakeNoSenseCostNoGeneration(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	token := open(t, p, nil)
	signer, _ := generate(t, token, hsm.P256, "kedge")
	sum := sha512.Sum512([]byte("x"))
	if _, err := signer.Sign(rand.Reader, sum[:5], crypto.SHA256); err == nil {
		t.Error("a digest of 5 octets was signed")
	}
	if _, err := signer.Sign(rand.Reader, sum[:], crypto.SHA256); err == nil {
		t.Error("a digest of another hash was signed")
	}
	if _, _, err := token.Generate(t.Context(), "P-224", "x", []byte("x")); err == nil {
		t.Error("a key of an unknown kind was made")
	}
	if _, _, err := token.Generate(t.Context(), hsm.P256, "", nil); err == nil {
		t.Error("a key without a name was made")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := signer.SignContext(ctx, sum[:32], crypto.SHA256); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled signature: %v", err)
	}
	signs(t, signer)
	if n := token.Restarts(); n != 1 {
		t.Errorf("%d children were started", n)
	}
}

func TestTheTokenIsChosenByWhatItSaysOfItself(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	p.AddToken(t, "other")
	token := open(t, p, nil)
	generate(t, token, hsm.P256, "kedge")
	info, err := token.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	bySerial := open(t, p, func(o *hsm.Options) { o.URI.Token, o.URI.Serial = "", info.Serial })
	if keys, err := bySerial.Keys(t.Context()); err != nil || len(keys) != 1 {
		t.Errorf("by its serial number: %d keys, %v", len(keys), err)
	}
	missing := open(t, p, func(o *hsm.Options) { o.URI.Token = "nobody" })
	if _, err := missing.Keys(t.Context()); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), `"other"`) || !strings.Contains(err.Error(), `"tok"`) {
		t.Errorf("a token that is not there: %v", err)
	}
	p.AddToken(t, "other")
	twice := open(t, p, func(o *hsm.Options) { o.URI.Token = "other" })
	if _, err := twice.Keys(t.Context()); err == nil || !strings.Contains(err.Error(), "several tokens fit") {
		t.Errorf("a label that two tokens have: %v", err)
	}
}

func TestSeveralKeysThatFitAreAnError(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	token := open(t, p, nil)
	generate(t, token, hsm.P256, "one")
	signer, _ := generate(t, token, hsm.P256, "two")
	both := open(t, p, func(o *hsm.Options) { o.URI.Object = "" })
	if _, _, err := both.FindObject(t.Context()); err == nil || !strings.Contains(err.Error(), "names no key") {
		t.Errorf("no name: %v", err)
	}
	named := open(t, p, func(o *hsm.Options) { o.URI.Object = "two" })
	if found, _, err := named.FindObject(t.Context()); err != nil || !found.Public().(*ecdsa.PublicKey).Equal(signer.Public()) {
		t.Errorf("by its label: %v", err)
	}
	missing := open(t, p, func(o *hsm.Options) { o.URI.Object = "three" })
	if _, _, err := missing.FindObject(t.Context()); !errors.Is(err, hsm.ErrNotFound) || !strings.Contains(err.Error(), `"three"`) {
		t.Errorf("by another label: %v", err)
	}
	p.Generate(t, "twin", "0a")
	p.Generate(t, "twin", "0b")
	twins := open(t, p, func(o *hsm.Options) { o.URI.Object = "twin" })
	if _, _, err := twins.FindObject(t.Context()); !errors.Is(err, hsm.ErrAmbiguous) || !strings.Contains(err.Error(), "2 private keys on the token fit") {
		t.Errorf("by a label that two have: %v", err)
	}
	twins = open(t, p, func(o *hsm.Options) { o.URI.Object, o.URI.ID = "twin", []byte{0x0b} })
	if _, key, err := twins.FindObject(t.Context()); err != nil || string(key.ID) != "\x0b" {
		t.Errorf("by a label that two have, and an id: %+v, %v", key, err)
	}
}

func TestAKeyThatWantsThePINForEachSignatureIsRefused(t *testing.T) {
	p := hsmparts.SoftHSM(t)
	p.GenerateAlwaysAuthenticate(t, "always", "0a")
	token := open(t, p, nil)
	keys, err := token.Keys(t.Context())
	if err != nil || len(keys) != 1 || keys[0].AlwaysAuthenticate != hsm.Yes {
		t.Fatalf("the token says %+v, %v", keys, err)
	}
	if _, _, err := token.Find(t.Context(), keys[0].Public); !errors.Is(err, hsm.ErrRefused) || !strings.Contains(err.Error(), "CKA_ALWAYS_AUTHENTICATE") {
		t.Errorf("by its public half: %v", err)
	}
	if _, _, err := token.FindID(t.Context(), keys[0].ID); !errors.Is(err, hsm.ErrRefused) {
		t.Errorf("by its id: %v", err)
	}
	if n := token.Restarts(); n != 1 {
		t.Errorf("%d children were started", n)
	}
}
