package cfsslprofile

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	cfssl "github.com/cloudflare/cfssl/config"

	"kedge/ca"
)

const usages = `"usages": ["digital signature", "server auth", "client auth"]`

// one is a file whose profile "web" has these keys.
func one(keys string) string {
	return `{"signing": {"profiles": {"web": {` + keys + `}}}}`
}

func TestAProfileOfALeafIsTaken(t *testing.T) {
	config := func(ttl, minimum, backdate time.Duration) ca.ProfileConfig {
		c := ca.DefaultProfileConfig()
		c.DefaultTTL, c.MaxTTL, c.MinTTL, c.Backdate = ttl, ttl, minimum, backdate
		return c
	}
	for name, test := range map[string]struct {
		text string
		want map[string]ca.ProfileConfig
	}{
		"default and others": {`{"signing": {
			"default": {"expiry": "24h", "usages": ["signing", "key encipherment", "server auth", "client auth"]},
			"profiles": {"db": {"expiry": "168h", "backdate": "5m", ` + usages + `}}}}`,
			map[string]ca.ProfileConfig{"default": config(24*time.Hour, 5*time.Minute, time.Minute), "db": config(168*time.Hour, 5*time.Minute, 5*time.Minute)}},
		"no default":  {one(`"expiry": "1h", ` + usages), map[string]ca.ProfileConfig{"web": config(time.Hour, 5*time.Minute, time.Minute)}},
		"short":       {one(`"expiry": "90s", ` + usages), map[string]ca.ProfileConfig{"web": config(90*time.Second, 90*time.Second, time.Minute)}},
		"no backdate": {one(`"expiry": "1h", "backdate": "0s", ` + usages), map[string]ca.ProfileConfig{"web": config(time.Hour, 5*time.Minute, 0)}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse([]byte(test.text))
			if err != nil || !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %+v, %v, want %+v", got, err, test.want)
			}
		})
	}
}

