package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

// write makes a file in a new folder and returns its path.
func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kedge.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func load(t *testing.T, text string) *Config {
	t.Helper()
	c, err := Load(write(t, text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// problemsOf gives what is wrong with a file: by Load, and when that takes it, by Validate.
func problemsOf(t *testing.T, path string) []string {
	t.Helper()
	c, err := Load(path)
	if err == nil {
		_, err = c.Validate()
	}
	if err == nil {
		return nil
	}
	var wrong *Error
	if !errors.As(err, &wrong) {
		t.Fatalf("the error is no *Error: %v", err)
	}
	var texts []string
	for _, p := range wrong.Problems {
		texts = append(texts, p.String())
	}
	return texts
}

func TestWithoutAFileTheDefaultsAreValid(t *testing.T) {
	warnings, err := Default().Validate()
	if err != nil || len(warnings) > 0 {
		t.Errorf("warnings %q, error %v", warnings, err)
	}
	profiles, err := Default().SigningProfiles()
	if err != nil || len(profiles) != 1 || profiles["default"] == nil {
		t.Errorf("profiles %v, error %v", profiles, err)
	}
}

func TestAnEmptyFileIsTheDefaults(t *testing.T) {
	for _, text := range []string{"", "\n", "# nothing\n", "---\n", "{}", "csr:\nprofiles:\n", "profiles: {default: }"} {
		path := write(t, text)
		c, err := Load(path)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		want := Default()
		want.DataDir = filepath.Join(filepath.Dir(path), "kedge-data")
		want.Root.File.Dir = filepath.Join(want.DataDir, "root")
		if !reflect.DeepEqual(c, want) {
			t.Errorf("%q gives %+v, and not %+v", text, c, want)
		}
	}
}

func TestBadFilesAreRefusedWithTheTextThatTheDocsPromise(t *testing.T) {
	issuer := func(rest string) string {
		return "callers: {tokenIssuers: [{name: a, issuer: 'https://a.example'" + rest + "}]}"
	}
	for _, test := range []struct{ name, text, want string }{
		// form
		{"near miss", "csr: {listn: x}", "csr.listn: unknown key; the nearest valid one is csr.listen"},
		{"swapped letters", "leder: {}", "leder: unknown key; the nearest valid one is ledger"},
		{"wrong case", "csr: {servernames: []}", "csr.servernames: unknown key; the nearest valid one is csr.serverNames"},
		{"wrong place", "clockSkew: 10s", "clockSkew: unknown key here; there is callers.clockSkew"},
		{"several places", "passphraseFile: x", "passphraseFile: unknown key here; there is root.file.passphraseFile and root.cacerts.passphraseFile and issuingCA.passphraseFile"},
		{"far from all", "log: {colour: true}", "log.colour: unknown key; valid ones here are level, format"},
		{"near miss in a profile", "profiles: {web: {maxTLT: 1h}}", "profiles.web.maxTLT: unknown key; the nearest valid one is profiles.web.maxTTL"},
		{"near miss in a list", issuer(", audience: [a]"), "callers.tokenIssuers[0].audience: unknown key; the nearest valid one is callers.tokenIssuers[0].audiences"},
		{"a token URI without a token", `root: {kind: pkcs11, pkcs11: {uri: "pkcs11:object=a?module-path=/m.so", certificateFile: /r.pem}}`, "root.pkcs11.uri: it names no token: write token=LABEL or serial=NUMBER"},
		{"a token URI without a module", `issuingCA: {keyStore: pkcs11, pkcs11: {uri: "pkcs11:token=a"}}`, "issuingCA.pkcs11.uri: it names no module: write module-path=/PATH.so behind the question mark"},
		{"a secret in the file", "issuingCA: {passphrase: hunter2}", "issuingCA.passphrase: unknown key; valid ones here are lifetime, keyType, keyStore, passphraseFile, vault, pkcs11"},
		{"number for text", "trustDomain: 5", "trustDomain: expected text, got the number 5: put it in quotes"},
		{"truth for text", "dataDir: yes", "dataDir: expected text, got true: put it in quotes"},
		{"list for text", "trustDomain: [a]", "trustDomain: expected text, got a list"},
		{"text for truth", `csr: {reflection: "true"}`, `csr.reflection: expected true or false, got the text "true"`},
		{"text for number", "tracing: {sampleRatio: much}", `tracing.sampleRatio: expected a number, got the text "much"`},
		{"text for list", "csr: {serverNames: localhost}", `csr.serverNames: expected a list (lines that begin with "- "), got the text "localhost"`},
		{"text for section", "csr: 127.0.0.1", `csr: expected keys with values ("key: value"), got the text "127.0.0.1"`},
		{"section for duration", "ledger: {retention: {days: 30}}", `ledger.retention: expected a duration like "24h", "90m" or "7d", got keys with values`},
		{"list for file", "[a]", `expected keys with values ("key: value"), got a list`},
		{"nothing for text", "root: {file: {passphraseFile: }}", `root.file.passphraseFile: there is nothing behind the key: write a value, "" for an empty one, or leave the key out`},
		{"nothing for list", "callers: {joinTokens: {identities: }}", "callers.joinTokens.identities: there is nothing behind the key: write a list, [] for an empty one, or leave the key out"},
		{"nothing for item", "callers: {tokenIssuers: [~]}", "callers.tokenIssuers[0]: there is nothing behind the dash"},
		{"key that is a number", "1: a", "the key the number 1 is not text: put it in quotes"},
		{"invisible characters", `trustDomain: "a\u200bb"`, `trustDomain: "a\u200bb" has characters that cannot be seen`},
		{"key twice", "csr:\n  listen: a\n  listen: b\n", `line 3: key "listen" already set in map`},
		{"section twice", "log: {level: info}\nlog: {level: debug}\n", `line 2: key "log" already set in map`},
		{"two documents", "trustDomain: a\n---\ntrustDomain: b\n", `there is a second document (after "---"), and nothing of it would be used: write one document`},
		{"no YAML", "csr: [", "it cannot be read as YAML: yaml: line 1: did not find expected node content"},
		{"2 MiB", strings.Repeat("# to be read\n", 2<<20/13), "the file has more than the 1048576 octets that are read"},
		{"long name", "profiles: {" + strings.Repeat("a", 65) + ": }", `profiles["` + strings.Repeat("a", 64) + `…"]: the name has more than 64 octets`},

		// durations
		{"negative", "csr: {callTimeout: -3s}", `csr.callTimeout: "-3s" is negative`},
		{"absurd", "ledger: {retention: 36501d}", `ledger.retention: "36501d" is more than 100 years`},
		{"overflow", "ledger: {retention: 99999999999999999999h}", `ledger.retention: "99999999999999999999h" is more than 100 years`},
		{"no unit", `ledger: {retention: "30"}`, `ledger.retention: "30" lacks a unit: write d, h, m, s or ms after the number, like "30h"`},
		{"number", "ledger: {retention: 30}", `ledger.retention: expected a duration, got the number 30: add a unit, like "30s" or "30h"`},
		{"unknown unit", "ledger: {retention: 2w}", `ledger.retention: "2w" is not a duration: write one like "24h", "90m", "7d" or "1h30m"`},
		{"lost fraction", "csr: {callTimeout: 0.3ns}", `csr.callTimeout: "0.3ns" is not a whole number of nanoseconds`},
		{"empty", `csr: {callTimeout: ""}`, `csr.callTimeout: is empty: write a duration like "24h", "90m" or "7d"`},
		{"long", "csr: {callTimeout: " + strings.Repeat("1", 50) + "s}", `csr.callTimeout: "` + strings.Repeat("1", 40) + `"… is too long for a duration`},

		// values
		{"trust domain with a scheme", "trustDomain: spiffe://a.example", `trustDomain: "spiffe://a.example": write the name alone, "a.example"`},
		{"trust domain in capitals", "trustDomain: A", `trustDomain: "A" is not the name of a trust domain: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores`},
		{"no data folder", `dataDir: ""`, "dataDir: it is empty: name a folder"},
		{"no port", "csr: {listen: 127.0.0.1}", `csr.listen: "127.0.0.1" is not an address and port, like "127.0.0.1:15012" or "[::1]:15012"`},
		{"large port", `csr: {listen: "127.0.0.1:99999"}`, `csr.listen: the port "99999" is not a number from 0 to 65535`},
		{"bad host", `operations: {listen: "a b:1"}`, `operations.listen: the host "a b" is neither an IP address nor a DNS name`},
		{"a URL to listen on", `csr: {listen: "https://0.0.0.0:15012"}`, `csr.listen: "https://0.0.0.0:15012" is a URL: write HOST:PORT without https://`},
		{"same port", `operations: {listen: ":15012"}`, "operations.listen: :15012 takes the port of csr.listen 127.0.0.1:15012: give one of them another port"},
		{"no names", "csr: {serverNames: []}", "csr.serverNames: the list is empty: no client could check whom it talks to. Give the names that clients dial"},
		{"bad name", "csr: {serverNames: ['*.svc']}", `csr.serverNames[0]: "*.svc" is neither a DNS name nor an IP address`},
		{"name twice", "csr: {serverNames: ['::1', '0:0::1']}", `csr.serverNames[1]: "0:0::1" is there twice`},
		{"no time for calls", "csr: {callTimeout: 0s}", "csr.callTimeout: 0s is not more than 0 and at most 10m"},
		{"too little grace", "csr: {callTimeout: 40s}", "csr.maxConnectionAgeGrace: 1m30s is less than csr.waitTimeout 1m and csr.callTimeout 40s together: calls under way would be cut off: raise it to 1m40s or more"},
		{"no waiting", "csr: {waitTimeout: 0s}", "csr.waitTimeout: 0s is not more than 0 and at most 10m"},
		{"too few connections", "csr: {maxConnections: 4}", "csr.maxConnections: 4 is less than 32; 0 means as many as the process may open files"},
		{"half a connection", "csr: {maxConnections: 40.5}", "csr.maxConnections: expected a whole number, got the number 40.5"},
		{"negative connections", "csr: {maxConnections: -1}", "csr.maxConnections: -1 is less than 32; 0 means as many as the process may open files"},
		{"a handshake that may last", "csr: {slowClientTimeout: 2m}", "csr.slowClientTimeout: 2m is not between 1s and 1m"},
		{"pings", "csr: {keepaliveMinTime: 0, keepaliveTime: 1s, keepaliveTimeout: 1ms}", "csr.keepaliveTime: 1s is less than 10s" +
			"\ncsr.keepaliveTimeout: 1ms is less than 1s: clients on slow links would be cut off\ncsr.keepaliveMinTime: 0s is less than 1s"},
		{"connections", "csr: {maxConnectionAge: 1ms}", "csr.maxConnectionAge: 1ms is less than 1s, so that clients would do nothing but connect; 0s means never"},
		{"level", "log: {level: loud}", `log.level: "loud" is not debug, info, warn or error`},
		{"sample ratio", "tracing: {sampleRatio: 1.5}", "tracing.sampleRatio: 1.5 is not from 0 to 1"},
		{"sample ratio that is none", "tracing: {sampleRatio: .nan}", "tracing.sampleRatio: NaN is not from 0 to 1"},
		{"a URL for traces", `tracing: {endpoint: "http://otel.example:4317"}`, `tracing.endpoint: "http://otel.example:4317" is a URL: write HOST:PORT without http://`},
		{"CA file for nothing", "tracing: {insecure: true, caFile: ca.pem}", "tracing.caFile: tracing.insecure is true, so there is no certificate to check: remove one of the two"},
		{"key type", "root: {file: {keyType: RSA-1024}}", `root.file.keyType: "RSA-1024" is not P-256, P-384, RSA-2048, RSA-3072 or RSA-4096`},
		{"clock skew", "callers: {clockSkew: 10m}", "callers.clockSkew: 10m is more than 5m: expired tokens would count for as long; set the clocks that differ"},
		{"no clock skew", "callers: {clockSkew: 0s}", "callers.clockSkew: 0s is less than 1s: times in tokens are whole seconds"},
		{"join tokens that live long", "callers: {joinTokens: {maxTTL: 8d}}", "callers.joinTokens.maxTTL: 8d is more than 7d: whoever finds a join token becomes the machine that it was made for"},
		{"no retention", "ledger: {retention: 0}", "ledger.retention: 0s is less than 1s"},

		// lifetimes
		{"issuing CA too short", "issuingCA: {lifetime: 48h}",
			"issuingCA.lifetime: 2d is shorter than 3 × profiles.default.maxTTL 24h = 3d: raise issuingCA.lifetime or lower profiles.default.maxTTL" +
				"\nissuingCA.lifetime: 2d is shorter than 3 × csr.serverCertificateTTL 24h = 3d: raise issuingCA.lifetime or lower csr.serverCertificateTTL"},
		{"longest of the profiles", "profiles: {db: {maxTTL: 60h}}",
			"issuingCA.lifetime: 7d is shorter than 3 × profiles.db.maxTTL 60h = 180h: raise issuingCA.lifetime or lower profiles.db.maxTTL"},
		{"root too short", "root: {file: {lifetime: 13d}}",
			"root.file.lifetime: 13d is shorter than 2 × issuingCA.lifetime 7d = 14d: raise root.file.lifetime or lower issuingCA.lifetime"},
		{"no lifetime", "issuingCA: {lifetime: 0s}", "issuingCA.lifetime: 0s is not more than 0"},
		{"half a second", "root: {file: {lifetime: 3650d0.5s}}", "root.file.lifetime: 87600h0m0.5s is not a whole number of seconds"},

		// profiles
		{"minTTL above maxTTL", "profiles: {web: {maxTTL: 2m}}", "profiles.web: minTTL 5m is more than defaultTTL 2m"},
		{"defaultTTL above maxTTL", "profiles: {web: {defaultTTL: 48h}}", "profiles.web: defaultTTL 2d is more than maxTTL 24h"},
		{"overMax", "profiles: {web: {overMax: allow}}", `profiles.web: overMax "allow" is neither "clamp" nor "refuse"`},
		{"profile name", `profiles: {"a b": {}}`, `profiles["a b"]: the name "a b" is not 1 to 64 letters, digits, '.', '_', '-' and '/', beginning with a letter or digit`},
		{"extra key", "profiles: {web: {extraKeys: [RSA-1024]}}", `profiles.web: extraKeys: "RSA-1024" is neither "P-521" nor "Ed25519"; RSA of 2048 to 4096 bits, P-256 and P-384 are always allowed`},
		{"backdate", "profiles: {web: {backdate: 2h}}", "profiles.web: backdate 2h is more than 1h: set the clocks that differ by so much"},

		// token issuers
		{"no name", "callers: {tokenIssuers: [{issuer: 'https://a.example'}]}", "callers.tokenIssuers[0].name: it is required: it names the issuer in the ledger and in logs"},
		{"no issuer", "callers: {tokenIssuers: [{name: a}]}", `callers.tokenIssuers[0].issuer: it is required: the "iss" of its tokens, to the letter`},
		{"kind", issuer(", kind: saml"), `callers.tokenIssuers[0].kind: "saml" is not kubernetes or oidc` +
			"\ncallers.tokenIssuers[0].audiences: it is required: without it every token of the issuer would count, whomever it is meant for"},
		{"OIDC without identity and audiences", issuer(", kind: oidc"), "callers.tokenIssuers[0].identity: it is required for oidc: it makes a SPIFFE ID path of the token's claims" +
			"\ncallers.tokenIssuers[0].audiences: it is required: without it every token of the issuer would count, whomever it is meant for"},
		{"two claims in one segment", issuer(", kind: oidc, audiences: [a], identity: '{claim:a}{claim:b}'"), `callers.tokenIssuers[0].identity: the identity template "{claim:a}{claim:b}" ` +
			"has two claims in one segment: put a slash between them: write it like ci/{claim:repository_owner}"},
		{"identity for Kubernetes", issuer(", identity: a"), "callers.tokenIssuers[0].identity: it is for oidc only: a kubernetes token is for ns/NAMESPACE/sa/ACCOUNT"},
		{"two key sources", issuer(", jwksFile: f, jwksURL: 'https://a.example/keys'"), "callers.tokenIssuers[0].jwksURL: jwksFile is given too: keys come from one place. Remove one of the two"},
		{"keys over http", issuer(", jwksURL: 'http://a.example/keys'"), `callers.tokenIssuers[0].jwksURL: "http://a.example/keys" is http, so that anybody on the way could put in keys of their own: use https`},
		{"password in a URL", issuer(", jwksURL: 'https://u:hunter2@a.example/keys'"), "callers.tokenIssuers[0].jwksURL: it has a user name or password, which would stand in logs: remove them, and see bearerTokenFile"},
		{"discovery without a URL", "callers: {tokenIssuers: [{name: a, issuer: kubernetes/serviceaccount}]}",
			`callers.tokenIssuers[0].issuer: "kubernetes/serviceaccount" is not a URL like https://issuer.example; or give jwksFile or jwksURL, and no discovery is needed`},
		{"same issuer twice", "callers: {tokenIssuers: [{name: a, issuer: x, jwksFile: f}, {name: a, issuer: x, jwksFile: f}]}",
			`callers.tokenIssuers[1].name: "a" is the name of callers.tokenIssuers[0] too: the ledger could not tell them apart` +
				"\ncallers.tokenIssuers[1].issuer: x is the issuer of callers.tokenIssuers[0] too: a token could not be told whose it is"},
		{"audience twice", issuer(", audiences: [x, x]"), `callers.tokenIssuers[0].audiences[1]: "x" is there twice`},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := strings.Join(problemsOf(t, write(t, test.text)), "\n"); got != test.want {
				t.Errorf("\ngot  %s\nwant %s", got, test.want)
			}
		})
	}
}

func TestNoErrorShowsASecret(t *testing.T) {
	for _, text := range []string{
		"issuingCA: {passphrase: hunter2}",
		"callers: {tokenIssuers: [{name: a, issuer: x, jwksURL: 'https://u:hunter2@a.example/%zz'}]}",
		"callers: {tokenIssuers: [{name: a, issuer: x, jwksURL: 'https://u:hunter2@a.example/k'}]}",
		"callers: {tokenIssuers: [{name: a, issuer: 'http://u:hunter2@a.example'}]}",
		"root: {kind: vault}\nvault: {address: 'https://a.example', login: {method: token, token: hvs.CAESIhunter2hunter2hunter2}}",
		"root: {kind: vault}\nvault: {address: 'https://a.example', login: {method: token, token: s.hunter2hunter2hunter2XYZ}}",
	} {
		wrong := problemsOf(t, write(t, text))
		if len(wrong) == 0 || strings.Contains(strings.Join(wrong, "\n"), "hunter2") {
			t.Errorf("%s: %q", text, wrong)
		}
	}
}

func TestEverythingWrongIsSaidAtOnce(t *testing.T) {
	path := write(t, "csr: {listn: x, callTimeout: -1s}\nlog: {level: 5}\nlog: {level: 6}\n")
	_, err := Load(path)
	if err == nil {
		t.Fatal("it was taken")
	}
	want := path + `: 4 problems
  line 3: key "log" already set in map
  csr.callTimeout: "-1s" is negative
  csr.listn: unknown key; the nearest valid one is csr.listen
  log.level: expected text, got the number 6: put it in quotes`
	if got := regexp.MustCompile(`number [56]`).ReplaceAllString(err.Error(), "number 6"); got != want {
		t.Errorf("\ngot  %s\nwant %s", got, want)
	}
	if got := problemsOf(t, write(t, "trustDomain: A\nlog: {level: a, format: b}\n")); len(got) != 3 {
		t.Errorf("got %q", got)
	}
}

func TestAliasBombsAreBounded(t *testing.T) {
	var nested strings.Builder
	nested.WriteString("a0: &a0 [x, x, x, x, x, x, x, x, x]\n")
	for i := 1; i < 10; i++ {
		fmt.Fprintf(&nested, "a%d: &a%d [%s*a%d]\n", i, i, strings.Repeat(fmt.Sprintf("*a%d, ", i-1), 8), i-1)
	}
	long := "x: &a " + strings.Repeat("y", 100_000) + "\ncsr: {serverNames: [" + strings.Repeat("*a, ", 1_000) + "]}\n"
	many := "csr: {serverNames: [" + strings.Repeat("a,", 20_200) + "]}\n"
	for name, test := range map[string]struct{ text, want string }{
		"nested": {nested.String(), "it cannot be read as YAML: yaml: document contains excessive aliasing"},
		"long":   {long, "csr.serverNames[10]: with its aliases followed the file has more than 1048576 octets of text"},
		"many":   {many, "csr.serverNames[19995]: with its aliases followed the file has more than 20000 values"},
		"keys": {"? &a " + strings.Repeat("y", 900) + "\n: z\ncallers: {tokenIssuers: [" + strings.Repeat("{? *a : z}, ", 3_000) + "]}\n",
			"there may be more: only so many problems are told at once"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := strings.Join(problemsOf(t, write(t, test.text)), "\n"); !strings.Contains(got, test.want) || len(got) > 20_000 {
				t.Errorf("got %.500s, want %s", got, test.want)
			}
		})
	}
}

