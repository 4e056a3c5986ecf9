package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestThePageIsWhatTheCodeSays(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	want, err := generate()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(root, page))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs from the comments in %s: run go run ./cmd/kedge/config/gendocs", page, source)
	}
}
