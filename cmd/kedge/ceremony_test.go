package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/ca/ceremony"
	"kedge/hsm"
	"kedge/test/hsmparts"
	"kedge/test/process"
)

// rites is a folder with plans for a token, at which ceremonies are held.
type rites struct {
	part *hsmparts.Part
	dir  string
}

// newRites has a plan root.yaml that makes the key and its certificate, again.yaml that does it with the key that is there, issuing.yaml for issuing.csr, and crl.yaml.
func newRites(t *testing.T, part *hsmparts.Part) rites {
	t.Helper()
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	r := rites{part, t.TempDir()}
	day := time.Now().UTC().Truncate(24 * time.Hour).Format(time.RFC3339)
	later := time.Now().UTC().Truncate(24*time.Hour).AddDate(1, 0, 0).Format(time.RFC3339)
	uri := part.URI
	uri.Object = "mesh"
	head := fmt.Sprintf("purpose: a rehearsal\noperators: [Alice, Bob]\nkey: {uri: %q, moduleParameters: %q, timeout: 20s", uri, part.Parameters)
	validity := "notBefore: " + day + "\nnotAfter: " + later + "\n"
	root := "subject: {commonName: Mesh Root}\nserial: 4f00112233445566778899aabbccddee\n" + validity
	process.Write(t, r.path("root.yaml"), "make: root\n"+head+", create: P-256}\n"+root+"out: {file: root.pem, record: root.json}\n")
	process.Write(t, r.path("again.yaml"), "make: root\n"+head+"}\n"+root+"out: {file: again.pem, record: again.json}\n")
	process.Write(t, r.path("issuing.yaml"), "make: intermediate\n"+head+"}\nissuer: root.pem\ncsr: issuing.csr\nsubject: {commonName: Mesh Issuing}\nserial: 4f00112233445566778899aabbccddef\n"+
		validity+"out: {file: issuing.pem, record: issuing.json}\n")
	process.Write(t, r.path("crl.yaml"), "make: crl\n"+head+"}\nissuer: root.pem\ncrl: {number: \"1\", thisUpdate: "+day+", nextUpdate: "+later+
		", revoked: [{serial: 0a0b, at: "+day+", reason: 1}]}\nout: {file: crl.pem, record: crl.json}\n")
	if out, err := exec.Command("openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", r.path("issuing.key"), "-subj", "/CN=ignored", "-out",
		r.path("issuing.csr")).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return r
}

func (r rites) path(name string) string { return filepath.Join(r.dir, name) }

// hold runs kedge ceremony, and returns what it shows, what it says, and its exit code.
func (r rites) hold(t *testing.T, args ...string) (shown, said string, code int) {
	t.Helper()
	var out, err bytes.Buffer
	c := exec.Command(process.Binary(), append([]string{"ceremony"}, args...)...)
	c.Dir, c.Stdout, c.Stderr = r.dir, &out, &err
	var exit *exec.ExitError
	if e := c.Run(); e != nil && !errors.As(e, &exit) {
		t.Fatal(e)
	}
	return out.String(), err.String(), c.ProcessState.ExitCode()
}

func (r rites) must(t *testing.T, args ...string) (shown string) {
	t.Helper()
	shown, said, code := r.hold(t, args...)
	if code != 0 {
		t.Fatalf("kedge ceremony %s: exit code %d: %s", strings.Join(args, " "), code, said)
	}
	return shown
}

func (r rites) record(t *testing.T, name string) (record ceremony.Record) {
	t.Helper()
	if err := json.Unmarshal([]byte(process.Read(t, r.path(name))), &record); err != nil {
		t.Fatal(err)
	}
	return record
}

// tokenKey is a key on the token, as kedge key list --json has it.
type tokenKey struct {
	ID     string
	SHA256 string `json:"public_key_sha256"`
}

func (r rites) keys(t *testing.T) (keys []tokenKey) {
	t.Helper()
	text := output(t, process.Binary(), "key", "list", "--json", "--module-parameters", r.part.Parameters, r.part.URI.String())
	if err := json.Unmarshal(text, &keys); err != nil {
		t.Fatal(err)
	}
	return keys
}

