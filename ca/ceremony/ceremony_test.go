package ceremony

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/ca"
)

var now = time.Date(2027, 1, 31, 12, 0, 0, 0, time.UTC)

func newKey(t *testing.T, curve elliptic.Curve) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

const rootPlan = `
make: root
purpose: the mesh's first root
operators: [Alice, Bob]
key: {uri: "pkcs11:token=roots;object=mesh"}
subject: {commonName: Mesh Root, organization: Example Bank, country: DE}
trustDomain: example.org
serial: 4f00112233445566778899aabbccddee
notBefore: 2027-01-31T00:00:00Z
notAfter: 2047-01-31T00:00:00Z
out: {file: root.pem, record: root.json}
`

func load(t *testing.T, folder, text string) (*Plan, error) {
	t.Helper()
	path := filepath.Join(folder, "plan.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(path)
}

// perform makes what a plan says with a key, and puts it into the plan's folder.
func perform(t *testing.T, folder, text string, key crypto.Signer) (*Prepared, *Signed) {
	t.Helper()
	plan, err := load(t, folder, text)
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := plan.Prepare(key.Public(), now)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := prepared.Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	file, _ := plan.Files()
	if err := os.WriteFile(file, signed.PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	return prepared, signed
}

func csr(t *testing.T, folder string, key crypto.Signer) {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"not.taken.over"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, "x.csr"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

const intermediatePlan = `
make: intermediate
purpose: issuing
operators: [Alice]
key: {uri: "pkcs11:token=roots;object=mesh"}
issuer: root.pem
csr: x.csr
subject: {commonName: Mesh Issuing 1}
trustDomain: example.org
serial: 4f00112233445566778899aabbccddef
notBefore: 2027-01-31T00:00:00Z
notAfter: 2028-01-31T00:00:00Z
out: {file: issuing.pem, record: issuing.json}
`

const crlPlan = `
make: crl
purpose: a stolen key
operators: [Alice]
key: {uri: "pkcs11:token=roots;object=mesh"}
issuer: root.pem
crl:
  number: "7"
  thisUpdate: 2027-01-31T00:00:00Z
  nextUpdate: 2027-04-30T00:00:00Z
  revoked: [{serial: "0a0b", at: 2027-01-30T00:00:00Z, reason: 1}]
out: {file: crl.pem, record: crl.json}
`

func TestARootItsIntermediateAndItsCRLVerify(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"P-256": newKey(t, elliptic.P256()), "P-384": newKey(t, elliptic.P384()), "RSA-2048": rsaKey} {
		t.Run(name, func(t *testing.T) {
			folder := t.TempDir()
			_, signed := perform(t, folder, rootPlan, key)
			root, err := x509.ParseCertificate(signed.DER)
			if err != nil {
				t.Fatal(err)
			}
			if root.MaxPathLen != 1 || !root.IsCA || len(root.URIs) != 1 || root.URIs[0].String() != "spiffe://example.org" || root.Subject.String() != "CN=Mesh Root,O=Example Bank,C=DE" {
				t.Errorf("the root is %s with %v and path length %d", root.Subject, root.URIs, root.MaxPathLen)
			}
			csr(t, folder, newKey(t, elliptic.P256()))
			_, signed = perform(t, folder, intermediatePlan, key)
			issuing, err := x509.ParseCertificate(signed.DER)
			if err != nil {
				t.Fatal(err)
			}
			roots := x509.NewCertPool()
			roots.AddCert(root)
			if _, err := issuing.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
				t.Error(err)
			}
			if len(issuing.DNSNames) > 0 || !issuing.MaxPathLenZero {
				t.Errorf("it has the names %v and the path length %d", issuing.DNSNames, issuing.MaxPathLen)
			}
			_, signed = perform(t, folder, crlPlan, key)
			list, err := x509.ParseRevocationList(signed.DER)
			if err != nil {
				t.Fatal(err)
			}
			if err := list.CheckSignatureFrom(root); err != nil || len(list.RevokedCertificateEntries) != 1 || list.Number.Int64() != 7 {
				t.Errorf("the CRL %s has %d entries: %v", list.Number, len(list.RevokedCertificateEntries), err)
			}
		})
	}
}

func TestWhatIsShownIsWhatIsSignedToTheOctet(t *testing.T) {
	key, folder := newKey(t, elliptic.P384()), t.TempDir()
	csr(t, folder, newKey(t, elliptic.P256()))
	for _, c := range []struct {
		plan  string
		shows []string
	}{
		{rootPlan, []string{"CN=Mesh Root,O=Example Bank,C=DE", "4f00112233445566778899aabbccddee", "critical, cA true, path length 1", "critical, keyCertSign, cRLSign", "URI spiffe://example.org",
			"ECDSA-SHA384", "2027-01-31T00:00:00Z", "2047-01-31T00:00:00Z", "P-384", "subjectKeyIdentifier", "authorityKeyIdentifier", "Alice, Bob", "the mesh's first root"}},
		{intermediatePlan, []string{"CN=Mesh Issuing 1", "CN=Mesh Root,O=Example Bank,C=DE", "P-256", "path length 0", "x.csr, SHA-256 ", "root.pem, SHA-256 "}},
		{crlPlan, []string{"CN=Mesh Root,O=Example Bank,C=DE", "0a0b at 2027-01-30T00:00:00Z, reason 1", "2027-04-30T00:00:00Z", "cRLNumber", "authorityKeyIdentifier"}},
	} {
		loaded, err := load(t, folder, c.plan)
		if err != nil {
			t.Fatal(err)
		}
		shown, err := loaded.Prepare(key.Public(), now)
		if err != nil {
			t.Fatal(err)
		}
		text := shown.Describe()
		later, signed := perform(t, folder, c.plan, key)
		if later.Describe() != text {
			t.Errorf("a second run shows something else:\n%s\n%s", text, later.Describe())
		}
		block, rest := pem.Decode([]byte(text))
		if block == nil || len(rest) > 0 {
			t.Fatalf("it does not end with what will be signed:\n%s", text)
		}
		// A certificate and a CRL are SEQUENCEs of what is signed, an algorithm and a signature (RFC 5280 4.1, 5.1).
		var parts struct {
			TBS       asn1.RawValue
			Algorithm pkix.AlgorithmIdentifier
			Signature asn1.BitString
		}
		if _, err := asn1.Unmarshal(signed.DER, &parts); err != nil || !bytes.Equal(parts.TBS.FullBytes, block.Bytes) {
			t.Errorf("what was signed is not what was shown (%v):\n%x\n%x", err, parts.TBS.FullBytes, block.Bytes)
		}
		for _, want := range append(c.shows, fmt.Sprintf("%d octets, SHA-256 %x, %s:", len(block.Bytes), sha256.Sum256(block.Bytes), block.Type)) {
			if !strings.Contains(text, want) {
				t.Errorf("it does not show %q:\n%s", want, text)
			}
		}
		if strings.Contains(text, "\nextension ") {
			t.Errorf("an extension is shown in hex alone:\n%s", text)
		}
	}
}

// TestBeforeItsKeyIsMadeEverythingOfARootIsShownButWhatFollowsFromTheKey compares the outline with what is then signed.
func TestBeforeItsKeyIsMadeEverythingOfARootIsShownButWhatFollowsFromTheKey(t *testing.T) {
	for _, kind := range []ca.KeySpec{ca.P256, ca.P384, ca.RSA2048} {
		folder := t.TempDir()
		plan, err := load(t, folder, strings.Replace(rootPlan, `mesh"}`, `mesh", create: `+string(kind)+`}`, 1))
		if err != nil {
			t.Fatal(err)
		}
		unmade, err := plan.Prepare(nil, now)
		if err != nil {
			t.Fatal(err)
		}
		text := unmade.Describe()
		_, outline, _ := strings.Cut(text, "TBSCertificate:\n")
		outline = strings.ReplaceAll(outline, "\n", "")
		key, err := ca.GenerateKey(kind)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unmade.Sign(key); err == nil {
			t.Error("what was prepared without the key is signed")
		}
		made, err := plan.Prepare(key.Public(), now)
		if err != nil {
			t.Fatal(err)
		}
		signed := hex.EncodeToString(made.TBS)
		if len(outline) != len(signed) {
			t.Fatalf("%s: %d octets are shown, and %d signed:\n%s", kind, len(outline)/2, len(signed)/2, text)
		}
		hidden := ""
		for i := 0; i < len(signed); i += 2 {
			switch octet := signed[i : i+2]; outline[i : i+2] {
			case "..":
				hidden += octet
			case octet:
			default:
				t.Fatalf("%s: octet %d is shown as %s, and %s is signed:\n%s", kind, i/2, outline[i:i+2], octet, text)
			}
		}
		id := hex.EncodeToString(made.rehearsed.cert.SubjectKeyId)
		if want := hex.EncodeToString(publicOctets(made.rehearsed.cert)) + id + id; len(hidden) != len(want) || !strings.Contains(hidden, id) {
			t.Errorf("%s: open is %s, and not the public key and its identifier, twice", kind, hidden)
		}
		for _, want := range []string{string(kind) + ", to be made on the token; .. is open until then", "subjectKeyIdentifier    ..", "authorityKeyIdentifier  ..", "octets, SHA-256 .., "} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: it does not show %q:\n%s", kind, want, text)
			}
		}
	}
}

