package main

import (
	"log/slog"
	"maps"
	"slices"
	"testing"

	"kedge/cmd/kedge/config"
	"kedge/hsm"
)

// Two children would log in twice, and try a wrong PIN twice; and a TPM has room for few.
func TestRootAndKeyStoreInOneTokenShareIt(t *testing.T) {
	c := config.Default()
	o := &origins{}
	defer o.close()
	var tokens []*hsm.Token
	for _, text := range []string{"pkcs11:token=a;object=root?module-path=/m.so&pin-source=/p", "pkcs11:token=a;object=issuing?module-path=/m.so&pin-source=/p", "pkcs11:token=b?module-path=/m.so"} {
		uri, err := hsm.ParseURI(text)
		if err != nil {
			t.Fatal(err)
		}
		token, err := o.openToken(c, uri, folders{tokens: t.TempDir()}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, token)
	}
	if tokens[0] != tokens[1] || tokens[0] == tokens[2] {
		t.Error("a token is opened twice, or two are taken for one")
	}
}

func TestEveryKindThatAConfigurationMayNameIsOpened(t *testing.T) {
	if named, opened := slices.Sorted(slices.Values(config.RootKinds())), slices.Sorted(maps.Keys(rootOpeners)); !slices.Equal(named, opened) {
		t.Errorf("the roots %v can be configured, and %v opened", named, opened)
	}
	if named, opened := slices.Sorted(slices.Values(config.KeyStores())), slices.Sorted(maps.Keys(keyOpeners)); !slices.Equal(named, opened) {
		t.Errorf("the key stores %v can be configured, and %v opened", named, opened)
	}
}
