package istio_test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	pb "istio.io/api/security/v1alpha1"
)

// await waits until the door's log has a line with all of these texts.
func (d *door) await(t *testing.T, texts ...string) {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		next := d.log.next()
		for line := range strings.Lines(d.log.String()) {
			if !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(line, text) }) {
				return
			}
		}
		select {
		case <-next:
		case <-deadline:
			t.Fatalf("the log has no line with %q:\n%s", texts, d.log)
		}
	}
}

// Whoever is refused before the door itself sees the call is in the log all the same, with an address and a reason.
func TestWhoIsRefusedEarlyIsInTheLog(t *testing.T) {
	t.Parallel()
	d := openDoor(t, nil)
	_, err := d.api(t, nil).CreateCertificate(t.Context(), &pb.IstioCertificateRequest{Csr: strings.Repeat("x", 300<<10)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Fatalf("a message of 300 KiB: %v", err)
	}
	d.await(t, `"msg":"a call was refused before its request was read"`, "received message larger than max", `"peer":"127.0.0.1:`)

	if _, err := tls.Dial("tcp", d.address, &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "localhost", MinVersion: tls.VersionTLS12}); err == nil {
		t.Fatal("a client that trusts nobody went on")
	}
	conn, err := net.Dial("tcp", d.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := fmt.Fprint(conn, "GET / HTTP/1.1\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	d.await(t, `"msg":"a TLS handshake failed"`, "first record does not look like a TLS handshake", `"peer":"`+conn.LocalAddr().String()+`"`)

	// A refusal that has a request id is told of once, by the door.
	if _, err := d.api(t, nil).CreateCertificate(t.Context(), &pb.IstioCertificateRequest{}); status.Code(err) != codes.Unauthenticated {
		t.Fatal(err)
	}
	d.await(t, `"msg":"certificate refused"`)
	if n := strings.Count(d.log.String(), "refused before its request was read"); n != 1 {
		t.Errorf("%d calls are said to be refused early, and 1 was:\n%s", n, d.log)
	}
}
