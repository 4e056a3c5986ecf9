// Package cfsslprofile reads signing profiles that were written for cfssl.
//
// Parse takes a cfssl configuration file, strictly: cfssl's own decoder accepts unknown and repeated keys, unknown usages and a
// negative expiry, and a cfssl profile may make CA certificates or let the CSR decide what stands in a certificate. Here a
// CSR decides nothing but the public key, and what is signed is an X.509-SVID. So a profile may say what that leaves to say,
// its usages (which must be those of an SVID), expiry and backdate, and everything else is refused with the reason why.
// What passes is read once more with cfssl's own package, and both readings must agree.
package cfsslprofile

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	cfssl "github.com/cloudflare/cfssl/config"

	"kedge/ca"
)

// Load reads the file at path; see Parse.
func Load(path string) (map[string]ca.ProfileConfig, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening the cfssl profiles: %w", err)
	}
	defer file.Close() // it was only read
	text, err := readBounded(file)
	if err != nil {
		return nil, fmt.Errorf("reading the cfssl profiles %s: %w", path, err)
	}
	profiles, err := Parse(text)
	if err != nil {
		return nil, fmt.Errorf("the cfssl profiles %s: %w", path, err)
	}
	return profiles, nil
}

// Parse reads the text of a cfssl configuration file. The result has one entry a profile, "default" for the default one: expiry
// becomes DefaultTTL and MaxTTL, so that nobody gets more than cfssl would have given, backdate becomes Backdate, and the rest is
// that of ca.DefaultProfileConfig. Each has passed ca.NewProfile. An error names everything that is wrong, by profile and key.
func Parse(text []byte) (map[string]ca.ProfileConfig, error) {
	root, err := decode(text)
	if err != nil {
		return nil, err
	}
	r := &reader{profiles: map[string]ca.ProfileConfig{}}
	r.file(root)
	if len(r.wrong) == 0 && len(r.profiles) == 0 {
		r.refuse("signing", `there is no profile: give "default" or "profiles"`)
	}
	if len(r.wrong) > 0 {
		return nil, errors.Join(r.wrong...)
	}
	if err := r.agree(text); err != nil {
		return nil, err
	}
	return r.profiles, nil
}

// reader walks through a decoded file and gathers profiles, and what is wrong.
type reader struct {
	profiles map[string]ca.ProfileConfig
	wrong    []error
}

func (r *reader) refuse(path, format string, args ...any) {
	r.wrong = append(r.wrong, fmt.Errorf("%s: %w", path, fmt.Errorf(format, args...)))
}

// object gives back the keys of an object, and refuses what is none.
func (r *reader) object(path string, node any) (object, bool) {
	o, ok := node.(object)
	if !ok {
		r.refuse(path, "this is %s, and must be an object", kind(node))
	}
	return o, ok
}

func (r *reader) file(node any) {
	top, ok := r.object("the file", node)
	if !ok {
		return
	}
	if !top.has("signing") {
		r.refuse("signing", "the key is missing: it holds the profiles")
	}
	for _, member := range top {
		switch why := refusedAtTop[member.key]; {
		case member.key == "signing":
			r.signing(member.value)
		case why != "":
			r.refuse(member.key, "%s", why)
		default:
			r.refuse(fmt.Sprintf("%.64q", member.key), `this key is unknown: at the top of the file stands "signing"`)
		}
	}
}

func (r *reader) signing(node any) {
	signing, ok := r.object("signing", node)
	if !ok {
		return
	}
	for _, member := range signing {
		switch member.key {
		case "default":
			r.profile("signing.default", ca.DefaultProfile, member.value)
		case "profiles":
			profiles, ok := r.object("signing.profiles", member.value)
			if !ok {
				continue
			}
			for _, profile := range profiles {
				path := fmt.Sprintf("signing.profiles.%.64s", profile.key)
				if profile.key == ca.DefaultProfile {
					r.refuse(path, "the name is that of signing.default: give the profile another one")
					continue
				}
				r.profile(path, profile.key, profile.value)
			}
		default:
			r.refuse(fmt.Sprintf("signing.%.64s", member.key), `this key is unknown: under "signing" stand "default" and "profiles"`)
		}
	}
}

// profile reads one profile. Only what ca.NewProfile accepts too becomes part of the result.
func (r *reader) profile(path, name string, node any) {
	keys, ok := r.object(path, node)
	if !ok {
		return
	}
	before := len(r.wrong)
	config := ca.DefaultProfileConfig()
	for _, member := range keys {
		at := fmt.Sprintf("%s.%.64s", path, member.key)
		switch why := refusedInProfile[member.key]; {
		case member.key == "usages":
			r.readUsages(at, member.value)
		case member.key == "expiry":
			config.MaxTTL = r.expiry(at, member.value)
		case member.key == "backdate":
			config.Backdate = r.duration(at, member.value)
		case why != "":
			r.refuse(at, "%s", why)
		default:
			r.refuse(at, `this key is unknown: a profile has "usages", "expiry" and "backdate"`)
		}
	}
	if !keys.has("expiry") {
		r.refuse(path+".expiry", `the key is missing: say how long certificates live, like "24h"`)
	}
	if !keys.has("usages") {
		r.refuse(path+".usages", "the key is missing, and without it cfssl signs nothing: give %s", leafUsages)
	}
	config.DefaultTTL = config.MaxTTL
	config.MinTTL = min(config.MinTTL, config.MaxTTL)
	if len(r.wrong) > before {
		return
	}
	if _, err := ca.NewProfile(name, config); err != nil {
		r.refuse(path, "%w", err)
		return
	}
	r.profiles[name] = config
}