func TestWhatAPlanSaysDoesNotMoveTheCursorOfWhoReviewsIt(t *testing.T) {
	plan, err := load(t, t.TempDir(), strings.Replace(rootPlan, "the mesh's first root", `"harmless\x1b[2K\nsubject  CN=Other"`, 1))
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := plan.Prepare(newKey(t, elliptic.P256()).Public(), now)
	if err != nil {
		t.Fatal(err)
	}
	if text := prepared.Describe(); strings.Contains(text, "\x1b") || strings.Contains(text, "\nsubject  CN") {
		t.Errorf("%q", text)
	}
}

// lyingKey signs something else than it is asked to.
type lyingKey struct{ crypto.Signer }

func (k lyingKey) Sign(random io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	other := bytes.Clone(digest)
	other[0] ^= 1
	return k.Signer.Sign(random, other, o)
}

func TestASignatureThatIsNotGoodIsNotGivenAway(t *testing.T) {
	key, folder := newKey(t, elliptic.P256()), t.TempDir()
	plan, err := load(t, folder, rootPlan)
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := plan.Prepare(key.Public(), now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := prepared.Sign(lyingKey{key}); err == nil {
		t.Error("a bad signature of a certificate is taken")
	}
	if _, err := prepared.Sign(newKey(t, elliptic.P256())); err == nil {
		t.Error("another key signs")
	}
	perform(t, folder, rootPlan, key)
	if plan, err = load(t, folder, crlPlan); err != nil {
		t.Fatal(err)
	}
	if prepared, err = plan.Prepare(key.Public(), now); err != nil {
		t.Fatal(err)
	}
	if _, err := prepared.Sign(lyingKey{key}); err == nil {
		t.Error("a bad signature of a CRL is taken")
	}
}

func TestBadPlansAreRefusedBeforeAnythingIsSigned(t *testing.T) {
	key, folder := newKey(t, elliptic.P256()), t.TempDir()
	perform(t, folder, rootPlan, key)
	csr(t, folder, newKey(t, elliptic.P256()))
	change := func(plan, old, new string) string {
		if !strings.Contains(plan, old) {
			t.Fatalf("%q is not in the plan", old)
		}
		return strings.Replace(plan, old, new, 1)
	}
	for reason, plan := range map[string]string{
		"make is":                              change(rootPlan, "make: root", "make: leaf"),
		"field sbject not found":               change(rootPlan, "subject:", "sbject:"),
		"second document":                      rootPlan + "---\nmake: crl\n",
		"operators is missing":                 change(rootPlan, "[Alice, Bob]", "[]"),
		"purpose is missing":                   change(rootPlan, "the mesh's first root", ""),
		"csr is given":                         rootPlan + "csr: x.csr\n",
		"out.record are the same file":         change(rootPlan, "record: root.json", "record: root.pem"),
		"is short":                             change(rootPlan, "4f00112233445566778899aabbccddee", `"0a"`),
		"not a positive number":                change(rootPlan, "4f00112233445566778899aabbccddee", "ff00112233445566778899aabbccddee0011223344"),
		"is not after notBefore":               change(rootPlan, "2047", "2026"),
		"is not a time":                        change(rootPlan, "2047-01-31T00:00:00Z", "soon"),
		"trustDomain:":                         change(rootPlan, "trustDomain: example.org", "trustDomain: a/b"),
		"pathLength is for":                    rootPlan + "pathLength: -1\n",
		"is not within the issuer's":           change(intermediatePlan, "2028", "2048"),
		"is not less than the issuer's":        intermediatePlan + "pathLength: 1\n",
		"the issuer's own":                     change(intermediatePlan, "{commonName: Mesh Issuing 1}", "{commonName: Mesh Root, organization: Example Bank, country: DE}"),
		"does not begin with a PEM block CERT": change(intermediatePlan, "csr: x.csr", "csr: root.pem"),
		"crl.number":                           change(crlPlan, `"7"`, `"x"`),
		"reason 7 is none that RFC 5280":       change(crlPlan, "reason: 1", "reason: 7"),
		"is after thisUpdate":                  change(crlPlan, "at: 2027-01-30", "at: 2027-02-01"),
		"key.create is given":                  change(crlPlan, `object=mesh"`, `object=mesh", create: P-256`),
		"key.timeout 30ns is less than a":      change(rootPlan, `object=mesh"`, `object=mesh", timeout: 30`),
		"cannot unmarshal":                     change(rootPlan, `object=mesh"`, `object=mesh", timeout: soon`),
		"field pin not found":                  change(rootPlan, `object=mesh"`, `object=mesh", pin: "1"`),
		"are the same file":                    change(rootPlan, "record: root.json", "record: ./x/../root.pem"),
		"reason 8 is none that RFC 5280":       change(crlPlan, "reason: 1", "reason: 8"),
		"lint":                                 change(rootPlan, "commonName: Mesh Root", "commonName: "+strings.Repeat("long", 17)),
	} {
		p, err := load(t, folder, plan)
		if err == nil {
			_, err = p.Prepare(key.Public(), now)
		}
		if err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("want %q, got: %v", reason, err)
		}
	}
	p, err := load(t, folder, intermediatePlan)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Prepare(newKey(t, elliptic.P256()).Public(), now); err == nil || !strings.Contains(err.Error(), "the key on the token is not that of issuer") {
		t.Errorf("another key: %v", err)
	}
}

