package crash

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/ca/ledger"
	"kedge/test/process"
)

// TestAnExportFromAPrunedNumberFailsRatherThanLeavingAGap: a SIEM that was away for too long is told which events it lacks, and where they are.
func TestAnExportFromAPrunedNumberFailsRatherThanLeavingAGap(t *testing.T) {
	t.Parallel()
	archive := t.TempDir()
	k := process.New(t, process.Ports+"ledger: {retention: 24h, archiveDir: "+archive+"}\n")
	k.Start(t)
	first := k.Export(t)
	k.Stop(t)

	// A month passes: what the CA does by itself, its folder being nobody else's now.
	book, err := ledger.Open(k.Data, ledger.Options{TrustDomain: "cluster.local", ProgramVersion: "test", Retention: 24 * time.Hour, ArchiveDir: archive})
	if err != nil {
		t.Fatal(err)
	}
	report, err := book.Prune(t.Context(), time.Now().Add(36*time.Hour))
	if err := book.Close(); err != nil {
		t.Fatal(err)
	}
	if err != nil || report.First < 3 || report.First > first[len(first)-1].Number {
		t.Fatalf("%+v, %v: a part of the ledger is to be pruned", report, err)
	}
	if files, err := os.ReadDir(archive); err != nil || len(files) != 1 || report.Archives[0] != filepath.Join(archive, files[0].Name()) {
		t.Fatalf("%v, %v", files, err)
	}
	k.Start(t)

	kept := k.Export(t) // from wherever it begins
	if kept[0].Number != report.First {
		t.Errorf("the export begins with number %d, and %d is the first", kept[0].Number, report.First)
	}
	for _, args := range [][]string{{"export", "--from", "2"}, {"list", "--from", "2"}, {"count", "--from", "2"}, {"show", "2"}} {
		got := k.Run(t, append([]string{"ledger"}, args...)...)
		if got.Code != 1 || strings.Contains(got.Stdout, `"number"`) || !strings.Contains(got.Stderr, " no longer in the ledger, which begins with number ") ||
			!strings.Contains(got.Stderr, "pruned") || !strings.Contains(got.Stderr, archive) {
			t.Errorf("%v: code %d\n%s%s", args, got.Code, got.Stdout, got.Stderr)
		}
	}
	if got := k.Run(t, "ledger", "show", "99999"); got.Code != 1 || strings.Contains(got.Stderr, "pruned") {
		t.Errorf("what never was: code %d, %s", got.Code, got.Stderr)
	}
}