func TestAliasesMayBeUsed(t *testing.T) {
	c := load(t, "profiles: {a: &a {maxTTL: 1h}, b: *a}\n")
	if got := c.Profiles["b"].MaxTTL; got != Duration(time.Hour) {
		t.Errorf("got %s", got)
	}
}

func TestAFileThatIsNotThereIsToldFromABadOne(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "none.yaml"))
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestRelativePathsBeginAtTheFolderOfTheFile(t *testing.T) {
	path := write(t, `
dataDir: data
tracing: {caFile: ca.pem}
root: {file: {passphraseFile: /run/secrets/p}}
vault: {login: {token: t, secretID: "env:SECRET"}}
callers:
  tokenIssuers: [{name: a, issuer: x, jwksFile: ../jwks.json}]
  clientCertificates: {otherIssuers: [a.pem, /b.pem]}
`)
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	folder := filepath.Dir(path)
	for name, got := range map[string][2]string{
		"dataDir":                  {c.DataDir, folder + "/data"},
		"root.file.dir":            {c.Root.File.Dir, folder + "/data/root"},
		"tracing.caFile":           {c.Tracing.CAFile, folder + "/ca.pem"},
		"passphraseFile":           {c.Root.File.PassphraseFile, "/run/secrets/p"},
		"issuingCA unset":          {c.IssuingCA.PassphraseFile, ""},
		"jwksFile":                 {c.Callers.TokenIssuers[0].JWKSFile, filepath.Dir(folder) + "/jwks.json"},
		"a secret in a file":       {c.Vault.Login.Token, folder + "/t"},
		"a secret in a variable":   {c.Vault.Login.SecretID, "env:SECRET"},
		"otherIssuers[0]":          {c.Callers.ClientCertificates.OtherIssuers[0], folder + "/a.pem"},
		"otherIssuers[1]":          {c.Callers.ClientCertificates.OtherIssuers[1], "/b.pem"},
		"issuer, which is no path": {c.Callers.TokenIssuers[0].Issuer, "x"},
	} {
		if got[0] != got[1] {
			t.Errorf("%s is %s, want %s", name, got[0], got[1])
		}
	}
}

