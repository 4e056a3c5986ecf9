package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/testscript"

	"kedge/issuer/admin"
	"kedge/test/process"
)

func TestMain(m *testing.M) { os.Exit(process.Main(m)) }

// TestTheCommandLine plays the sessions in testdata/script with the real program.
func TestTheCommandLine(t *testing.T) {
	bin := t.TempDir()
	program, err := filepath.Abs(process.Binary())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(program, filepath.Join(bin, "kedge")); err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("PATH", bin+string(os.PathListSeparator)+e.Getenv("PATH"))
			return os.WriteFile(filepath.Join(e.WorkDir, "kedge.yaml"), []byte(process.Ports), 0o600)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"waitready": waitReady, "exits": exits, "capture": capture, "json": jsonField, "table": checkTable, "lines": countLines, "append": appendText, "fill": fillIn, "softhsm": softHSM,
			"import": importKey, "nss": nss, "await": awaitFile,
		},
	})
}

// waitReady [FOLDER] waits until the CA on the data folder is ready, and puts the address of its CSR API into CSR.
func waitReady(ts *testscript.TestScript, neg bool, args []string) {
	folder := "kedge-data"
	if len(args) == 1 {
		folder = args[0]
	}
	client := admin.NewClient(ts.MkAbs(filepath.Join(folder, "admin.sock")))
	ts.Check(process.Poll(process.Patience, func() error {
		status, err := client.Status(context.Background())
		if err == nil && !status.Ready {
			err = errors.New(status.NotReady)
		}
		ts.Setenv("CSR", status.CSRAddress)
		return err
	}))
}

// await FILE waits until a file is there.
func awaitFile(ts *testscript.TestScript, neg bool, args []string) {
	ts.Check(process.Poll(process.Patience, func() error {
		_, err := os.Stat(ts.MkAbs(args[0]))
		return err
	}))
}

// exits CODE PROGRAM ARGUMENT... runs a program that has to end with an exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	code := 0
	var exit *exec.ExitError
	switch err := ts.Exec(args[1], args[2:]...); {
	case errors.As(err, &exit):
		code = exit.ExitCode()
	default:
		ts.Check(err)
	}
	if code != want {
		ts.Fatalf("exit code %d, not %d\n%s%s", code, want, ts.ReadFile("stdout"), ts.ReadFile("stderr"))
	}
}

// capture NAME FILE REGEXP puts what the expression's group matches in a file (or stdout, stderr) into an environment variable.
func capture(ts *testscript.TestScript, neg bool, args []string) {
	found := regexp.MustCompile("(?m)" + args[2]).FindStringSubmatch(ts.ReadFile(args[1]))
	if found == nil {
		ts.Fatalf("%s does not match %s:\n%s", args[1], args[2], ts.ReadFile(args[1]))
	}
	ts.Setenv(args[0], found[1])
}

// json PATH REGEXP finds a field of the JSON document in stdout, such as problems.0, and matches what it says.
func jsonField(ts *testscript.TestScript, neg bool, args []string) {
	var value any
	if err := json.Unmarshal([]byte(ts.ReadFile("stdout")), &value); err != nil {
		ts.Fatalf("stdout is not a JSON document: %v", err)
	}
	for _, step := range strings.Split(args[0], ".") {
		switch v := value.(type) {
		case map[string]any:
			field, ok := v[step]
			if !ok {
				ts.Fatalf("%s: there is no %q in %v", args[0], step, v)
			}
			value = field
		case []any:
			i, err := strconv.Atoi(step)
			if err != nil || i >= len(v) {
				ts.Fatalf("%s: there is no %q in a list of %d", args[0], step, len(v))
			}
			value = v[i]
		default:
			ts.Fatalf("%s: %v has no fields", args[0], v)
		}
	}
	text, ok := value.(string)
	if !ok {
		raw, err := json.Marshal(value)
		ts.Check(err)
		text = string(raw)
	}
	if !regexp.MustCompile("^(?:" + args[1] + ")$").MatchString(text) {
		ts.Fatalf("%s is %s, which is not %s", args[0], text, args[1])
	}
}

// table HEADING... makes sure that stdout is a table with these headings, of which every row has its cells below them; without
// headings, one of two columns.
func checkTable(ts *testscript.TestScript, neg bool, args []string) {
	rows := strings.Split(strings.TrimSuffix(ts.ReadFile("stdout"), "\n"), "\n")
	var starts []int // in characters
	if len(args) > 0 {
		if got := regexp.MustCompile(`  +`).Split(rows[0], -1); strings.Join(got, "|") != strings.Join(args, "|") {
			ts.Fatalf("the headings are %q", got)
		}
		for _, heading := range args {
			starts = append(starts, utf8.RuneCountInString(rows[0][:strings.Index(rows[0], heading)]))
		}
		rows = rows[1:]
	} else {
		first := regexp.MustCompile(`^(\S.*?  +)\S`).FindStringSubmatch(rows[0])
		if first == nil {
			ts.Fatalf("%q has no two columns", rows[0])
		}
		starts = []int{0, utf8.RuneCountInString(first[1])}
	}
	if len(rows) == 0 {
		ts.Fatalf("the table has no rows")
	}
	for _, row := range rows {
		characters := []rune(row)
		for i, start := range starts {
			if start >= len(characters) || characters[start] == ' ' || i > 0 && string(characters[start-2:start]) != "  " {
				ts.Fatalf("column %d of %q does not begin at character %d\n%s", i+1, row, start, ts.ReadFile("stdout"))
			}
		}
	}
}