func TestACRLGoesOnFromTheOneBefore(t *testing.T) {
	key, folder := newKey(t, elliptic.P256()), t.TempDir()
	perform(t, folder, rootPlan, key)
	perform(t, folder, crlPlan, key)
	if err := os.Rename(filepath.Join(folder, "crl.pem"), filepath.Join(folder, "before.pem")); err != nil {
		t.Fatal(err)
	}
	for reason, next := range map[string]string{
		"":                        `number: "8", before: before.pem, revoked: [{serial: "0a0b", at: 2027-01-30T00:00:00Z}]`,
		"is not greater":          `number: "7", before: before.pem, revoked: [{serial: "0a0b", at: 2027-01-30T00:00:00Z}]`,
		"is not taken back":       `number: "8", before: before.pem`,
		"reading crl.before":      `number: "8", before: nowhere.pem`,
		"does not begin with a P": `number: "8", before: root.pem`,
	} {
		p, err := load(t, folder, crlPlan[:strings.Index(crlPlan, "crl:\n")]+"crl: {thisUpdate: 2027-01-31T00:00:00Z, nextUpdate: 2027-04-30T00:00:00Z, "+next+"}\nout: {file: a, record: b}\n")
		if err == nil {
			_, err = p.Prepare(key.Public(), now)
		}
		if (reason == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), reason) {
			t.Errorf("want %q, got: %v", reason, err)
		}
	}
}