func TestKeysThatAreLeftOutFollowFromOthers(t *testing.T) {
	c := load(t, `
profiles: {short: {maxTTL: 1h}, long: {maxTTL: 30h}}
callers: {tokenIssuers: [{name: k, issuer: k, jwksFile: f}, {name: o, kind: oidc, issuer: o, jwksFile: f}]}
`)
	if got := c.Profiles["short"].DefaultTTL; got.Std() != time.Hour {
		t.Errorf("defaultTTL under a maxTTL of 1h is %s", got)
	}
	if got := c.Profiles["long"].DefaultTTL; got.Std() != 24*time.Hour {
		t.Errorf("defaultTTL under a maxTTL of 30h is %s", got)
	}
	if _, there := c.Profiles["default"]; !there {
		t.Error("there is no default profile")
	}
	if got := c.Callers.TokenIssuers[0].Audiences; !reflect.DeepEqual(got, []string{"istio-ca"}) {
		t.Errorf("kubernetes audiences are %q", got)
	}
	if got := c.Callers.TokenIssuers[1].Audiences; got != nil {
		t.Errorf("oidc audiences are %q", got)
	}
}

func TestListsReplaceTheirDefaultAsAWhole(t *testing.T) {
	c := load(t, "csr: {serverNames: [a.example]}\ncallers: {joinTokens: {identities: []}}\n")
	if !reflect.DeepEqual(c.CSR.ServerNames, []string{"a.example"}) || len(c.Callers.JoinTokens.Identities) != 0 {
		t.Errorf("got %q and %q", c.CSR.ServerNames, c.Callers.JoinTokens.Identities)
	}
}

