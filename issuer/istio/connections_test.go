package istio_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	pb "istio.io/api/security/v1alpha1"

	"kedge/ca/ledger"
)

// wire is a listener in memory, so that connections to a door can live in a bubble of testing/synctest, in which hours take no time.
type wire struct {
	*bufconn.Listener
	accepted atomic.Int64
}

func (w *wire) Accept() (net.Conn, error) {
	conn, err := w.Listener.Accept()
	if err == nil {
		w.accepted.Add(1)
	}
	return conn, err
}

// inBubble opens a door in a bubble.
func inBubble(t *testing.T, o doorOptions, test func(t *testing.T, d *door, w *wire)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &wire{Listener: bufconn.Listen(64 << 10)}
		o.listener = w
		test(t, openDoorWith(t, o), w)
	})
}

// dial makes a client that pings as often as gRPC lets one: every ten seconds, also without a call. It never closes an idle connection.
func (w *wire) dial(t *testing.T, d *door) *grpc.ClientConn { return w.dialWith(t, d, nil) }

func (w *wire) dialWith(t *testing.T, d *door, certificate *tls.Certificate) *grpc.ClientConn {
	t.Helper()
	config := d.tls()
	if certificate != nil {
		config.Certificates = []tls.Certificate{*certificate}
	}
	conn, err := grpc.NewClient("passthrough:///door", grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithIdleTimeout(0),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.DialContext(ctx) }),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 20 * time.Second, PermitWithoutStream: true}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// flight is a call that has begun, and whose request is still to come. Its caller waits for an hour.
type flight struct{ stream grpc.ClientStream }

func takeOff(t *testing.T, d *door, conn *grpc.ClientConn) flight {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	t.Cleanup(cancel)
	stream, err := conn.NewStream(bearer(ctx, d.token(t)), &grpc.StreamDesc{}, pb.IstioCertificateService_CreateCertificate_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	return flight{stream}
}

// land sends the request, and waits for the answer.
func (f flight) land(t *testing.T) error {
	t.Helper()
	if err := f.stream.SendMsg(&pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil)}); err != nil {
		t.Error(err)
	}
	return f.wait()
}

func (f flight) wait() error { return f.stream.RecvMsg(&pb.IstioCertificateResponse{}) }

func call(t *testing.T, d *door, conn *grpc.ClientConn) {
	t.Helper()
	request := &pb.IstioCertificateRequest{Csr: csrFor(t, newKey(t), nil)}
	if _, err := pb.NewIstioCertificateServiceClient(conn).CreateCertificate(bearer(t.Context(), d.token(t)), request); err != nil {
		t.Error(err)
	}
}

func TestAClientThatPingsMoreOftenThanAllowedIsSentAway(t *testing.T) {
	strict := defaultConnections
	strict.MinPing = 11 * time.Second
	inBubble(t, doorOptions{connections: strict, patience: time.Hour}, func(t *testing.T, d *door, w *wire) {
		conn := w.dial(t, d)
		err := takeOff(t, d, conn).wait()
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), `ENHANCE_YOUR_CALM, debug data: "too_many_pings"`) {
			t.Errorf("a client that pings every ten seconds, where eleven is the least, was told: %v", err)
		}
		call(t, d, conn)
		if got := w.accepted.Load(); got != 2 {
			t.Errorf("%d connections, want the one that was ended and a new one", got)
		}
	})
}

func TestAClientThatPingsAsOftenAsAllowedStays(t *testing.T) {
	lasting := defaultConnections
	lasting.MaxAge = 0 // for ever
	inBubble(t, doorOptions{connections: lasting, patience: 2 * time.Hour}, func(t *testing.T, d *door, w *wire) {
		conn := w.dial(t, d)
		flight := takeOff(t, d, conn)
		<-time.After(50 * time.Minute) // and three hundred pings
		if err := flight.land(t); err != nil {
			t.Error(err)
		}
		<-time.After(50 * time.Minute) // without a call
		call(t, d, conn)
		if got := w.accepted.Load(); got != 1 {
			t.Errorf("%d connections, want 1", got)
		}
	})
}

