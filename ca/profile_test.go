package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"math"
	"math/big"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func newTestProfile(t *testing.T, change func(*ProfileConfig)) *Profile {
	t.Helper()
	config := DefaultProfileConfig()
	if change != nil {
		change(&config)
	}
	p, err := NewProfile("web", config)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestTheDefaultProfileIsValidAndAsDesigned(t *testing.T) {
	p := newTestProfile(t, nil)
	if p.Name() != "web" || p.MinTTL() != 5*time.Minute || p.MaxTTL() != 24*time.Hour || p.MaxLineageAge() != 0 || len(p.Warnings()) > 0 {
		t.Errorf("got %+v", p)
	}
}

func TestAProfileThatIsNotValidIsRefusedWithItsNumbers(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*ProfileConfig)
		want   string
	}{
		"nothing": {func(c *ProfileConfig) { *c = ProfileConfig{OverMax: "clamp"} }, "minTTL 0s is not more than 0\n" +
			"defaultTTL 0s is not more than 0\nmaxTTL 0s is not more than 0"},
		"negative":            {func(c *ProfileConfig) { c.MinTTL = -time.Second }, `minTTL -1s is not more than 0`},
		"minimum too large":   {func(c *ProfileConfig) { c.MinTTL = 48 * time.Hour }, `minTTL 2d is more than defaultTTL 24h`},
		"default too large":   {func(c *ProfileConfig) { c.DefaultTTL = 25 * time.Hour }, `defaultTTL 25h is more than maxTTL 24h`},
		"absurd":              {func(c *ProfileConfig) { c.MaxTTL = math.MaxInt64 }, `maxTTL 2562047h47m16.854775807s is more than 10 years`},
		"parts of a second":   {func(c *ProfileConfig) { c.MinTTL = 1500 * time.Millisecond }, `minTTL 1.5s is not a whole number of seconds`},
		"negative backdate":   {func(c *ProfileConfig) { c.Backdate = -1 }, `backdate -1ns is negative`},
		"large backdate":      {func(c *ProfileConfig) { c.Backdate = 25 * time.Hour }, `backdate 25h is more than 1h: set the clocks that differ by so much`},
		"backdate of a part":  {func(c *ProfileConfig) { c.Backdate = 1 }, `backdate 1ns is not a whole number of seconds`},
		"over the maximum":    {func(c *ProfileConfig) { c.OverMax = "" }, `overMax "" is neither "clamp" nor "refuse"`},
		"weak key":            {func(c *ProfileConfig) { c.ExtraKeys = []string{"P-224"} }, `extraKeys: "P-224" is neither "P-521" nor "Ed25519"; RSA`},
		"key twice":           {func(c *ProfileConfig) { c.ExtraKeys = []string{"P-521", "P-521"} }, `extraKeys: "P-521" is there twice`},
		"negative lineage":    {func(c *ProfileConfig) { c.MaxLineageAge = -time.Hour }, `maxLineageAge -1h is negative; 0 means for ever`},
		"absurd lineage":      {func(c *ProfileConfig) { c.MaxLineageAge = math.MaxInt64 }, `is more than 100 years; 0 means for ever`},
		"pattern":             {func(c *ProfileConfig) { c.Identities = []string{"ns//sa/*"} }, `identities: `},
		"two things together": {func(c *ProfileConfig) { c.OverMax, c.Backdate = "x", -1 }, "backdate -1ns is negative\noverMax"},
	} {
		t.Run(name, func(t *testing.T) {
			config := DefaultProfileConfig()
			test.change(&config)
			_, err := NewProfile("web", config)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("\ngot  %v\nwant %s", err, test.want)
			}
		})
	}
	for _, name := range []string{"", "-a", "a b", "ä", strings.Repeat("a", 65), "a\n"} {
		if _, err := NewProfile(name, DefaultProfileConfig()); err == nil {
			t.Errorf("the name %q was taken", name)
		}
	}
}

func TestAProfileDoesNotChangeWithTheConfigThatItCameFrom(t *testing.T) {
	config := DefaultProfileConfig()
	config.ExtraKeys, config.Identities = []string{"P-521"}, []string{"ns/a/sa/*"}
	p, err := NewProfile("web", config)
	if err != nil {
		t.Fatal(err)
	}
	config.ExtraKeys[0], config.Identities[0] = "Ed25519", "ns/b/sa/*"
	if !p.AllowsIdentity("/ns/a/sa/x") || p.AllowsIdentity("/ns/b/sa/x") || !reflect.DeepEqual(p.config.ExtraKeys, []string{"P-521"}) {
		t.Errorf("got %+v", p)
	}
}