func TestOddSettingsAreWarnedOf(t *testing.T) {
	warnings, err := load(t, `
csr: {serverCertificateTTL: 30s, keepaliveMinTime: 1m}
tracing: {endpoint: "otel.example:4317", insecure: true}
issuingCA: {lifetime: 30m}
profiles: {default: {maxTTL: 20s, minTTL: 5s, maxLineageAge: 5s}}
ledger: {retention: 1h}
`).Validate()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"csr.serverCertificateTTL: 30s is less than 5m: clients whose clocks are late or early may refuse it",
		"csr.keepaliveMinTime: 1m is more than the 30s after which istio-agents ping: they will be cut off",
		"tracing.insecure: traces name SPIFFE IDs and addresses, and travel to otel.example:4317 without TLS",
		`profile "default": minTTL 5s is less than 5m: a workload whose renewal fails for half of that is cut off`,
		`profile "default": maxLineageAge 5s is less than half of defaultTTL 20s, which is when agents renew: no client certificate will ever renew itself`,
		"issuingCA.lifetime: 30m is less than 1h: when its renewal fails for half of that, nothing more is issued",
		"ledger.retention: 1h is less than 24h: who had a certificate cannot be looked up for long",
	}
	if !reflect.DeepEqual(warnings, want) {
		t.Errorf("\ngot  %s\nwant %s", strings.Join(warnings, "\n     "), strings.Join(want, "\n     "))
	}
}