func TestWhatIsNotALeafsOrLetsTheCSRDecideIsRefused(t *testing.T) {
	for name, test := range map[string]struct{ text, want string }{
		// what cfssl itself would take
		"CA":                    {one(`"expiry": "1h", "ca_constraint": {"is_ca": true}, ` + usages), "signing.profiles.web.ca_constraint: it is about CA certificates"},
		"CA at the wrong place": {one(`"expiry": "1h", "is_ca": true, ` + usages), "signing.profiles.web.is_ca: it is about CA certificates"},
		"copied extensions":     {one(`"expiry": "1h", "copy_extensions": true, ` + usages), "signing.profiles.web.copy_extensions: it lets the CSR decide"},
		"allowed extensions":    {one(`"expiry": "1h", "allowed_extensions": ["1.2.3"], ` + usages), "signing.profiles.web.allowed_extensions: it lets the CSR decide"},
		"CSR whitelist":         {one(`"expiry": "1h", "CSRWhitelist": {"URIs": true}, ` + usages), "signing.profiles.web.CSRWhitelist: it lets the CSR decide"},
		"CSR whitelist, small":  {one(`"expiry": "1h", "csrwhitelist": {"URIs": true}, ` + usages), "signing.profiles.web.csrwhitelist: this key is unknown"},
		"name whitelist":        {one(`"expiry": "1h", "name_whitelist": ".*", ` + usages), "signing.profiles.web.name_whitelist: it judges names that the CSR asks for"},
		"client's serials":      {one(`"expiry": "1h", "ClientProvidesSerialNumbers": true, ` + usages), "signing.profiles.web.ClientProvidesSerialNumbers: it lets the client choose"},
		"fixed start":           {one(`"expiry": "1h", "not_before": "2026-01-01T00:00:00Z", ` + usages), "signing.profiles.web.not_before: fixed dates give every certificate the same end"},
		"fixed end":             {one(`"expiry": "1h", "not_after": "2036-01-01T00:00:00Z", ` + usages), "signing.profiles.web.not_after: fixed dates"},
		"remote":                {one(`"remote": "a", ` + usages), "signing.profiles.web.remote: it hands requests to another signer"},
		"authenticated remote":  {one(`"auth_remote": {"remote": "a", "auth_key": "b"}`), "signing.profiles.web.auth_remote: it hands requests to another signer"},
		"key":                   {one(`"expiry": "1h", "auth_key": "a", ` + usages), "signing.profiles.web.auth_key: cfssl's shared keys authenticate nobody here"},
		"previous key":          {one(`"expiry": "1h", "prev_auth_key": "a", ` + usages), "signing.profiles.web.prev_auth_key: cfssl's shared keys"},
		"provider":              {one(`"expiry": "1h", "Provider": {}, ` + usages), "signing.profiles.web.Provider: it is a part of cfssl's own memory"},
		"nanoseconds":           {one(`"expiry": "1h", "Expiry": 1, ` + usages), `signing.profiles.web.Expiry: it is a part of cfssl's own memory, a number of nanoseconds: write "expiry"`},
		"CT":                    {one(`"expiry": "1h", "ct_log_servers": ["https://a"], ` + usages), "signing.profiles.web.ct_log_servers: certificates of a private trust domain go to no public log"},
		"OCSP":                  {one(`"expiry": "1h", "ocsp_url": "http://a", ` + usages), "signing.profiles.web.ocsp_url: an SVID carries no such pointer"},
		"CRL":                   {one(`"expiry": "1h", "crl_url": "http://a", ` + usages), "signing.profiles.web.crl_url: an SVID carries no such pointer"},
		"issuer URL":            {one(`"expiry": "1h", "issuer_urls": ["http://a"], ` + usages), "signing.profiles.web.issuer_urls: an SVID carries no such pointer"},
		"OCSP responder":        {one(`"expiry": "1h", "ocsp_no_check": true, ` + usages), "signing.profiles.web.ocsp_no_check: it is for OCSP responders"},
		"no linting":            {one(`"expiry": "1h", "lint_error_level": 7, ` + usages), "signing.profiles.web.lint_error_level: the linting of certificates cannot be turned down"},
		"lints left out":        {one(`"expiry": "1h", "ignored_lints": ["a"], ` + usages), "signing.profiles.web.ignored_lints: the linting"},
		"policies":              {one(`"expiry": "1h", "policies": [], ` + usages), "signing.profiles.web.policies: an SVID here carries no certificate policies"},
		"store":                 {one(`"expiry": "1h", "cert_store": "a", ` + usages), "signing.profiles.web.cert_store: the ledger is this CA's store"},
		"keys":                  {`{"signing": {}, "auth_keys": {"a": {"type": "standard", "key": "0123456789abcdef"}}}`, "auth_keys: cfssl's shared keys authenticate nobody here"},
		"remotes":               {`{"signing": {}, "remotes": {"a": "b"}}`, "remotes: it hands requests to another signer"},
		"OCSP signer":           {`{"signing": {}, "ocsp": {}}`, "ocsp: this CA answers no OCSP"},

		// keys
		"unknown key":             {one(`"expiry": "1h", "expiri": "2h", ` + usages), `signing.profiles.web.expiri: this key is unknown: a profile has "usages", "expiry" and "backdate"`},
		"unknown key in capitals": {one(`"EXPIRY": "1h", ` + usages), "signing.profiles.web.EXPIRY: this key is unknown"},
		"unknown key in signing":  {`{"signing": {"profile": {}}}`, `signing.profile: this key is unknown: under "signing" stand "default" and "profiles"`},
		"unknown key at the top":  {`{"signing": {}, "signings": {}}`, `"signings": this key is unknown: at the top of the file stands "signing"`},
		"key twice":               {one(`"expiry": "1h", "expiry": "2h", ` + usages), "signing.profiles.web.expiry: the key is there twice"},
		"profile twice":           {`{"signing": {"profiles": {"web": {}, "web": {}}}}`, "signing.profiles.web: the key is there twice"},
		"default twice":           {`{"signing": {"profiles": {"default": {"expiry": "1h", ` + usages + `}}}}`, "signing.profiles.default: the name is that of signing.default"},
		"bad name":                {`{"signing": {"profiles": {"a b": {"expiry": "1h", ` + usages + `}}}}`, `the name "a b" is not 1 to 64 letters`},
		"no profile":              {`{"signing": {}}`, `signing: there is no profile: give "default" or "profiles"`},
		"no profiles at all":      {`{"signing": {"profiles": {}}}`, `signing: there is no profile: give "default" or "profiles"`},
		"nothing":                 {`{}`, "signing: the key is missing: it holds the profiles"},

		// values
		"no expiry":          {one(usages), "signing.profiles.web.expiry: the key is missing: say how long certificates live"},
		"negative expiry":    {one(`"expiry": "-1h", ` + usages), "signing.profiles.web.expiry: -1h is negative"},
		"zero expiry":        {one(`"expiry": "0s", ` + usages), "signing.profiles.web.expiry: 0s is no lifetime"},
		"absurd expiry":      {one(`"expiry": "100000h", ` + usages), "signing.profiles.web.expiry: 100000h is more than 10 years"},
		"overflowing expiry": {one(`"expiry": "99999999999h", ` + usages), `signing.profiles.web.expiry: "99999999999h" is not a duration like "24h" or "90m", or is too large for one`},
		"days":               {one(`"expiry": "7d", ` + usages), `signing.profiles.web.expiry: "7d": cfssl knows no days: write hours, like "168h"`},
		"number":             {one(`"expiry": 3600, ` + usages), `signing.profiles.web.expiry: this is the number 3600, and must be a duration in quotes, like "24h"`},
		"null":               {one(`"expiry": null, ` + usages), "signing.profiles.web.expiry: this is null"},
		"parts of a second":  {one(`"expiry": "1h0.5s", ` + usages), "is not a whole number of seconds"},
		"negative backdate":  {one(`"expiry": "1h", "backdate": "-1m", ` + usages), "signing.profiles.web.backdate: -1m is negative"},
		"large backdate":     {one(`"expiry": "1h", "backdate": "2h", ` + usages), "backdate 2h is more than 1h"},
		"profile is a list":  {`{"signing": {"profiles": {"web": []}}}`, "signing.profiles.web: this is a list, and must be an object"},
		"file is a list":     {`[]`, "the file: this is a list, and must be an object"},

		// usages
		"no usages":        {one(`"expiry": "1h"`), "signing.profiles.web.usages: the key is missing, and without it cfssl signs nothing"},
		"default of cfssl": {`{"signing": {"default": {"expiry": "168h"}}}`, "signing.default.usages: the key is missing"},
		"empty usages":     {one(`"expiry": "1h", "usages": []`), `signing.profiles.web.usages: "client auth", "digital signature", "server auth" missing`},
		"server only":      {one(`"expiry": "1h", "usages": ["signing", "server auth"]`), `signing.profiles.web.usages: "client auth" missing: every SVID has it`},
		"CA usage":         {one(`"expiry": "1h", "usages": ["signing", "server auth", "client auth", "cert sign"]`), `signing.profiles.web.usages[3]: "cert sign" belongs to a CA`},
		"any":              {one(`"expiry": "1h", "usages": ["signing", "server auth", "client auth", "any"]`), `signing.profiles.web.usages[3]: "any" is not a usage of an SVID`},
		"unknown usage":    {one(`"expiry": "1h", "usages": ["signing", "server auth", "client auth", "sever auth"]`), `signing.profiles.web.usages[3]: "sever auth" is a usage that cfssl does not know`},
		"usage twice":      {one(`"expiry": "1h", "usages": ["signing", "server auth", "client auth", "signing"]`), `signing.profiles.web.usages[3]: "signing" is there twice`},
		"usage no text":    {one(`"expiry": "1h", "usages": [1]`), "signing.profiles.web.usages[0]: this is the number 1, and must be a usage in quotes"},
		"usages no list":   {one(`"expiry": "1h", "usages": "signing"`), `signing.profiles.web.usages: this is the text "signing", and must be a list of usages`},

		// form
		"empty":         {"", "the JSON ends at octet 0, before it is complete"},
		"cut off":       {`{"signing": {`, "the JSON ends at octet 13, before it is complete"},
		"no JSON":       {"signing:", "not JSON at octet 0"},
		"two objects":   {one(`"expiry": "1h", `+usages) + "{}", "the JSON is followed by something at octet"},
		"not UTF-8":     {"{\"\xff\": 1}", "it is not UTF-8"},
		"nested deeply": {strings.Repeat("[", 10_000), "nested deeper than 16 levels"},
		"large":         {strings.Repeat(" ", maxFile+1), "it has more than the 1048576 octets that are read"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse([]byte(test.text))
			if err == nil || !strings.Contains(err.Error(), test.want) || got != nil {
				t.Errorf("\ngot  %v, %v\nwant %s", got, err, test.want)
			}
		})
	}
}

