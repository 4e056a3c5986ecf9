package agent

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"kedge/issuer/istio"
)

// proof is what an admin has given the workload to prove itself by: a token in a file, or a client certificate in a folder. Both are read again for every call, since
// others replace them.
type proof struct {
	tokenFile   string
	certificate string // a folder with the files of an SVID
}

// shown is what a call shows the CA.
type shown struct {
	token       string
	certificate *tls.Certificate
	sum         string // SHA-256 of what was given, in hex; "": only what the agent has itself is shown
}

// place is where what was given stands.
func (p proof) place() string {
	kind, path := "the token in ", p.tokenFile
	if path == "" {
		kind, path = "the client certificate in ", p.certificate
	}
	if absolute, err := filepath.Abs(path); err == nil { // else the working folder is gone
		path = absolute
	}
	return kind + path
}

// advice is what to do when the CA does not know who is asking.
func (p proof) advice() string {
	if p.tokenFile == "" {
		return fmt.Sprintf("The client certificate in %s may have expired: put a good one there, as 'kedge svid fetch' does", p.certificate)
	}
	return fmt.Sprintf("A join token serves once and for a short time: put a new one of 'kedge token create' into %s, which is read again by itself", p.tokenFile)
}

func (p proof) read() (shown, error) {
	if p.tokenFile != "" {
		if info, err := os.Stat(p.tokenFile); err == nil && !info.Mode().IsRegular() {
			return shown{}, fmt.Errorf("reading the token: %s is no file, and would be waited for", p.tokenFile)
		}
		token, err := istio.ReadTokenFile(p.tokenFile)
		if err != nil {
			return shown{}, fmt.Errorf("reading the token: %w", err)
		}
		return shown{token: token, sum: sum([]byte(token))}, nil
	}
	certificate, err := istio.ReadClientCertificate(p.certificate)
	if err != nil {
		return shown{}, fmt.Errorf("reading the client certificate: %w", err)
	}
	return shown{certificate: certificate, sum: sum(bytes.Join(certificate.Certificate, nil))}, nil
}

func sum(text []byte) string {
	digest := sha256.Sum256(text)
	return hex.EncodeToString(digest[:])
}