const cfsslFile = `{"signing": {"default": {"expiry": "1h", "usages": ["digital signature", "server auth", "client auth"]},
 "profiles": {"db": {"expiry": "60h", "usages": ["signing", "server auth", "client auth"]}}}}`

func TestProfilesCanComeFromACFSSLFile(t *testing.T) {
	path := write(t, "cfsslProfilesFile: cfssl.json\nissuingCA: {lifetime: 8d}\nprofiles: {web: {maxTTL: 2h}}\n")
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), "cfssl.json"), []byte(cfsslFile), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	profiles, err := c.SigningProfiles()
	if err != nil {
		t.Fatal(err)
	}
	for name, ttl := range map[string]time.Duration{"default": time.Hour, "db": 60 * time.Hour, "web": 2 * time.Hour} {
		if p := profiles[name]; p == nil || p.MaxTTL() != ttl {
			t.Errorf("profile %s is %+v, want a maxTTL of %s", name, p, ttl)
		}
	}
	c.IssuingCA.Lifetime = Duration(7 * day)
	if _, err := c.Validate(); err == nil || !strings.Contains(err.Error(), `3 × the expiry of profile "db" in cfsslProfilesFile 60h = 180h`) {
		t.Errorf("the lifetimes' error is %v", err)
	}
	c.Profiles["db"] = defaultProfile()
	if _, err := c.Validate(); err == nil || !strings.Contains(err.Error(), "profiles.db: "+c.CFSSLProfilesFile+" has a profile of this name too") {
		t.Errorf("the error for a name that is there twice is %v", err)
	}
	c.CFSSLProfilesFile += ".none"
	if _, err := c.Validate(); err == nil || !strings.Contains(err.Error(), "cfsslProfilesFile: opening the cfssl profiles") {
		t.Errorf("the error for a file that is not there is %v", err)
	}
}

