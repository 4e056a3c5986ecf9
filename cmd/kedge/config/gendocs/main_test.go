package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestThePagesAreWhatTheCodeSays(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	for page, generate := range pages {
		want, err := generate()
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(root, page))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs from the comments in the code: run go run ./cmd/kedge/config/gendocs", page)
		}
	}
}