func TestAConnectionIsAskedToEndAfterItsMaximumAgeAndItsCallsAreAnswered(t *testing.T) {
	inBubble(t, doorOptions{patience: 2 * time.Hour}, func(t *testing.T, d *door, w *wire) {
		conn := w.dial(t, d)
		early, late := takeOff(t, d, conn), takeOff(t, d, conn)
		<-time.After(26 * time.Minute) // gRPC spreads the age over a tenth more or less, so that clients do not come back all at once
		call(t, d, conn)
		if got := w.accepted.Load(); got != 1 {
			t.Errorf("%d connections before the maximum age, want 1", got)
		}
		limited, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
		defer cancel()
		if !conn.WaitForStateChange(limited, connectivity.Ready) {
			t.Fatal("the connection is older than its maximum age, and was not asked to end")
		}
		call(t, d, conn)
		if got := w.accepted.Load(); got != 2 {
			t.Errorf("%d connections after the first was asked to end, want 2", got)
		}
		if err := early.land(t); err != nil {
			t.Errorf("a call that was under way: %v", err)
		}
		if err := late.wait(); status.Code(err) != codes.Unavailable {
			t.Errorf("a call that was under way for longer than the grace: %v", err)
		}
	})
}

// TestAPeerThatSaysNothingIsHungUpOn, however far it came.
func TestAPeerThatSaysNothingIsHungUpOn(t *testing.T) {
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "\x00\x00\x00\x04\x00\x00\x00\x00\x00" // and empty SETTINGS (RFC 9113 3.4)
	for name, test := range map[string]struct {
		begin func(d *door, conn net.Conn) (net.Conn, error)
		limit time.Duration
	}{
		"from the first octet": {func(_ *door, conn net.Conn) (net.Conn, error) { return conn, nil }, 10 * time.Second},
		"in the middle of the handshake": {func(_ *door, conn net.Conn) (net.Conn, error) {
			_, err := conn.Write([]byte("\x16\x03\x01\x02\x00")) // the header of a ClientHello
			return conn, err
		}, 10 * time.Second},
		"after the handshake": {func(d *door, conn net.Conn) (net.Conn, error) {
			secured := tls.Client(conn, d.tls())
			return secured, secured.Handshake()
		}, 10 * time.Second},
		"when it is pinged": {func(d *door, conn net.Conn) (net.Conn, error) {
			secured := tls.Client(conn, d.tls())
			_, err := secured.Write([]byte(preface))
			return secured, err
		}, 80 * time.Second}, // a minute without a word, and twenty seconds without an answer
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, doorOptions{}, func(t *testing.T, d *door, w *wire) {
				conn, err := w.Dial()
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				peer, err := test.begin(d, conn)
				if err != nil {
					t.Fatal(err)
				}
				if err := peer.SetReadDeadline(time.Now().Add(test.limit + time.Second)); err != nil {
					t.Fatal(err)
				}
				for err == nil {
					_, err = peer.Read(make([]byte, 1<<10))
				}
				var late net.Error
				if errors.As(err, &late) && late.Timeout() {
					t.Errorf("after %s the connection is still there", test.limit)
				}
				call(t, d, w.dial(t, d))
			})
		})
	}
}

// TestACallThatTakesTooLongIsUnavailable, since agents repeat nothing else. Here the commit before its own does not come to an end.
func TestACallThatTakesTooLongIsUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var slow atomic.Bool
		begun, goOn := make(chan struct{}), make(chan struct{})
		w := &wire{Listener: bufconn.Listen(64 << 10)}
		d := openDoorWith(t, doorOptions{listener: w, onCommit: func(ledger.Commit) {
			if slow.CompareAndSwap(true, false) {
				close(begun)
				<-goOn
			}
		}})
		conn := w.dial(t, d)
		first := takeOff(t, d, conn)
		answered := make(chan error, 1)
		slow.Store(true)
		go func() { answered <- first.land(t) }()
		<-begun
		if err := takeOff(t, d, conn).land(t); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "temporarily unavailable, try again") {
			t.Errorf("a call that waits behind it: %v", err)
		}
		close(goOn)
		<-answered // what becomes of a call in the commit itself is the ledger's business
		call(t, d, conn)
	})
}