func TestPrintShowsTheEffectiveConfigAndLoadReadsItBack(t *testing.T) {
	for _, text := range []string{"", "profiles: {'istio.io/a': {maxTTL: 1h}}\ntrustDomain: '1'\nledger: {archiveDir: 'a: \"#b'}\n"} {
		c := load(t, text)
		for _, asJSON := range []bool{false, true} {
			var out bytes.Buffer
			if err := c.Print(&out, asJSON); err != nil {
				t.Fatal(err)
			}
			if asJSON && !json.Valid(out.Bytes()) {
				t.Errorf("not JSON: %s", out.Bytes())
			}
			if got := load(t, out.String()); !reflect.DeepEqual(got, c) {
				t.Errorf("got %+v, want %+v from\n%s", got, c, out.Bytes())
			}
		}
	}
}

func TestDurationsAreWrittenAsPeopleDo(t *testing.T) {
	for text, want := range map[string]string{
		"24h": "24h", "1d": "24h", "48h": "2d", "7d": "7d", "3650d": "3650d", "36500d": "36500d", "90m": "1h30m", "1.5h": "1h30m", "36h": "36h",
		"1d12h": "36h", "0": "0s", "0s": "0s", "60s": "1m", "500ms": "500ms", "1h30m0s": "1h30m", "0.5d": "12h", "2m3s": "2m3s", "1µs": "1µs", "10h": "10h",
	} {
		d, err := ParseDuration(text)
		if err != nil || d.String() != want {
			t.Errorf("%s is written %s (%v), want %s", text, d, err, want)
			continue
		}
		if again, err := ParseDuration(d.String()); err != nil || again != d {
			t.Errorf("%s reads back as %s: %v", d, again, err)
		}
	}
	for _, text := range []string{"", "h", "1", "1 h", "+1h", "-1h", ".h", "1.2.3h", "1e3h", "0x1h", "1h-1m", "١h", "1H", "36500d1ns", "1/2h", "Inf", "1_0h"} {
		if d, err := ParseDuration(text); err == nil {
			t.Errorf("%q was taken as %s", text, d)
		}
	}
}