func TestOddProfilesAreWarnedOf(t *testing.T) {
	p := newTestProfile(t, func(c *ProfileConfig) {
		c.MinTTL, c.MaxTTL, c.MaxLineageAge = time.Second, 91*24*time.Hour, time.Hour
	})
	for i, want := range []string{
		`profile "web": minTTL 1s is less than 5m`, `profile "web": maxTTL 91d is more than 90d`, `profile "web": maxLineageAge 1h is less than half of defaultTTL 24h`,
	} {
		if got := p.Warnings(); len(got) != 3 || !strings.HasPrefix(got[i], want) {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
}

func TestLifetimesStayWithinTheProfile(t *testing.T) {
	clamp := newTestProfile(t, func(c *ProfileConfig) { c.DefaultTTL = 12 * time.Hour })
	refuse := newTestProfile(t, func(c *ProfileConfig) { c.OverMax = OverMaxRefuse })
	for _, test := range []struct {
		profile *Profile
		asked   time.Duration
		granted time.Duration
		clamped bool
		wrong   string
	}{
		{clamp, 0, 12 * time.Hour, false, ""},
		{clamp, 5 * time.Minute, 5 * time.Minute, false, ""},
		{clamp, time.Hour + time.Millisecond, time.Hour, false, ""},
		{clamp, 24 * time.Hour, 24 * time.Hour, false, ""},
		{clamp, 24*time.Hour + 1, 24 * time.Hour, true, ""},
		{clamp, math.MaxInt64, 24 * time.Hour, true, ""},
		{refuse, 24 * time.Hour, 24 * time.Hour, false, ""},
		{clamp, -time.Second, 0, false, "the validity duration -1s is negative: leave it 0 for the default of 12h"},
		{clamp, math.MinInt64, 0, false, "is negative"},
		{clamp, 299 * time.Second, 0, false, `the validity duration 4m59s is less than the 5m that the profile "web" grants at least: ask for 300 seconds or more`},
		{clamp, 1, 0, false, "the validity duration 1ns is less than the 5m"},
		{refuse, 25 * time.Hour, 0, false, `the validity duration 25h is more than the 24h that the profile "web" grants at most: ask for 86400 seconds or less`},
		{refuse, math.MaxInt64, 0, false, "is more than the 24h"},
	} {
		granted, clamped, err := test.profile.Lifetime(test.asked)
		if granted != test.granted || clamped != test.clamped || (err == nil) != (test.wrong == "") {
			t.Errorf("%s: got %s, %t, %v", test.asked, granted, clamped, err)
		}
		if err != nil && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), test.wrong)) {
			t.Errorf("%s: got the error %v, want %s", test.asked, err, test.wrong)
		}
	}
}

func TestSecondsFromOutsideStayAbsurdWhenTheyAre(t *testing.T) {
	for n, want := range map[int64]time.Duration{
		0: 0, 1: time.Second, -1: -time.Second, 86400: 24 * time.Hour, 9223372036: 9223372036 * time.Second,
		9223372037: math.MaxInt64, math.MaxInt64: math.MaxInt64, -9223372037: math.MinInt64, math.MinInt64: math.MinInt64,
	} {
		if got := Seconds(n); got != want {
			t.Errorf("%d gives %d, want %d", n, got, want)
		}
	}
}

func TestTheBackdateScalesWithTheLifetime(t *testing.T) {
	p := newTestProfile(t, nil)
	for ttl, want := range map[time.Duration]time.Duration{
		24 * time.Hour: time.Minute, 10 * time.Minute: time.Minute, 5 * time.Minute: 30 * time.Second, 65 * time.Second: 6 * time.Second,
		9 * time.Second: 0, 0: 0, -time.Hour: 0, math.MinInt64: 0,
	} {
		if got := p.Backdate(ttl); got != want {
			t.Errorf("%s gives %s, want %s", ttl, got, want)
		}
	}
}

func TestIdentitiesOutsideTheListMayNotUseAProfile(t *testing.T) {
	all := newTestProfile(t, nil)
	some := newTestProfile(t, func(c *ProfileConfig) { c.Identities = []string{"ns/prod/sa/*", "ns/test/sa/web"} })
	for path, want := range map[string]bool{
		"/ns/prod/sa/web": true, "/ns/test/sa/web": true, "/ns/test/sa/db": false, "/ns/prod/sa/a/b": false, "/ns/prod/sa": false, "": false,
	} {
		if got := some.AllowsIdentity(path); got != want {
			t.Errorf("%q: %t", path, got)
		}
		if !all.AllowsIdentity(path) {
			t.Errorf("%q may not use a profile for all", path)
		}
	}
}

// modulus is an odd number of that many bits: no key, but the policy looks only at its shape.
func modulus(bits int) *big.Int {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	return n.SetBit(n, 0, 1)
}