// Every key that cfssl's profile has is known here, as one that is taken or as one that is refused with a reason of its own.
func TestEveryKeyOfCFSSLHasAReason(t *testing.T) {
	profile := reflect.TypeFor[cfssl.SigningProfile]()
	for i := range profile.NumField() {
		field := profile.Field(i)
		key := field.Tag.Get("json")
		if key == "" {
			key = field.Name
		}
		if key != "usages" && key != "expiry" && key != "backdate" && refusedInProfile[key] == "" {
			t.Errorf("cfssl's key %q has no reason", key)
		}
	}
	top := reflect.TypeFor[cfssl.Config]()
	for i := range top.NumField() {
		key, _, _ := strings.Cut(top.Field(i).Tag.Get("json"), ",")
		if key != "signing" && refusedAtTop[key] == "" {
			t.Errorf("cfssl's key %q at the top has no reason", key)
		}
	}
}

func TestEverythingWrongIsSaidAtOnce(t *testing.T) {
	_, err := Parse([]byte(`{"signing": {"default": {"expiry": "-1h", "copy_extensions": true, "usages": ["any"]}}, "remotes": {}}`))
	if err == nil || strings.Count(err.Error(), "\n") != 4 {
		t.Errorf("got %v", err)
	}
}

func TestNoErrorShowsAKey(t *testing.T) {
	_, err := Parse([]byte(`{"signing": {"default": {"auth_key": "hunter2"}}, "auth_keys": {"a": {"type": "standard", "key": "hunter2"}}}`))
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("got %v", err)
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	folder := t.TempDir()
	good, bad, large := filepath.Join(folder, "good.json"), filepath.Join(folder, "bad.json"), filepath.Join(folder, "large.json")
	for path, text := range map[string]string{good: one(`"expiry": "1h", ` + usages), bad: "{}", large: strings.Repeat(" ", 2*maxFile)} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if profiles, err := Load(good); err != nil || len(profiles) != 1 {
		t.Errorf("got %v, %v", profiles, err)
	}
	for _, path := range []string{bad, large, filepath.Join(folder, "none.json")} {
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v", path, err)
		}
	}
}

