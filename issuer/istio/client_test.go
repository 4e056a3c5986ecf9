package istio

import (
	"crypto/x509"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc/status"
)

func TestWhyThereIsNoConnectionIsSaidPlainly(t *testing.T) {
	for message, want := range map[string]string{
		`connection error: desc = "transport: Error while dialing: dial tcp 192.0.2.1:15012: i/o timeout"`:                             `dial tcp 192.0.2.1:15012: i/o timeout`,
		`last connection error: connection error: desc = "transport: authentication handshake failed: tls: first record \"x\"" (more)`: `the TLS handshake failed: tls: first record "x"`,
		`name resolver error: produced zero addresses`:                                                                                 `the name has no address in the DNS`,
		`connection error: desc = "error reading server preface: EOF"`:                                                                 `error reading server preface: EOF`,
		`connection error: desc = cut`: `connection error: desc = cut`,
		`the CA's own words`:           `the CA's own words`,
		``:                             ``,
	} {
		if got := plain(message); got != want {
			t.Errorf("%s: it says %s, not %s", message, got, want)
		}
	}
}

// TestGRPCWrapsNothingThatPlainDoesNotKnow asks a port where nobody is, and one where somebody hangs up.
func TestGRPCWrapsNothingThatPlainDoesNotKnow(t *testing.T) {
	rude, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := rude.Accept()
			if err != nil {
				return // it is closed
			}
			_ = conn.Close() // the client notices
		}
	}()
	defer func() {
		_ = rude.Close() // ends the loop
		<-ended
	}()
	for address, want := range map[string]string{"127.0.0.1:1": "dial tcp 127.0.0.1:1: ", rude.Addr().String(): "the TLS handshake failed: "} {
		client, err := Dial(address, x509.NewCertPool(), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		_, err = client.Sign(t.Context(), nil, "", 0)
		if said := status.Convert(err).Message(); !strings.HasPrefix(said, want) || !Retryable(err) {
			t.Errorf("%s: it says %s", address, said)
		}
	}
}