// signedPart is what is signed in a file: the TBSCertificate or the TBSCertList.
func (r rites) signedPart(t *testing.T, name string) []byte {
	t.Helper()
	block, _ := pem.Decode([]byte(process.Read(t, r.path(name))))
	if block == nil {
		t.Fatalf("%s is not PEM", name)
	}
	if block.Type == "X509 CRL" {
		list, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		return list.RawTBSRevocationList
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert.RawTBSCertificate
}

// matches says whether an outline, octets in hex of which some are open, fits what was signed.
func matches(outline string, tbs []byte) bool {
	outline = strings.ReplaceAll(strings.ReplaceAll(outline, "\n", ""), "..", "[0-9a-f]{2}")
	return regexp.MustCompile("^" + outline + "$").MatchString(hex.EncodeToString(tbs))
}

// TestACeremonySignsTheOctetsThatItsDryRunShows, with a module that wants parameters, too.
func TestACeremonySignsTheOctetsThatItsDryRunShows(t *testing.T) {
	for name, part := range map[string]func(testing.TB) *hsmparts.Part{"SoftHSM": hsmparts.SoftHSM, "NSS": hsmparts.NSS} {
		t.Run(name, func(t *testing.T) {
			r := newRites(t, part(t))
			shown := r.must(t, "root.yaml", "--dry-run")
			if keys := r.keys(t); len(keys) > 0 {
				t.Fatalf("the dry run made %s", keys)
			}
			r.must(t, "root.yaml")
			_, outline, _ := strings.Cut(shown, "TBSCertificate:\n")
			if tbs := r.signedPart(t, "root.pem"); !strings.Contains(outline, "..") || !matches(outline, tbs) {
				t.Errorf("what was signed, %x, is not what was shown:\n%s", tbs, shown)
			}
			for _, plan := range []string{"again", "issuing", "crl"} {
				dry := r.must(t, plan+".yaml", "--dry-run")
				if shown := r.must(t, plan+".yaml"); shown != dry {
					t.Errorf("the dry run of %s shows\n%s\nand the real one\n%s", plan, dry, shown)
				}
				block, rest := pem.Decode([]byte(dry))
				if tbs := r.signedPart(t, plan+".pem"); block == nil || len(rest) > 0 || !bytes.Equal(block.Bytes, tbs) {
					t.Errorf("%s: what was signed, %x, is not what was shown:\n%s", plan, tbs, dry)
				}
				if record := r.record(t, plan+".json"); !strings.Contains(dry, " octets, SHA-256 "+record.TBSSHA256+", ") {
					t.Errorf("%s: the record says %s, and the dry run\n%s", plan, record.TBSSHA256, dry)
				}
			}
			if !bytes.Equal(r.signedPart(t, "root.pem"), r.signedPart(t, "again.pem")) {
				t.Error("the same root, made again with its key, is another one")
			}
		})
	}
}

// TestTheRecordOfACeremonySaysWhoWhenWithWhatAndWhatCameOfIt compares each field with what others than kedge say of it.
func TestTheRecordOfACeremonySaysWhoWhenWithWhatAndWhatCameOfIt(t *testing.T) {
	r := newRites(t, hsmparts.SoftHSM(t))
	serial := regexp.MustCompile(`(?s)Serial number: +(\w+)\s.*Label: +tok\s`).FindSubmatch(output(t, "softhsm2-util", "--show-slots"))
	who, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	host, err := os.Hostname()
	if err != nil || serial == nil {
		t.Fatal(err, "or softhsm2-util shows no token")
	}
	program := strings.Replace(strings.TrimSpace(string(output(t, process.Binary(), "--version"))), "version ", "", 1) // "kedge version 0.1.0"
	fileSum := func(name string) string {
		digest := sha256.Sum256([]byte(process.Read(t, r.path(name))))
		return hex.EncodeToString(digest[:])
	}
	for _, c := range []struct {
		plan, kind string
		inputs     []string
	}{{"root", "root", nil}, {"issuing", "intermediate", []string{"issuer root.pem", "csr issuing.csr"}}, {"crl", "crl", []string{"issuer root.pem"}}} {
		began := time.Now()
		r.must(t, c.plan+".yaml")
		ended, record := time.Now(), r.record(t, c.plan+".json")
		outcome := process.Read(t, r.path(c.plan+".pem"))
		block, _ := pem.Decode([]byte(outcome))
		key := r.keys(t)[0]
		sum := func(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }
		if record.Began.Before(began.Truncate(time.Microsecond)) || record.Ended.Before(record.Began) || record.Ended.After(ended) {
			t.Errorf("%s: from %s to %s, but it was from %s to %s", c.plan, record.Began, record.Ended, began, ended)
		}
		uri := r.part.URI
		uri.Object, uri.PINSource = "mesh", hsm.PINSource{}
		want := ceremony.Record{Version: 1, Make: c.kind, Purpose: "a rehearsal", Operators: []string{"Alice", "Bob"}, User: fmt.Sprintf("%s (uid %s)", who.Username, who.Uid), Host: host,
			Program: program, Began: record.Began, Ended: record.Ended, Plan: process.Read(t, r.path(c.plan+".yaml")), PlanSHA256: fileSum(c.plan + ".yaml"),
			Token: ceremony.Token{URI: uri.String(), Label: "tok", Serial: string(serial[1]), Manufacturer: "SoftHSM project", Model: "SoftHSM v2", Firmware: "2.6", Module: uri.ModulePath,
				Library: record.Token.Library, KeyLabel: "mesh", KeyID: key.ID, KeyType: "P-256", KeyMade: c.plan == "root", Attributes: map[string]string{"CKA_SENSITIVE": "yes",
					"CKA_EXTRACTABLE": "no", "CKA_NEVER_EXTRACTABLE": "yes", "CKA_ALWAYS_SENSITIVE": "yes", "CKA_LOCAL": "yes", "CKA_ALWAYS_AUTHENTICATE": "no", "CKA_SIGN": "yes"}},
			PublicKey: key.SHA256, TBSSHA256: sum(r.signedPart(t, c.plan+".pem")), SHA256: sum(block.Bytes), File: r.path(c.plan + ".pem"), FileSHA256: fileSum(c.plan + ".pem"), Outcome: outcome}
		for _, input := range c.inputs {
			name, file, _ := strings.Cut(input, " ")
			want.Inputs = append(want.Inputs, ceremony.Input{Key: name, File: r.path(file), SHA256: fileSum(file)})
		}
		if got, want := asJSON(t, record), asJSON(t, want); got != want {
			t.Errorf("the record of %s is\n%s\nand not\n%s", c.plan, got, want)
		}
		if !strings.Contains(record.Token.Library, "PKCS11") || strings.Contains(process.Read(t, r.path(c.plan+".json")), hsmparts.PIN) {
			t.Errorf("the record says %q of the library, or holds the PIN", record.Token.Library)
		}
	}
	// What another program says of the key.
	said := string(output(t, "pkcs11-tool", "--module", r.part.URI.ModulePath, "--token-label", "tok", "--login", "--pin", hsmparts.PIN, "--list-objects", "--type", "privkey"))
	if !strings.Contains(said, "sensitive, always sensitive, never extract") || !strings.Contains(said, "local") || !strings.Contains(said, r.record(t, "root.json").Token.KeyID) {
		t.Errorf("pkcs11-tool says\n%s", said)
	}
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	text, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func output(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// TestACeremonyOverwritesNothingAndMakesNoKeyForWhatItCannotWrite: whatever has the name of the outcome or of the record is left as it is, a link to nowhere, too.
func TestACeremonyOverwritesNothingAndMakesNoKeyForWhatItCannotWrite(t *testing.T) {
	r := newRites(t, hsmparts.SoftHSM(t))
	inTheWay := map[string]func(path string) error{
		"a file":            func(path string) error { return os.WriteFile(path, []byte("kept"), 0o600) },
		"a folder":          func(path string) error { return os.Mkdir(path, 0o700) },
		"a link to a file":  func(path string) error { return os.Symlink(r.path("issuing.csr"), path) },
		"a link to nowhere": func(path string) error { return os.Symlink(r.path("nowhere"), path) },
		"another record": func(path string) error {
			return os.WriteFile(path, []byte(`{"version": 1, "plan_sha256": "00"}`), 0o600)
		},
		"a secret": func(path string) error { return os.Symlink(r.path("issuing.key"), path) },
	}
	for _, name := range []string{"root.pem", "root.json"} {
		for what, put := range inTheWay {
			if err := put(r.path(name)); err != nil {
				t.Fatal(err)
			}
			before := listing(t, r.dir)
			for _, args := range [][]string{{"root.yaml", "--dry-run"}, {"root.yaml"}} {
				if _, said, code := r.hold(t, args...); code != 1 || said != "kedge: "+r.path(name)+" is there already, and nothing is overwritten: name another file in the plan, or move it away\n" {
					t.Errorf("%s as %s: exit code %d: %s", what, name, code, said)
				}
			}
			if after := listing(t, r.dir); after != before {
				t.Errorf("%s as %s: before\n%safter\n%s", what, name, before, after)
			}
			if err := os.Remove(r.path(name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	plan := process.Read(t, r.path("root.yaml"))
	for _, change := range []string{"nowhere/root.pem", "issuing.csr/root.pem"} {
		process.Write(t, r.path("bad.yaml"), strings.Replace(plan, "file: root.pem", "file: "+change, 1))
		if _, said, code := r.hold(t, "bad.yaml"); code != 1 || !strings.Contains(said, "making the file "+r.path(change)) {
			t.Errorf("%s: exit code %d: %s", change, code, said)
		}
	}
	if keys := r.keys(t); len(keys) > 0 {
		t.Errorf("a key was made for nothing: %s", keys)
	}
}

// TestAFileThatComesWhileACeremonySignsIsNotOverwritten: it stands still, with its key made, until somebody reads what it shows.
func TestAFileThatComesWhileACeremonySignsIsNotOverwritten(t *testing.T) {
	for _, name := range []string{"root.pem", "root.json"} {
		r := newRites(t, hsmparts.SoftHSM(t))
		c, drain := r.stopped(t)
		process.Write(t, r.path(name), "kept")
		drain()
		if err := c.Wait(); err == nil || !strings.Contains(fmt.Sprint(c.Stderr), name+" is there by now, and nothing is overwritten") {
			t.Errorf("%s: %v: %s", name, err, c.Stderr)
		}
		if text := process.Read(t, r.path(name)); text != "kept" {
			t.Errorf("%s is overwritten with %s", name, text)
		}
		if _, err := os.Lstat(r.path("root.pem")); name == "root.json" && err == nil {
			t.Error("there is a root without a record")
		}
	}
}

// stopped starts the ceremony of root.yaml, and returns when it has made the key, and stands still since nobody reads what it shows.
func (r rites) stopped(t *testing.T) (c *exec.Cmd, drain func()) {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	descriptor := int(write.Fd())
	if err := syscall.SetNonblock(descriptor, true); err != nil {
		t.Fatal(err)
	}
	for err == nil { // until it is full
		_, err = syscall.Write(descriptor, make([]byte, 4096))
	}
	if err := syscall.SetNonblock(descriptor, false); err != nil {
		t.Fatal(err)
	}
	c = exec.Command(process.Binary(), "ceremony", "root.yaml")
	c.Dir, c.Stdout, c.Stderr = r.dir, write, new(bytes.Buffer)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if err := write.Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill() }) // fails when it has ended
	process.Eventually(t, "the key to be made", func() error {
		objects, err := filepath.Glob(filepath.Join(r.part.Dir, "tokens", "*", "*.object"))
		if err == nil && len(objects) < 3 { // the token, and the two halves
			err = fmt.Errorf("the token has %d objects", len(objects))
		}
		return err
	})
	return c, func() {
		if _, err := bytes.NewBuffer(nil).ReadFrom(read); err != nil {
			t.Error(err)
		}
		_ = read.Close() // it was only read
	}
}

// listing says what is in a folder, and what is in that.
func listing(t *testing.T, dir string) (text string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		content, _ := os.ReadFile(path) // of a folder, or a link to nowhere, there is none
		target, _ := os.Readlink(path)  // of all but links there is none
		text += fmt.Sprintf("%s %s -> %q %x\n", entry.Name(), entry.Type(), target, sha256.Sum256(content))
	}
	return text
}

// killedAt holds a ceremony that is killed as it makes a system call for the nth time, and says whether it came so far. With a file it is the nth on that file. (strace counts the calls of each thread: which
// one of a process is the nth varies.) Its module's process is left alone, and has ended by itself when this returns.
func (r rites) killedAt(t *testing.T, plan, call string, nth int, file string) bool {
	t.Helper()
	log := filepath.Join(t.TempDir(), "strace")
	args := []string{"--follow-forks", "--detach-on=execve", "--quiet=all", "--output=" + log, "--trace=" + call, fmt.Sprintf("--inject=%s:signal=KILL:when=%d", call, nth)}
	if file != "" {
		args = append(args, "--trace-path="+r.path(file))
	}
	shown, err := os.Create(r.path("shown"))
	if err != nil {
		t.Fatal(err)
	}
	defer shown.Close() // the process has its own
	said := new(bytes.Buffer)
	c := exec.Command("strace", append(args, process.Binary(), "ceremony", plan)...)
	c.Dir, c.Stdout, c.Stderr, c.SysProcAttr = r.dir, shown, said, &syscall.SysProcAttr{Setpgid: true}
	var exit *exec.ExitError
	if err := c.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	process.Eventually(t, "the module's process to end", func() error {
		if left, err := exec.Command("pgrep", "--pgroup", strconv.Itoa(c.Process.Pid), "--runstates", "R,S,D").Output(); err == nil {
			return fmt.Errorf("it is still there: %s", left)
		}
		return nil
	})
	killed := strings.Contains(process.Read(t, log), "+++ killed by SIGKILL +++")
	if killed == c.ProcessState.Success() {
		t.Fatalf("%s, killed at %s %d: %s\n%s", plan, call, nth, c.ProcessState, said)
	}
	return killed
}

// there says which files of a plan there are.
func (r rites) there(t *testing.T, plan string) (file, record bool) {
	t.Helper()
	is := func(name string) bool {
		_, err := os.Lstat(r.path(name))
		return err == nil
	}
	return is(plan + ".pem"), is(plan + ".json")
}

// finish runs root.yaml again after a run that was killed, and does what it says, until the root is there. It returns what that run had left.
func (r rites) finish(t *testing.T) (left string) {
	t.Helper()
	file, record := r.there(t, "root")
	keys := r.keys(t)
	again, said, code := r.hold(t, "root.yaml")
	plan := "root"
	switch {
	case file && !record || len(keys) > 1 || record && len(keys) == 0:
		t.Fatalf("there is a file: %t, a record: %t, and there are %d keys", file, record, len(keys))
	case file:
		left = "all"
		if code != 1 || !strings.Contains(said, "root.pem is there already, and nothing is overwritten") {
			t.Errorf("all is there: exit code %d: %s", code, said)
		}
	case record:
		left = "the record"
		if code != 0 || !strings.HasPrefix(said, "signed by a run that was cut short, and verified: "+r.path("root.pem")) {
			t.Errorf("the record is there: exit code %d: %s", code, said)
		}
	case len(keys) == 1:
		left, plan = "the key", "again"
		if code != 1 || !strings.Contains(said, "is on the token already, and the plan is to make one. If a run of this plan was cut short it is that run's") {
			t.Errorf("the key is there: exit code %d: %s", code, said)
		}
		r.must(t, "again.yaml") // the same plan with create: ""
	default:
		left = "nothing"
		if code != 0 {
			t.Errorf("nothing is there: exit code %d: %s%s", code, again, said)
		}
	}
	outcome, kept := process.Read(t, r.path(plan+".pem")), r.record(t, plan+".json")
	after := r.keys(t)
	if len(after) != 1 || len(keys) == 1 && after[0] != keys[0] || kept.PublicKey != after[0].SHA256 || kept.Outcome != outcome {
		t.Errorf("after %s: the record is of the key %s and of\n%s, but there are the keys %v and\n%s", left, kept.PublicKey, kept.Outcome, after, outcome)
	}
	if out, err := exec.Command("openssl", "verify", "-CAfile", r.path(plan+".pem"), r.path(plan+".pem")).CombinedOutput(); err != nil {
		t.Errorf("after %s: %v\n%s", left, err, out)
	}
	return left
}

// TestACeremonyThatIsKilledIsCompletedOrSaysHow kills it when the key is made, when it has signed, and when the record is there; then at each of its writes, whatever they are.
func TestACeremonyThatIsKilledIsCompletedOrSaysHow(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		process.Impossible(t, "strace is not installed", err)
		return
	}
	for _, c := range []struct{ call, file, left string }{
		{"write", "shown", "the key"},
		{"renameat2", "root.json", "the key"},
		{"renameat2", "root.pem", "the record"},
	} {
		r := newRites(t, hsmparts.SoftHSM(t))
		if !r.killedAt(t, "root.yaml", c.call, 1, c.file) {
			t.Fatalf("it does not %s %s: is its way still this one?", c.call, c.file)
		}
		if left := r.finish(t); left != c.left {
			t.Errorf("killed as it was to %s %s it left %s, and not %s", c.call, c.file, left, c.left)
		}
	}
	left := map[string]int{}
	for nth := 1; ; nth++ { // what it asks of the token it writes to the module's process
		r := newRites(t, hsmparts.SoftHSM(t))
		if !r.killedAt(t, "root.yaml", "write", nth, "") {
			break
		}
		left[r.finish(t)]++
	}
	if left["nothing"] < 2 {
		t.Errorf("the runs that were killed left %v: are they still killed on their way?", left)
	}
}

// TestACeremonyThatIsKilledBetweenSigningAndWritingSignsTheSameOctetsAgain, since all of them follow from the plan.
func TestACeremonyThatIsKilledBetweenSigningAndWritingSignsTheSameOctetsAgain(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		process.Impossible(t, "strace is not installed", err)
		return
	}
	r := newRites(t, hsmparts.SoftHSM(t))
	r.must(t, "root.yaml")
	for _, plan := range []string{"issuing", "crl"} {
		if !r.killedAt(t, plan+".yaml", "renameat2", 1, plan+".json") {
			t.Fatalf("it does not rename %s.json", plan)
		}
		if file, record := r.there(t, plan); file || record {
			t.Fatalf("it was not killed before it wrote (%t, %t)", file, record)
		}
		block, _ := pem.Decode([]byte(process.Read(t, r.path("shown"))))
		r.must(t, plan+".yaml")
		if block == nil || !bytes.Equal(block.Bytes, r.signedPart(t, plan+".pem")) {
			t.Errorf("%s: the second run signed something else", plan)
		}
	}
}

// TestARecordThatSaysSomethingElseIsNotCompleted: it is a run's of the same plan, or says so, and what it says was signed is not what the plan says and the key signs.
func TestARecordThatSaysSomethingElseIsNotCompleted(t *testing.T) {
	r := newRites(t, hsmparts.SoftHSM(t))
	r.must(t, "root.yaml")
	r.must(t, "issuing.yaml")
	record := process.Read(t, r.path("root.json"))
	var outcome string
	if err := json.Unmarshal([]byte(record[strings.LastIndex(record, `"outcome": `)+len(`"outcome": `):strings.LastIndex(record, "\n}")]), &outcome); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(r.path("root.pem")); err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(outcome))
	block.Bytes[len(block.Bytes)-1] ^= 1
	for what, other := range map[string]string{"another certificate": process.Read(t, r.path("issuing.pem")), "a bad signature": string(pem.EncodeToMemory(block)), "nonsense": "nonsense"} {
		process.Write(t, r.path("root.json"), strings.Replace(record, asJSON(t, outcome), asJSON(t, other), 1))
		if _, said, code := r.hold(t, "root.yaml"); code != 1 || !strings.Contains(said, "what was signed in it is not good: see where it comes from, and move it away: ") {
			t.Errorf("%s: exit code %d: %s", what, code, said)
		}
		if file, _ := r.there(t, "root"); file {
			t.Errorf("%s is written", what)
		}
	}
	process.Write(t, r.path("root.json"), record)
	r.must(t, "root.yaml", "--dry-run")
	if file, _ := r.there(t, "root"); file {
		t.Error("a dry run writes")
	}
	if r.must(t, "root.yaml"); process.Read(t, r.path("root.pem")) != outcome {
		t.Error("what is written is not what the record has")
	}
}

// TestTheCommandsOfTheCeremoniesPageWorkAsPrinted, from an empty folder to a CA that issues.
func TestTheCommandsOfTheCeremoniesPageWorkAsPrinted(t *testing.T) {
	t.Parallel()
	k, bin := process.New(t, ""), t.TempDir()
	program, err := filepath.Abs(process.Binary())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(program, filepath.Join(bin, "kedge")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(k.Config); err != nil { // it is made
		t.Fatal(err)
	}
	shell := exec.CommandContext(t.Context(), "sh", "-eux", "-c", strings.Join(fenced(t, "../../docs/ceremony.md", "sh"), "")+"sha256sum shown.der\n")
	shell.Dir, shell.Env = k.Dir, append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "XDG_CONFIG_HOME="+k.Dir)
	said, err := shell.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	record := rites{dir: k.Dir}.record(t, "intermediate-ceremony.json")
	if !strings.Contains(string(said), record.TBSSHA256+"  shown.der") {
		t.Errorf("what was signed, %s, is not what was shown:\n%s", record.TBSSHA256, said)
	}
	process.Write(t, k.Config, process.Read(t, k.Config)+process.Ports)
	k.Env = []string{"SOFTHSM2_CONF=" + filepath.Join(k.Dir, "softhsm2.conf")}
	k.Start(t)
	k.Ready(t, process.Patience)
	k.Must(t, "token", "create", "--identity", "ns/default/sa/web", "--out", filepath.Join(k.Dir, "join"))
	k.Must(t, "svid", "fetch", "--token-file", filepath.Join(k.Dir, "join"), "--out", filepath.Join(k.Dir, "svid"))
	output(t, "openssl", "verify", "-CAfile", filepath.Join(k.Dir, "root.pem"), "-untrusted", filepath.Join(k.Dir, "svid", "cert-chain.pem"), filepath.Join(k.Dir, "svid", "cert-chain.pem"))
}
