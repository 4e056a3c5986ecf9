package config

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestEachBadConfigurationGetsTheTextThatTheDocsPromise holds the last table of docs/refusals.md against the code.
func TestEachBadConfigurationGetsTheTextThatTheDocsPromise(t *testing.T) {
	page, err := os.ReadFile("../../../docs/refusals.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(page), "\n## The configuration\n")
	rows := regexp.MustCompile("(?m)^\\| `(.*)` \\| `(.*)` \\|$").FindAllStringSubmatch(section, -1)
	if !found || len(rows) < 10 {
		t.Fatalf("the page has %d rows about the configuration", len(rows))
	}
	for _, row := range rows {
		t.Run(row[1], func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "kedge.yaml")
			if err := os.WriteFile(path, []byte(row[1]+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			c, err := Load(path)
			if err == nil {
				_, err = c.Validate()
			}
			if err == nil || !strings.Contains(err.Error(), row[2]) {
				t.Errorf("it says %q, promised is %q", err, row[2])
			}
		})
	}
}