func TestEveryDocumentedKeyIsTakenWithItsDefault(t *testing.T) {
	page, err := os.ReadFile("../../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	keys := regexp.MustCompile("(?m)^### `(.+)`\n\n.+\\. (?:Default: `(.*)`|Required)\\.$").FindAllStringSubmatch(string(page), -1)
	if headings := strings.Count(string(page), "\n### "); len(keys) != headings || headings < 50 {
		t.Fatalf("%d of %d keys could be read from the page", len(keys), headings)
	}
	for _, key := range keys {
		path, value := key[1], key[2]
		if value == "" {
			value = "required"
		}
		parts := strings.Split(path, ".")
		text := value
		for i := len(parts) - 1; i >= 0; i-- {
			name, list := strings.CutSuffix(parts[i], "[]")
			if name == "<name>" {
				name = "default"
			}
			text = "{" + name + ": " + text + "}"
			if list {
				text = strings.Replace(text, ": {", ": [{", 1)
				text = text[:len(text)-1] + "]}"
			}
		}
		got, err := Load(write(t, text))
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if strings.Contains(path, "[]") {
			continue
		}
		got.DataDir, got.Root.File.Dir = Default().DataDir, Default().Root.File.Dir // made absolute
		if !reflect.DeepEqual(got, Default()) {
			t.Errorf("with %s other things hold than by default: %+v", text, got)
		}
	}
}

func FuzzLoad(f *testing.F) {
	var page bytes.Buffer
	if err := Default().Print(&page, false); err != nil {
		f.Fatal(err)
	}
	f.Add(page.Bytes())
	for _, seed := range []string{
		"", "{}", "csr: {listen: ':1'}", "profiles: {a: &a {maxTTL: 1h}, b: *a}", "a: &a [*a]", "? [a]: b", "<<: {trustDomain: a}", "--- a\n--- b\n",
		"trustDomain: !!binary /wAA", "dataDir: ' a: #b'", "tracing: {sampleRatio: 1e-300}", "ledger: {retention: 1.5h3ns}", "csr: {serverNames: [0644, 1:30]}",
		"callers: {tokenIssuers: [{name: a, issuer: x, jwksFile: f, kind: oidc, identity: a, audiences: [b]}]}", "dataDir: |\n  a\n  b\n", "\xff\xfe", "cfsslProfilesFile: x",
	} {
		f.Add([]byte(seed))
	}
	folder := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := parse(text, "kedge.yaml", folder)
		if err != nil {
			if err.Error() == "" {
				t.Error("an error without a text")
			}
			return
		}
		if c.CFSSLProfilesFile != "" && !strings.HasPrefix(c.CFSSLProfilesFile, folder) {
			return // no files but our own
		}
		if _, err := c.Validate(); err != nil {
			return
		}
		for _, asJSON := range []bool{false, true} {
			var out bytes.Buffer
			if err := c.Print(&out, asJSON); err != nil {
				t.Fatal(err)
			}
			again, err := parse(out.Bytes(), "printed", "/elsewhere")
			if err != nil {
				t.Fatalf("what was printed cannot be read: %v\n%s", err, out.Bytes())
			}
			if !reflect.DeepEqual(c, again) {
				t.Fatalf("%+v was printed and read as %+v\n%s", c, again, out.Bytes())
			}
		}
	})
}

func FuzzDuration(f *testing.F) {
	for _, seed := range []string{"24h", "7d", "1.5h", "-1s", "0", "1h30m", "0.000000001s", "36500d", "1µs"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d, err := ParseDuration(text)
		if err != nil {
			return
		}
		if d < 0 || d > Duration(maxDuration) {
			t.Fatalf("%q gives %d", text, d)
		}
		if again, err := ParseDuration(d.String()); err != nil || again != d {
			t.Fatalf("%q is written %s and read as %s (%v)", text, d, again, err)
		}
	})
}
