package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"kedge/test/process"
)

const readme = "../../README.md"

// fenced are the contents of a page's fenced blocks of a language; "" are those without one.
func fenced(t *testing.T, page, language string) []string {
	t.Helper()
	var blocks []string
	for _, found := range regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```$").FindAllStringSubmatch(process.Read(t, page), -1) {
		if found[1] == language {
			blocks = append(blocks, found[2])
		}
	}
	if len(blocks) == 0 {
		t.Fatalf("%s has no fenced block of %q", page, language)
	}
	return blocks
}

// check has 'kedge config check' look at a file, on a machine that has everything that the README's files name.
func check(t *testing.T, yaml string) string {
	t.Helper()
	dir := t.TempDir()
	for _, folder := range []string{"kedge-archive", "kedge-mark"} {
		if err := os.Mkdir(filepath.Join(dir, folder), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	root, _ := newRoot(t, "the API server's")
	for name, text := range map[string]string{
		"root-passphrase": "one", "issuing-passphrase": "two", "ca.crt": inPEM(root.Raw), "token": "three", "cluster-1.jwks": process.NewCluster(t).JWKS,
	} {
		process.Write(t, filepath.Join(dir, name), text)
	}
	for _, folder := range []string{"/var/lib", "/etc/kedge", "/var/run/secrets/kubernetes.io/serviceaccount"} {
		yaml = strings.ReplaceAll(yaml, folder+"/", dir+"/")
	}
	path := filepath.Join(dir, "kedge.yaml")
	process.Write(t, path, yaml)
	out, err := exec.Command(process.Binary(), "config", "check", "--config", path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, yaml)
	}
	return string(out)
}

func TestTheConfigurationsOfTheReadmeAreGood(t *testing.T) {
	blocks := fenced(t, readme, "yaml")
	for _, yaml := range []string{blocks[0], strings.Join(blocks[1:], "")} { // pointing Istio at it, and the file that is walked through block by block
		if out := check(t, yaml); strings.Contains(out, "warning") {
			t.Errorf("it warns: %s\n%s", out, yaml)
		}
	}
}

func TestTheCommandsOfTheReadmeExist(t *testing.T) {
	var commands int
	for _, block := range fenced(t, readme, "") {
		for _, line := range strings.Split(block, "\n") {
			line, isCommand := strings.CutPrefix(line, "bin/kedge ")
			if !isCommand {
				continue
			}
			commands++
			line, _, _ = strings.Cut(line, "#")
			line, _, _ = strings.Cut(line, ">")
			args := append(strings.Fields(line), "--help")
			out, err := exec.Command(process.Binary(), args...).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "Usage:\n  kedge "+args[0]) {
				t.Errorf("kedge %s: %v\n%s", strings.Join(args, " "), err, out)
			}
		}
	}
	if commands < 10 {
		t.Errorf("the README has only %d commands: are they still found?", commands)
	}
}

// TestEveryVerbThatShowsSomethingHasJSON keeps the README's "and JSON with --json".
func TestEveryVerbThatShowsSomethingHasJSON(t *testing.T) {
	t.Parallel()
	k := process.New(t, "")
	k.Start(t)
	join(t, k)
	serial := regexp.MustCompile(`(?m)^serial +(\w+)$`).FindStringSubmatch(k.Must(t, "ledger", "show", "7"))[1]
	for _, args := range [][]string{
		{"authority", "list"}, {"bundle", "show"}, {"ledger", "show", "1"}, {"ledger", "show", serial}, {"ledger", "count"}, {"ledger", "verify"}, {"doctor"},
		{"svid", "revoke", serial}, {"log", "level", "info"}, {"clock", "confirm"}, {"config", "print"}, {"token", "create", "--identity", "ns/default/sa/a"},
		{"backup", "--out", filepath.Join(t.TempDir(), "backup.tar")},
	} {
		if out := k.Must(t, append(args, "--json")...); !json.Valid([]byte(out)) {
			t.Errorf("kedge %s --json prints no JSON:\n%s", strings.Join(args, " "), out)
		}
	}
	for _, args := range [][]string{{"ledger", "list"}, {"ledger", "export"}} {
		lines := strings.Split(strings.TrimSuffix(k.Must(t, append(args, "--json")...), "\n"), "\n")
		for _, line := range lines {
			if !json.Valid([]byte(line)) {
				t.Errorf("kedge %s --json prints a line that is no JSON: %s", strings.Join(args, " "), line)
			}
		}
	}
}

// TestTheDemoLeavesNothingBehind runs 'make demo' as a newcomer does, and with ROOT=hsm.
func TestTheDemoLeavesNothingBehind(t *testing.T) {
	for root, shows := range map[string]string{"file": "", "hsm": "CKA_NEVER_EXTRACTABLE    yes"} {
		t.Run(root, func(t *testing.T) {
			t.Parallel()
			process.Demo(t, "../../test/demo.sh", root, shows)
		})
	}
}
