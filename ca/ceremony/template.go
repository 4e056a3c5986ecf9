package ceremony

import (
	"crypto/rand"
	"fmt"
	"strings"
	"time"
)

// Template returns a plan to fill in, with comments, a fresh serial number and times around now.
func Template(make string, now time.Time) (string, error) {
	day := now.UTC().Truncate(24 * time.Hour)
	at := func(t time.Time) string { return t.Format(time.RFC3339) }
	head := `# The whole input of a ceremony. Have it reviewed, see with --dry-run exactly what will be signed, and run it:
#   kedge ceremony PLAN.yaml --dry-run
#   kedge ceremony PLAN.yaml
make: ` + make + `
purpose: ""                # required; why, for the record
operators: []              # required; who is there
key:
  # The token and the key that signs (RFC 7512). The PIN is read from its file, and never shown.
  uri: "pkcs11:token=LABEL;object=KEY?module-path=/PATH/MODULE.so&pin-source=file:/PATH/PIN"
  moduleParameters: ""     # what the module is initialised with, for those that want it
  timeout: 30s             # of a call of the module
  allowExportable: false   # true: sign although the token says that the key can be exported, or was not made on it
`
	certificate := `subject: {commonName: "", organization: ""}
trustDomain: ""            # stands as spiffe://NAME in the certificate; "": none
serial: "` + freshSerial() + `"   # random, made with this file
`
	switch make {
	case MakeRoot:
		return head + `  create: P-384            # P-256, P-384, RSA-2048, RSA-3072 or RSA-4096; "" when the key is on the token already
` + certificate + `notBefore: ` + at(day) + `
notAfter: ` + at(day.AddDate(20, 0, 0)) + `
pathLength: 1              # one issuing CA under it
out: {file: root.pem, record: root-ceremony.json}
`, nil
	case MakeIntermediate:
		return head + `issuer: root.pem           # the certificate of the key that signs
csr: intermediate.csr      # only its public key is taken
` + certificate + `notBefore: ` + at(day) + `
notAfter: ` + at(day.AddDate(1, 0, 0)) + `
pathLength: 0              # it signs leaves only; 1 when Kedge makes its own issuing CA under it
out: {file: intermediate.pem, record: intermediate-ceremony.json}
`, nil
	case MakeCRL:
		return head + `issuer: root.pem           # the certificate of the key that signs
crl:
  number: "1"              # greater than that of every CRL before
  thisUpdate: ` + at(now.UTC().Truncate(time.Second)) + `
  nextUpdate: ` + at(day.AddDate(0, 3, 0)) + `
  before: ""               # the CRL before this one; "": there is none
  revoked: []              # - {serial: "0a1b…", at: ` + at(day) + `, reason: 1}
out: {file: crl.pem, record: crl-ceremony.json}
`, nil
	}
	return "", fmt.Errorf("a ceremony makes %s, and not %q", strings.Join([]string{MakeRoot, MakeIntermediate, MakeCRL}, ", "), make)
}

// freshSerial is positive and random, of 16 octets.
func freshSerial() string {
	octets := make([]byte, 16)
	rand.Read(octets) // never fails
	octets[0] = octets[0]&0x7f | 0x40
	return fmt.Sprintf("%x", octets)
}
