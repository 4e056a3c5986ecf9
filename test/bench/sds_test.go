package main

import (
	"path/filepath"
	"strings"
	"testing"
)

// TestARootReachesEveryStream keeps the harness from measuring nothing, over either kind of connection. It builds the program with connections in memory.
func TestARootReachesEveryStream(t *testing.T) {
	b := newBench(t)
	var err error
	if b.source, err = filepath.Abs("../.."); err != nil {
		t.Fatal(err)
	}
	b.streams, b.pushCount, b.idle = 40, 2, 20
	text, err := b.sds(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, says := range []string{"A new root for 40 Envoys", "20 idle streams", "| Kedge | ", "| bare | ", " | 1.00 (1.00–1.00) | "} {
		if !strings.Contains(text, says) {
			t.Errorf("the result does not have %q:\n%s", says, text)
		}
	}
}