func TestOnlyTheKeysOfThePolicyAreAllowed(t *testing.T) {
	const basic = `; the profile "web" allows RSA of 2048 to 4096 bits, P-256 and P-384`
	const extra = `; the profile "web" allows RSA of 2048 to 4096 bits, P-256, P-384, P-521 and Ed25519`
	curve := func(c elliptic.Curve) crypto.PublicKey {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key.Public()
	}
	edwards, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := newTestProfile(t, nil)
	more := newTestProfile(t, func(c *ProfileConfig) { c.ExtraKeys = []string{"P-521", "Ed25519"} })
	for name, test := range map[string]struct {
		key         crypto.PublicKey
		basic, more string
	}{
		"P-256":             {curve(elliptic.P256()), "", ""},
		"P-384":             {curve(elliptic.P384()), "", ""},
		"P-521":             {curve(elliptic.P521()), "P-521" + basic, ""},
		"P-224":             {curve(elliptic.P224()), "P-224" + basic, "P-224" + extra},
		"Ed25519":           {edwards, "Ed25519" + basic, ""},
		"Ed25519 cut short": {edwards[:31], "Ed25519" + basic, "Ed25519" + extra},
		"RSA-1024":          {&rsa.PublicKey{N: modulus(1024), E: 65537}, "RSA of 1024 bits" + basic, "RSA of 1024 bits" + extra},
		"RSA-2047":          {&rsa.PublicKey{N: modulus(2047), E: 65537}, "RSA of 2047 bits" + basic, "RSA of 2047 bits" + extra},
		"RSA-2048":          {&rsa.PublicKey{N: modulus(2048), E: 65537}, "", ""},
		"RSA-4096":          {&rsa.PublicKey{N: modulus(4096), E: 1<<31 - 1}, "", ""},
		"RSA-4097":          {&rsa.PublicKey{N: modulus(4097), E: 65537}, "RSA of 4097 bits" + basic, "RSA of 4097 bits" + extra},
		"RSA even":          {&rsa.PublicKey{N: new(big.Int).Lsh(modulus(2047), 1), E: 65537}, "RSA with an even modulus, which is no product of two primes" + basic, "RSA with an even modulus"},
		"RSA exponent 1":    {&rsa.PublicKey{N: modulus(2048), E: 1}, "RSA with the public exponent 1, which is not an odd number from 65537 to 2147483647" + basic, "exponent 1"},
		"RSA exponent 3":    {&rsa.PublicKey{N: modulus(2048), E: 3}, "exponent 3", "exponent 3"},
		"RSA exponent even": {&rsa.PublicKey{N: modulus(2048), E: 65538}, "exponent 65538", "exponent 65538"},
		"RSA exponent huge": {&rsa.PublicKey{N: modulus(2048), E: 1<<31 + 1}, "exponent 2147483649", "exponent 2147483649"},
		"something else":    {"a key", "string" + basic, "string" + extra},
		"nothing":           {nil, "<nil>" + basic, "<nil>" + extra},
	} {
		t.Run(name, func(t *testing.T) {
			for _, policy := range []struct {
				profile *Profile
				want    string
			}{{p, test.basic}, {more, test.more}} {
				err := policy.profile.AllowsKey(test.key)
				if (err == nil) != (policy.want == "") || err != nil && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), policy.want)) {
					t.Errorf("got %v, want %s", err, policy.want)
				}
			}
		})
	}
}

func FuzzProfile(f *testing.F) {
	d := DefaultProfileConfig()
	f.Add(int64(d.DefaultTTL), int64(d.MaxTTL), int64(d.MinTTL), "clamp", int64(d.Backdate), int64(0))
	f.Add(int64(time.Second), int64(time.Second), int64(time.Second), "refuse", int64(time.Hour), int64(math.MaxInt64))
	f.Add(int64(time.Hour), int64(10*365*24*time.Hour), int64(time.Second), "clamp", int64(0), int64(-1))
	f.Fuzz(func(t *testing.T, defaultTTL, maxTTL, minTTL int64, overMax string, backdate, asked int64) {
		p, err := NewProfile("web", ProfileConfig{DefaultTTL: time.Duration(defaultTTL), MaxTTL: time.Duration(maxTTL), MinTTL: time.Duration(minTTL),
			OverMax: overMax, Backdate: time.Duration(backdate)})
		if err != nil {
			return
		}
		granted, clamped, err := p.Lifetime(time.Duration(asked))
		if err != nil {
			if granted != 0 || !errors.Is(err, ErrInvalid) {
				t.Fatalf("%d is granted with the error %v", granted, err)
			}
			return
		}
		back := p.Backdate(granted)
		if granted < p.MinTTL() || granted > p.MaxTTL() || granted%time.Second != 0 || clamped && (granted != p.MaxTTL() || asked <= int64(granted)) ||
			back < 0 || back > granted/10 || !slices.Contains([]string{OverMaxClamp, OverMaxRefuse}, overMax) {
			t.Fatalf("asked %d, granted %d, clamped %t, backdate %d under %+v", asked, granted, clamped, back, p.config)
		}
	})
}
