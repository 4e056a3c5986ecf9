package crash

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/test/process"
)

// shortLives are lifetimes of seconds that fit together, so that renewals happen while a test watches.
const shortLives = `
csr: {listen: "127.0.0.1:0", serverCertificateTTL: 5s}
operations: {listen: "127.0.0.1:0"}
issuingCA: {lifetime: 15s}
profiles: {default: {defaultTTL: 5s, maxTTL: 5s, minTTL: 1s, backdate: 0s}}
`

// served is the certificate that the CSR API shows in a new handshake, verified.
func served(k *process.Kedge, address string, roots *x509.CertPool) (*x509.Certificate, error) {
	conn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12})
	if err != nil {
		return nil, err
	}
	return conn.ConnectionState().PeerCertificates[0], conn.Close()
}

// TestRenewalsGoUnnoticed: the serving certificate and the issuing CA are renewed while the same process goes on, and whatever a client gets
// meanwhile verifies for as long as it lives.
func TestRenewalsGoUnnoticed(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	process.Write(t, k.Config, shortLives+cluster.Configuration(t, k.Dir))
	k.Start(t)
	address, roots := k.Status(t).CSRAddress, x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(process.Read(t, filepath.Join(k.Data, "root-cert.pem")))) {
		t.Fatal("no root")
	}
	caller, key, token := k.Dial(t, nil), process.NewKey(t), cluster.Token(t, "default", "web")
	serving, issuing := map[string]bool{}, map[string]bool{}
	var leaves []*x509.Certificate
	process.Eventually(t, "two renewals of the serving certificate and one of the issuing CA", func() error {
		shown, err := served(k, address, roots)
		if err != nil {
			return fmt.Errorf("handshake: %w", err) // a busy machine may let a certificate of seconds expire on the way
		}
		serving[shown.SerialNumber.String()] = true
		issued, err := caller.Issue(t.Context(), key.CSR, token, 0)
		if status.Code(err) == codes.Unavailable {
			return err
		}
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, issued.Leaf)
		issuing[issued.Chain[0].SerialNumber.String()] = true
		issued.Roots = roots // of before the renewals
		for _, moment := range []time.Time{issued.Leaf.NotBefore, issued.Leaf.NotAfter} {
			if err := issued.VerifyAt(moment); err != nil {
				t.Fatalf("a certificate does not verify at %s: %v", moment, err)
			}
		}
		if issued.Leaf.NotAfter.After(issued.Chain[0].NotAfter) {
			t.Fatal("a certificate outlives its issuer")
		}
		if len(serving) < 3 || len(issuing) < 2 {
			return fmt.Errorf("%d serving certificates and %d issuing CAs were seen", len(serving), len(issuing))
		}
		return nil
	})
	if out := k.Must(t, "authority", "list"); !regexp.MustCompile(`issuing +retired`).MatchString(out) || !regexp.MustCompile(`issuing +active`).MatchString(out) {
		t.Errorf("authority list:\n%s", out)
	}
	k.CheckLedger(t, leaves)
}

// TestARenewalThatFailsIsAProblemAndEnds: the old issuing CA goes on, the reason is told, and it is tried again by itself.
func TestARenewalThatFailsIsAProblemAndEnds(t *testing.T) {
	t.Parallel()
	cluster := process.NewCluster(t)
	k := process.New(t, "")
	process.Write(t, k.Config, shortLives+cluster.Configuration(t, k.Dir))
	k.Start(t)
	url := k.Status(t).OpsAddress
	key := filepath.Join(k.Data, "root", "root-key.pem")
	if err := os.Rename(key, key+".away"); err != nil {
		t.Fatal(err)
	}
	readyz := func() (int, string, error) {
		client := &http.Client{Timeout: process.Patience}
		response, err := client.Get("http://" + url + "/readyz")
		if err != nil {
			return 0, "", err
		}
		defer response.Body.Close()
		var body bytes.Buffer
		_, err = body.ReadFrom(response.Body)
		return response.StatusCode, body.String(), err
	}
	problem := regexp.MustCompile(`(?m)^problem: issuing CA: .*has lost its key, restore it from a backup`)
	process.Eventually(t, "the problem", func() error {
		code, body, err := readyz()
		if err == nil && !problem.MatchString(body) {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
	if err := os.Rename(key+".away", key); err != nil {
		t.Fatal(err)
	}
	process.Eventually(t, "its end", func() error {
		code, body, err := readyz()
		if err == nil && (code != http.StatusOK || problem.MatchString(body)) {
			err = errors.New(body)
		}
		return err
	})
	process.Eventually(t, "a certificate of the new issuing CA", func() error {
		_, err := k.Dial(t, nil).Issue(t.Context(), process.NewKey(t).CSR, cluster.Token(t, "default", "web"), 0)
		return err
	})
	if log := k.Log(); !regexp.MustCompile(`"msg":"works again","about":"issuing CA"`).MatchString(log) {
		t.Errorf("the log does not say that it works again:\n%s", log)
	}
}
