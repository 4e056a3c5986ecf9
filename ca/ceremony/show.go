package ceremony

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"strings"
	"time"
	"unicode"

	"kedge/ca"
)

// open stands for an octet that is not known before the key is made.
const open = ".."

// Describe says exactly what will be signed: for people, and to the octet. It reads what was made from the plan, not the plan.
func (r *Prepared) Describe() string {
	var text strings.Builder
	line := func(name, format string, args ...any) {
		// A plan, a CSR's file name or an issuer is not to move the terminal's cursor.
		printable := strings.Map(func(c rune) rune {
			if !unicode.IsPrint(c) {
				return unicode.ReplacementChar
			}
			return c
		}, fmt.Sprintf(format, args...))
		fmt.Fprintf(&text, "%-22s  %s\n", name, printable)
	}
	line("make", "%s: %s", r.Plan.Make, r.Plan.Purpose)
	line("operators", "%s", strings.Join(r.Plan.Operators, ", "))
	line("plan", "SHA-256 %s", sum(r.Plan.text))
	for _, input := range r.Inputs {
		line(input.Key+" file", "%s, SHA-256 %s", input.File, input.SHA256)
	}
	if r.Plan.Key.AllowExportable {
		line("key", "may be one that can be exported, or was not made on the token")
	}
	if r.Open {
		line("key", "%s, to be made on the token; %s is open until then", r.Plan.Key.Create, open)
	}
	kind := "TBSCertificate"
	if list := r.rehearsed.list; list != nil {
		kind = "TBSCertList"
		line("signature", "%s", list.SignatureAlgorithm)
		line("issuer", "%s", list.Issuer)
		line("this update", "%s", list.ThisUpdate.Format(time.RFC3339))
		line("next update", "%s", list.NextUpdate.Format(time.RFC3339))
		for _, entry := range list.RevokedCertificateEntries {
			line("revoked", "%x at %s, reason %d", entry.SerialNumber.Bytes(), entry.RevocationTime.Format(time.RFC3339), entry.ReasonCode)
		}
		r.extensions(line, list.Extensions)
	} else {
		cert := r.rehearsed.cert
		line("serial", "%x", cert.SerialNumber.Bytes())
		line("signature", "%s", cert.SignatureAlgorithm)
		line("issuer", "%s", cert.Issuer)
		line("not before", "%s", cert.NotBefore.Format(time.RFC3339))
		line("not after", "%s", cert.NotAfter.Format(time.RFC3339))
		line("subject", "%s", cert.Subject)
		line("public key", "%s, SHA-256 %s", ca.KeyType(cert.PublicKey), r.unlessOpen(sum(cert.RawSubjectPublicKeyInfo)))
		r.extensions(line, cert.Extensions)
	}
	if r.Open {
		line("to be signed", "%d octets, SHA-256 %s, %s:", len(r.TBS), open, kind)
		text.WriteString(r.outline())
		return text.String()
	}
	line("to be signed", "%d octets, SHA-256 %x, %s:", len(r.TBS), r.Digest(), kind)
	text.Write(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: r.TBS}))
	return text.String()
}

// extensions shows every one (RFC 5280 4.2, 5.2), and what is not known here in hex.
func (r *Prepared) extensions(line func(name, format string, args ...any), all []pkix.Extension) {
	cert, list := r.rehearsed.cert, r.rehearsed.list
	for _, extension := range all {
		critical := ""
		if extension.Critical {
			critical = "critical, "
		}
		switch id := extension.Id.String(); {
		case id == "2.5.29.14" && cert != nil:
			line("subjectKeyIdentifier", "%s%s", critical, r.unlessOpen(hex.EncodeToString(cert.SubjectKeyId)))
		case id == "2.5.29.15" && cert != nil:
			line("keyUsage", "%s%s", critical, usages(cert.KeyUsage))
		case id == "2.5.29.17" && cert != nil:
			for _, uri := range cert.URIs {
				line("subjectAltName", "%sURI %s", critical, uri)
			}
		case id == "2.5.29.19" && cert != nil:
			line("basicConstraints", "%scA %t, path length %d", critical, cert.IsCA, cert.MaxPathLen)
		case id == "2.5.29.20" && list != nil:
			line("cRLNumber", "%s%s", critical, list.Number)
		case id == "2.5.29.35" && cert != nil:
			line("authorityKeyIdentifier", "%s%s", critical, r.unlessOpen(hex.EncodeToString(cert.AuthorityKeyId)))
		case id == "2.5.29.35":
			line("authorityKeyIdentifier", "%s%x", critical, list.AuthorityKeyId)
		default:
			line("extension "+id, "%s%x", critical, extension.Value)
		}
	}
}

// usages names the bits of RFC 5280 4.2.1.3.
func usages(set x509.KeyUsage) string {
	var names []string
	for bit, name := range []string{"digitalSignature", "nonRepudiation", "keyEncipherment", "dataEncipherment", "keyAgreement", "keyCertSign", "cRLSign", "encipherOnly", "decipherOnly"} {
		if set&(1<<bit) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}

func (r *Prepared) unlessOpen(text string) string {
	if r.Open {
		return open
	}
	return text
}

// outline is what will be signed in hex, with each octet open that follows from the key that is still to be made: its public half, and the identifier of that (RFC 5280 4.2.1.2), which stands there
// twice. Their places and lengths do not depend on the key.
func (r *Prepared) outline() string {
	octets := make([]string, len(r.TBS))
	for i, octet := range r.TBS {
		octets[i] = fmt.Sprintf("%02x", octet)
	}
	for _, part := range [][]byte{publicOctets(r.rehearsed.cert), r.rehearsed.cert.SubjectKeyId} {
		for at := 0; ; at += len(part) {
			next := bytes.Index(r.TBS[at:], part)
			if next < 0 {
				break
			}
			at += next
			for i := range part {
				octets[at+i] = open
			}
		}
	}
	var text strings.Builder
	for ; len(octets) > 0; octets = octets[min(32, len(octets)):] {
		text.WriteString(strings.Join(octets[:min(32, len(octets))], "") + "\n")
	}
	return text.String()
}

// publicOctets are those of subjectPublicKey (RFC 5280 4.1), beside which its algorithm stands.
func publicOctets(cert *x509.Certificate) []byte {
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(cert.RawSubjectPublicKeyInfo, &info); err != nil {
		panic(err) // x509 has parsed it before
	}
	return info.Key.Bytes
}