// lines N makes sure that stdout has N lines.
func countLines(ts *testscript.TestScript, neg bool, args []string) {
	if got := strings.Count(ts.ReadFile("stdout"), "\n"); fmt.Sprint(got) != args[0] {
		ts.Fatalf("%d lines, not %s:\n%s", got, args[0], ts.ReadFile("stdout"))
	}
}

// append FILE TEXT adds a line to a file.
func appendText(ts *testscript.TestScript, neg bool, args []string) {
	path := ts.MkAbs(args[0])
	text, err := os.ReadFile(path)
	ts.Check(err)
	ts.Check(os.WriteFile(path, append(text, args[1]+"\n"...), 0o600))
}

// fill FROM TO (REGEXP TEXT)... copies a file with parts of it replaced, each of which must be there.
func fillIn(ts *testscript.TestScript, neg bool, args []string) {
	text := ts.ReadFile(args[0])
	for i := 2; i+1 < len(args); i += 2 {
		pattern := regexp.MustCompile("(?m)" + args[i])
		if !pattern.MatchString(text) {
			ts.Fatalf("%s does not match %s:\n%s", args[0], args[i], text)
		}
		text = pattern.ReplaceAllLiteralString(text, strings.ReplaceAll(args[i+1], `\n`, "\n"))
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(text), 0o600))
}

// softhsm makes a token of SoftHSM, and puts URIs into the environment: of the key "mesh" on it (URI), of all keys (ANY), of the token with another label of new keys (TOKEN), of
// a key that is not there (NOKEY), of a token (NOTOKEN), and of a module (NOMODULE). The PIN is in softhsm/pin.
func softHSM(ts *testscript.TestScript, neg bool, args []string) {
	dir := ts.MkAbs("softhsm")
	ts.Check(os.MkdirAll(filepath.Join(dir, "tokens"), 0o700))
	config := filepath.Join(dir, "softhsm2.conf")
	ts.Check(os.WriteFile(config, []byte(fmt.Sprintf("directories.tokendir = %s/tokens\nobjectstore.backend = file\nlog.level = ERROR\n", dir)), 0o600))
	ts.Check(os.WriteFile(filepath.Join(dir, "pin"), []byte("123456\n"), 0o600))
	ts.Setenv("SOFTHSM2_CONF", config)
	ts.Check(ts.Exec("softhsm2-util", "--init-token", "--free", "--label", "tok", "--so-pin", "so1234", "--pin", "123456"))
	where := "?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:" + dir + "/pin"
	ts.Setenv("URI", "pkcs11:token=tok;object=mesh"+where)
	ts.Setenv("ANY", "pkcs11:token=tok"+where)
	ts.Setenv("TOKEN", "pkcs11:token=tok;object=kedge-issuing"+where)
	ts.Setenv("NOKEY", "pkcs11:token=tok;object=nobody"+where)
	ts.Setenv("NOTOKEN", "pkcs11:token=nowhere;object=mesh"+where)
	ts.Setenv("NOMODULE", strings.Replace("pkcs11:token=tok;object=mesh"+where, "libsofthsm2.so", "none.so", 1))
}

// nss makes a database of NSS, after softhsm, and puts the URI of the key "mesh" in it (NSS) and what its module wants to be initialised with (NSSPARAMETERS) into the environment.
func nss(ts *testscript.TestScript, neg bool, args []string) {
	dir, pin := ts.MkAbs("nss"), ts.MkAbs("softhsm/pin")
	ts.Check(os.Mkdir(dir, 0o700))
	ts.Check(ts.Exec("certutil", "-N", "-d", "sql:"+dir, "-f", pin))
	ts.Setenv("NSS_MAX_MP_PBE_ITERATION_COUNT", "1") // else opening it takes long
	ts.Setenv("NSS", "pkcs11:token=tok;object=mesh?module-path=/usr/lib/x86_64-linux-gnu/libsoftokn3.so&pin-source=file:"+pin)
	ts.Setenv("NSSPARAMETERS", fmt.Sprintf("configdir='sql:%s' certPrefix='' keyPrefix='' secmod='secmod.db' flags= dbTokenDescription='tok'", dir))
}

// import LABEL puts a key that was made elsewhere onto the token of softhsm.
func importKey(ts *testscript.TestScript, neg bool, args []string) {
	file := ts.MkAbs(args[0] + ".key")
	ts.Check(ts.Exec("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", file))
	ts.Check(ts.Exec("softhsm2-util", "--import", file, "--token", "tok", "--label", args[0], "--id", "0a0b", "--pin", "123456"))
}