// FuzzParse: whatever is taken is a valid profile here, and cfssl would neither copy from the CSR nor make a CA under it.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"signing": {"default": {"expiry": "24h", ` + usages + `}, "profiles": {"a": {"expiry": "1h", "backdate": "1m", ` + usages + `}}}}`))
	for key := range refusedInProfile {
		f.Add([]byte(one(fmt.Sprintf(`"expiry": "1h", %q: true, %s`, key, usages))))
	}
	f.Add([]byte(`{"signing": {"profiles": {"\ud800": {}}}}`))
	f.Add([]byte(`{"SIGNING": {}, "signing": null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		profiles, err := Parse(text)
		if err != nil {
			return
		}
		if len(profiles) == 0 {
			t.Fatal("no error, and no profile")
		}
		for name, config := range profiles {
			if _, err := ca.NewProfile(name, config); err != nil {
				t.Fatal(err)
			}
		}
		theirs, err := cfssl.LoadConfig(text)
		if err != nil {
			t.Fatal(err)
		}
		all := []*cfssl.SigningProfile{theirs.Signing.Default}
		for _, p := range theirs.Signing.Profiles {
			all = append(all, p)
		}
		for _, p := range all {
			if p.CAConstraint.IsCA || p.CopyExtensions || p.ClientProvidesSerialNumbers || p.CSRWhitelist != nil || p.NameWhitelist != nil || p.RemoteServer != "" ||
				len(p.AllowedExtensions) > 0 || !p.NotBefore.IsZero() || !p.NotAfter.IsZero() || p.Expiry <= 0 || p.Backdate < 0 {
				t.Fatalf("cfssl reads %+v", p)
			}
		}
	})
}
