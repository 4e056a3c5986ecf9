package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"kedge/test/process"
)

// tests are the names of all tests of this repository.
func tests(t *testing.T) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	function := regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)
	err := filepath.WalkDir("../..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		for _, name := range function.FindAllStringSubmatch(process.Read(t, path), -1) {
			found[name[1]] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// named is a test that a page names; a script of TestTheCommandLine comes with its own name.
var named = regexp.MustCompile(`\b(Test[A-Z]\w*)(?:/([\w-]+))?`)

// TestTheTestsThatPagesNameExist, and the scripts of the command line.
func TestTheTestsThatPagesNameExist(t *testing.T) {
	t.Parallel()
	exist := tests(t)
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, page := range append(pages, readme) {
		for _, name := range named.FindAllStringSubmatch(process.Read(t, page), -1) {
			count++
			if !exist[name[1]] {
				t.Errorf("%s names %s, which is no test", page, name[1])
			}
			if name[2] == "" {
				continue
			}
			if _, err := os.Stat(filepath.Join("testdata", "script", name[2]+".txt")); err != nil || name[1] != "TestTheCommandLine" {
				t.Errorf("%s names %s, and there is no such script (%v)", page, name[0], err)
			}
		}
	}
	if count < 40 {
		t.Errorf("the pages name only %d tests: are they still found?", count)
	}
}

// TestEachRowOfTheTableOfFaultsIsShownByATest: its last column names one.
func TestEachRowOfTheTableOfFaultsIsShownByATest(t *testing.T) {
	t.Parallel()
	_, table, found := strings.Cut(process.Read(t, "../../docs/operations.md"), "| fault | callers | readiness, log, doctor | ends | shown by |\n| --- | --- | --- | --- | --- |\n")
	table, _, _ = strings.Cut(table, "\n\n")
	rows := strings.Split(table, "\n")
	if !found || len(rows) < 20 {
		t.Fatalf("the table of faults has %d rows: is it still found?", len(rows))
	}
	for _, row := range rows {
		cells := strings.Split(strings.Trim(row, "| "), " |")
		if len(cells) != 5 || !named.MatchString(cells[4]) {
			t.Errorf("no test is named, or the row has not five cells: %s", row)
		}
	}
}