func (r *reader) duration(path string, node any) time.Duration {
	text, ok := node.(string)
	if !ok {
		r.refuse(path, `this is %s, and must be a duration in quotes, like "24h"`, kind(node))
		return 0
	}
	d, err := time.ParseDuration(text)
	switch {
	case err != nil && strings.HasSuffix(text, "d"):
		r.refuse(path, "%.40q: cfssl knows no days: write hours, like \"168h\"", text)
	case err != nil:
		r.refuse(path, `%.40q is not a duration like "24h" or "90m", or is too large for one`, text)
	case d < 0:
		r.refuse(path, "%s is negative", text)
	}
	return d
}

func (r *reader) expiry(path string, node any) time.Duration {
	before := len(r.wrong)
	d := r.duration(path, node)
	switch {
	case len(r.wrong) > before:
	case d == 0:
		r.refuse(path, "%s is no lifetime", node)
	case d > ca.LimitTTL:
		r.refuse(path, "%s is more than 10 years", node)
	}
	return d
}

// leafUsages names the usages of an SVID in error texts.
const leafUsages = `"digital signature" (or "signing"), "server auth" and "client auth"; "key encipherment" may be there too`

// readUsages makes sure that the usages are those of an SVID leaf (X509-SVID 4.3 and 4.4): which of them a certificate has is
// not the profile's choice.
func (r *reader) readUsages(path string, node any) {
	list, ok := node.([]any)
	if !ok {
		r.refuse(path, "this is %s, and must be a list of usages: %s", kind(node), leafUsages)
		return
	}
	var signature, server, client bool
	seen := map[string]bool{}
	for i, entry := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		usage, ok := entry.(string)
		if !ok {
			r.refuse(at, "this is %s, and must be a usage in quotes", kind(entry))
			continue
		}
		if seen[usage] {
			r.refuse(at, "%.40q is there twice", usage)
		}
		seen[usage] = true
		_, keyUsage := cfssl.KeyUsage[usage]
		_, extended := cfssl.ExtKeyUsage[usage]
		switch usage {
		case "signing", "digital signature":
			signature = true
		case "server auth":
			server = true
		case "client auth":
			client = true
		case "key encipherment": // the signing path gives it to RSA keys, and to no other (RFC 8813 3)
		case "cert sign", "crl sign":
			r.refuse(at, "%q belongs to a CA, and an SVID must not have it (X509-SVID 4.3)", usage)
		default:
			if keyUsage || extended {
				r.refuse(at, "%q is not a usage of an SVID: give %s", usage, leafUsages)
			} else {
				r.refuse(at, "%.40q is a usage that cfssl does not know, and would leave out without a word", usage)
			}
		}
	}
	var missing []string
	for usage, there := range map[string]bool{"digital signature": signature, "server auth": server, "client auth": client} {
		if !there {
			missing = append(missing, fmt.Sprintf("%q", usage))
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		r.refuse(path, "%s missing: every SVID has it (X509-SVID 4.3, 4.4), so a profile without it would not mean what it says",
			strings.Join(missing, ", "))
	}
}

// agree has cfssl read the same text: what it makes of it must be what was made of it here.
func (r *reader) agree(text []byte) error {
	config, err := cfssl.LoadConfig(text)
	if err != nil {
		return fmt.Errorf("cfssl itself refuses the file: %w", err)
	}
	if !config.Valid() {
		return errors.New("cfssl itself calls the file invalid")
	}
	theirs := maps.Clone(config.Signing.Profiles)
	if theirs == nil {
		theirs = map[string]*cfssl.SigningProfile{}
	}
	if _, ours := r.profiles[ca.DefaultProfile]; ours { // without one cfssl makes up its own, of one year
		theirs[ca.DefaultProfile] = config.Signing.Default
	}
	if len(theirs) != len(r.profiles) {
		return fmt.Errorf("cfssl reads %d profiles where %d are written", len(theirs), len(r.profiles))
	}
	for name, profile := range r.profiles {
		their := theirs[name]
		if their == nil {
			return fmt.Errorf("cfssl does not find the profile %q", name)
		}
		if their.Expiry != profile.MaxTTL || their.Backdate != 0 && their.Backdate != profile.Backdate {
			return fmt.Errorf("cfssl reads the profile %q differently: expiry %s and backdate %s, not %s and %s",
				name, their.Expiry, their.Backdate, profile.MaxTTL, profile.Backdate)
		}
		if _, _, unknown := their.Usages(); len(unknown) > 0 {
			return fmt.Errorf("cfssl does not know the usages %q of the profile %q", unknown, name)
		}
	}
	return nil
}