func TestACRLIsLintedBeforeItIsSignedAndAfterIt(t *testing.T) {
	key, folder := newKey(t, elliptic.P256()), t.TempDir()
	perform(t, folder, rootPlan, key)
	plan, err := load(t, folder, crlPlan)
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := plan.Prepare(key.Public(), now)
	if err != nil {
		t.Fatal(err)
	}
	// What no plan can say: it is refused before.
	prepared.list.RevokedCertificateEntries[0].RevocationTime = prepared.list.ThisUpdate.Add(time.Second)
	const lint = "is not as RFC 5280 has it: lint: e_crl_revocation_time_after_this_update"
	if err := prepared.rehearse(); err == nil || !strings.Contains(err.Error(), "what would be signed "+lint) {
		t.Errorf("before: %v", err)
	}
	if _, err := prepared.Sign(key); err == nil || !strings.Contains(err.Error(), "nothing is written: the CRL "+lint) {
		t.Errorf("after: %v", err)
	}
}

func TestTheRecordHasWhatAnAuditorNeeds(t *testing.T) {
	key := newKey(t, elliptic.P256())
	prepared, signed := perform(t, t.TempDir(), rootPlan, key)
	text, err := prepared.Record(&Record{User: "somebody"}, signed)
	if err != nil {
		t.Fatal(err)
	}
	var read Record
	if err := json.Unmarshal(text, &read); err != nil {
		t.Fatal(err)
	}
	if read.Plan != rootPlan || read.PlanSHA256 != sum([]byte(rootPlan)) || read.TBSSHA256 != sum(prepared.TBS) || read.SHA256 != sum(signed.DER) || read.Outcome != string(signed.PEM) ||
		len(read.Operators) != 2 || read.User != "somebody" {
		t.Errorf("the record is %s", text)
	}
}

func TestTemplatesAreGoodPlansOnceTheyAreFilledIn(t *testing.T) {
	key, folder := newKey(t, elliptic.P384()), t.TempDir()
	csr(t, folder, newKey(t, elliptic.P256()))
	if err := os.Rename(filepath.Join(folder, "x.csr"), filepath.Join(folder, "intermediate.csr")); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{MakeRoot, MakeIntermediate, MakeCRL} {
		text, err := Template(kind, now)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := load(t, folder, text); err == nil || !strings.Contains(err.Error(), "purpose is missing") {
			t.Errorf("an empty %s plan: %v", kind, err)
		}
		text = strings.NewReplacer(`purpose: ""`, "purpose: p", "operators: []", "operators: [a]", `commonName: ""`, "commonName: "+kind).Replace(text)
		perform(t, folder, text, key)
	}
	if _, err := Template("leaf", now); err == nil {
		t.Error("there is a template for something else")
	}
}
