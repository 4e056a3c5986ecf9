package gate

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// port is a gRPC server behind a gate, on loopback. Its only service is health.
type port struct {
	gate    *Gate
	address string
	roots   *x509.CertPool
	log     *log

	mu      sync.Mutex
	counted map[string]int
	steps   []string // of handshakes: "hello", and "proof" after it
}

type log struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{}
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.more <- struct{}{}:
	default:
	}
	return l.text.Write(p)
}

// await waits for a text.
func (l *log) await(t *testing.T, text string) {
	t.Helper()
	for deadline := time.After(time.Minute); ; {
		l.mu.Lock()
		found := strings.Contains(l.text.String(), text)
		l.mu.Unlock()
		if found {
			return
		}
		select {
		case <-l.more:
		case <-deadline:
			t.Fatalf("the log does not say %q:\n%s", text, l.text.String())
		}
	}
}

func (p *port) Refused(reason string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counted[reason]++
}

func (p *port) Handshake(err error) {
	if err != nil {
		p.Refused("handshake")
	}
}

func (p *port) Unread(time.Duration) { p.Refused("unread") }

func (p *port) count(reason string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counted[reason]
}

func newPort(t *testing.T, o Options) *port {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	p := &port{roots: x509.NewCertPool(), log: &log{more: make(chan struct{}, 1)}, counted: map[string]int{}}
	p.roots.AddCert(cert)
	o.Logger, o.Metrics = slog.New(slog.NewJSONHandler(p.log, nil)), p
	p.gate = New(o)
	step := func(name string) error {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.steps = append(p.steps, name)
		return nil
	}
	server := grpc.NewServer(grpc.WaitForHandlers(true), grpc.Creds(p.gate.Credentials(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12, ClientAuth: tls.RequestClientCert,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return nil, step("hello") },
		VerifyConnection:   func(tls.ConnectionState) error { return step("proof") },
		Certificates:       []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}))),
		grpc.StatsHandler(p.gate.Stats()), grpc.ChainUnaryInterceptor(p.gate.UnaryInterceptor), grpc.ChainStreamInterceptor(p.gate.StreamInterceptor))
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.address = l.Addr().String()
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(p.gate.Listener(l)) }()
	t.Cleanup(func() {
		server.Stop()
		<-ended
		if counts := p.gate.Counts(); counts != (Counts{}) {
			t.Errorf("after all was closed: %+v", counts)
		}
		if len(p.gate.peers) != 0 {
			t.Errorf("left behind: %d peers", len(p.gate.peers))
		}
		atRest(t, p.gate.handshakes, runtime.GOMAXPROCS(0))
		atRest(t, p.gate.calls, runtime.GOMAXPROCS(0))
	})
	return p
}

// dial opens a bare TCP connection from an address of the loopback network.
func (p *port) dial(t *testing.T, from string) net.Conn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := dialer.DialContext(t.Context(), "tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// call makes one call over a connection of its own that stays open.
func (p *port) call(t *testing.T, from string) *grpc.ClientConn {
	t.Helper()
	conn := p.client(t, from)
	if _, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Fatalf("a call from %s: %v", from, err)
	}
	return conn
}

func (p *port) client(t *testing.T, from string) *grpc.ClientConn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := grpc.NewClient("passthrough:///"+p.address,
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: p.roots, ServerName: "localhost", MinVersion: tls.VersionTLS12})),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", address)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// clientHello is what a TLS client sends first.
func clientHello(t *testing.T) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	defer ours.Close()
	go func() {
		_ = tls.Client(theirs, &tls.Config{ServerName: "localhost", MinVersion: tls.VersionTLS12}).Handshake()
	}() // ends with the pipe
	header := make([]byte, 5)
	if _, err := io.ReadFull(ours, header); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, int(header[3])<<8|int(header[4]))
	if _, err := io.ReadFull(ours, body); err != nil {
		t.Fatal(err)
	}
	return append(header, body...)
}

// Clients that say nothing, half a hello, or a hello and then nothing, hold no turn: however many they are, others are served.
func TestSlowClientsKeepNobodyWaiting(t *testing.T) {
	t.Parallel()
	p, hello := newPort(t, Options{Connections: 4000}), clientHello(t)
	for i := range 100 * runtime.GOMAXPROCS(0) {
		conn := p.dial(t, "127.0.0.2")
		said := [][]byte{nil, hello[:1], hello[:len(hello)/2], hello}[i%4]
		if _, err := conn.Write(said); err != nil {
			t.Fatal(err)
		}
		if len(said) == len(hello) { // it is under way for certain once the server has answered
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	p.call(t, "127.0.0.1")
	p.call(t, "127.0.0.2") // not even their own neighbours
}

// slowTongue is a client's connection on which the second word waits.
type slowTongue struct {
	net.Conn
	words atomic.Int64
	about chan struct{} // closed when it is about to be said
	speak chan struct{}
}

func (c *slowTongue) Write(word []byte) (int, error) {
	if c.words.Add(1) == 2 {
		close(c.about)
		<-c.speak
	}
	return c.Conn.Write(word)
}

// A handshake that has begun is finished before others begin: its client has waited once already, and does not wait for a second time behind the crowd.
func TestAHandshakeThatHasBegunGoesOnFirst(t *testing.T) {
	t.Parallel()
	p, hello := newPort(t, Options{}), clientHello(t)
	take := func() {
		if _, err := p.gate.handshakes.take(t.Context(), peerOf(nil)); err != nil {
			t.Fatal(err)
		}
	}
	give := func() {
		p.gate.handshakes.give(turn{}, false)
		p.gate.handshakes.leave()
	}
	waiting := func(n int) {
		for p.gate.handshakes.length() != n {
			runtime.Gosched()
		}
	}
	for range runtime.GOMAXPROCS(0) {
		take()
	}
	first := &slowTongue{Conn: p.dial(t, "127.0.0.1"), about: make(chan struct{}), speak: make(chan struct{})}
	shaken := make(chan error, 1)
	go func() {
		shaken <- tls.Client(first, &tls.Config{RootCAs: p.roots, ServerName: "localhost", MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}).HandshakeContext(t.Context())
	}()
	waiting(1)
	give()
	<-first.about
	take() // once the server waits for the client
	const crowd = 10
	for i := range crowd {
		if _, err := p.dial(t, fmt.Sprintf("127.0.1.%d", 1+i)).Write(hello); err != nil {
			t.Fatal(err)
		}
		waiting(1 + i)
	}
	close(first.speak)
	if err := <-shaken; err != nil {
		t.Fatal(err)
	}
	waiting(crowd + 1)
	give() // of one after the other
	waiting(0)
	for range runtime.GOMAXPROCS(0) - 1 {
		give()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.steps) < 2 || p.steps[0] != "hello" || p.steps[1] != "proof" {
		t.Errorf("the server went on in the order %v", p.steps)
	}
}

// Whoever is too slow is disconnected, and the log says so.
func TestAHandshakeThatTakesTooLongIsEnded(t *testing.T) {
	t.Parallel()
	p, hello := newPort(t, Options{Patience: 50 * time.Millisecond}), clientHello(t)
	for name, said := range map[string][]byte{"nothing": nil, "half": hello[:len(hello)/2], "a hello": hello} {
		conn := p.dial(t, "127.0.0.1")
		if _, err := conn.Write(said); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s: %v", name, err)
		}
	}
	p.log.await(t, "waiting for the client's first octet: ")
	p.log.await(t, `"msg":"a TLS handshake failed"`)
	if p.count("handshake") == 0 {
		t.Error("nothing was counted")
	}
}

// A client may send a certificate chain, but not without end.
func TestAHandshakeIsLimitedInSize(t *testing.T) {
	t.Parallel()
	p := newPort(t, Options{})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{strings.Repeat("a", 60) + ".example"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	shake := func(links int) error {
		certificate := tls.Certificate{PrivateKey: key}
		for range links {
			certificate.Certificate = append(certificate.Certificate, der)
		}
		conn, err := tls.Dial("tcp", p.address, &tls.Config{RootCAs: p.roots, ServerName: "localhost", MinVersion: tls.VersionTLS12,
			NextProtos: []string{"h2"}, Certificates: []tls.Certificate{certificate}})
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = io.ReadFull(conn, make([]byte, 9)) // HTTP/2's settings, or what became of the handshake
		return err
	}
	if err := shake(10); err != nil {
		t.Errorf("a chain of ten: %v", err)
	}
	if err := shake(2 * maxHandshake / len(der)); err == nil {
		t.Error("an endless chain was taken")
	}
	p.log.await(t, fmt.Sprintf("the client sent more than %d octets in its handshake", maxHandshake))
}

// When there are as many connections as there may be, new ones take the places of idle ones; none is refused.
func TestIdleConnectionsMakeRoomForNewOnes(t *testing.T) {
	t.Parallel()
	const most = 40
	p := newPort(t, Options{Connections: most})
	for i := range 3 * most {
		p.call(t, fmt.Sprintf("127.0.1.%d", 1+i%50))
		if open := p.gate.Counts().Connections; open > most {
			t.Fatalf("%d connections", open)
		}
	}
	if p.count(ClosedIdle) == 0 || p.count(RefusedConnection) != 0 {
		t.Errorf("%d idle ones were closed, %d new ones refused", p.count(ClosedIdle), p.count(RefusedConnection))
	}
}

// A connection over which something goes on is never closed for another.
func TestWhoWasServedMakesRoomBeforeWhoWasNot(t *testing.T) {
	for who, options := range map[string]Options{"all": {Connections: 20}, "one peer": {Connections: 2 * fairShare}} {
		t.Run(who, func(t *testing.T) {
			g := New(options)
			var all []*conn
			for i := range 20 {
				peer := "192.0.2.1"
				if who == "all" {
					peer = fmt.Sprintf("192.0.2.%d", 10+i)
				} else if i == fairShare {
					break
				}
				c := &conn{gate: g, key: peerNamed(peer)}
				victim, admitted, err := g.place(c)
				if victim != nil || !admitted || err != nil {
					t.Fatalf("connection %d: %v, %t, %v", i, victim, admitted, err)
				}
				g.ready(c)
				all = append(all, c)
			}
			for _, kind := range []bool{true, false} { // work or not: it was served
				served := all[len(all)/2]
				if !kind {
					served = all[len(all)/2+1]
				}
				c := &call{conn: served, work: kind}
				g.arrives(c)
				g.ends(c, codes.OK)
				victim, admitted, err := g.place(&conn{gate: g, key: all[0].key})
				if victim != served || !admitted || err != nil {
					t.Fatalf("a newcomer takes the place of %v, %t, %v; want that of the one that was served", victim, admitted, err)
				}
				g.leave(victim)
			}
			victim, admitted, err := g.place(&conn{gate: g, key: all[0].key})
			if victim != all[0] || !admitted || err != nil {
				t.Errorf("when nobody was served a newcomer takes the place of %v, %t, %v; want that of the first", victim, admitted, err)
			}
		})
	}
}

// Handshakes wait in the kernel when those of very many peers wait already, and one peer's alone are not very many.
func TestACrowdWaitsInTheKernel(t *testing.T) {
	t.Parallel()
	p, hello := newPort(t, Options{}), clientHello(t)
	p.gate.mu.Lock()
	p.gate.shaking = 2
	p.gate.mu.Unlock()
	for range runtime.GOMAXPROCS(0) {
		if _, err := p.gate.handshakes.take(t.Context(), peerOf(nil)); err != nil {
			t.Fatal(err)
		}
	}
	greet := func(from string) net.Conn {
		conn, before := p.dial(t, from), p.gate.handshakes.length()
		if _, err := conn.Write(hello); err != nil {
			t.Fatal(err)
		}
		for p.gate.handshakes.length() != before+1 {
			runtime.Gosched()
		}
		return conn
	}
	first := []net.Conn{greet("127.0.0.2"), greet("127.0.0.2"), greet("127.0.0.2"), greet("127.0.0.3")}
	late := p.client(t, "127.0.0.4")
	late.Connect()
	if victim, admitted, err := p.gate.place(&conn{gate: p.gate, key: peerNamed("127.0.0.5")}); victim != nil || admitted || err != nil {
		t.Errorf("beside a crowd: %v, %t, %v", victim, admitted, err)
	}
	for range runtime.GOMAXPROCS(0) {
		p.gate.handshakes.give(turn{}, false)
		p.gate.handshakes.leave()
	}
	if _, err := grpc_health_v1.NewHealthClient(late).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Errorf("once the crowd has gone: %v", err)
	}
	for _, conn := range first { // they were answered
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}
}

func TestBusyConnectionsAreLeftAlone(t *testing.T) {
	t.Parallel()
	const most = 40
	p := newPort(t, Options{Connections: most})
	watch, err := grpc_health_v1.NewHealthClient(p.client(t, "127.0.0.9")).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	for i := range 2 * most {
		p.call(t, fmt.Sprintf("127.0.1.%d", 1+i%50))
	}
	ended := make(chan error, 1)
	go func() { _, err := watch.Recv(); ended <- err }()
	p.call(t, "127.0.0.8")
	select {
	case err := <-ended:
		t.Errorf("the stream ended: %v", err)
	default:
	}
}

// One peer cannot take all places: what it opens beyond its share is refused, and others find room.
func TestAFloodOfConnectionsMeetsOnlyItsOwnPeer(t *testing.T) {
	t.Parallel()
	const most = 100
	p := newPort(t, Options{Connections: most})
	var flood []net.Conn
	for range 2 * most {
		flood = append(flood, p.dial(t, "127.0.0.2"))
	}
	p.log.await(t, `"msg":"a connection was refused"`)
	for i := range 20 {
		p.call(t, fmt.Sprintf("127.0.1.%d", 1+i))
	}
	if counts := p.gate.Counts(); counts.Connections > most {
		t.Errorf("%+v", counts)
	}
	if p.count(RefusedConnection) == 0 {
		t.Error("no refusal was counted")
	}
	for _, conn := range flood {
		conn.Close()
	}
	for p.gate.Counts().Connections > 20 { // the server has noticed
		runtime.Gosched()
	}
	p.call(t, "127.0.0.2") // now it is one like the others
}

// When all places are taken by what is busy, a new connection waits for one that ends.
func TestANewConnectionWaitsForAPlace(t *testing.T) {
	t.Parallel()
	const most = 32
	p := newPort(t, Options{Connections: most})
	var silent []net.Conn
	for i := range most {
		silent = append(silent, p.dial(t, fmt.Sprintf("127.0.1.%d", 1+i)))
	}
	served, client := make(chan error, 1), p.client(t, "127.0.0.1")
	go func() {
		_, err := grpc_health_v1.NewHealthClient(client).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true))
		served <- err
	}()
	for p.gate.Counts().Connections < most {
		runtime.Gosched()
	}
	select {
	case err := <-served:
		t.Fatalf("it was served though there was no place (%v)", err)
	default:
	}
	silent[7].Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// begin sends the header of a call and nothing more.
func (p *port) begin(t *testing.T, from string) (grpc.ClientStream, *grpc.ClientConn) {
	t.Helper()
	conn := p.client(t, from)
	before := p.gate.Counts().Arriving
	stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, grpc_health_v1.Health_Check_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	for p.gate.Counts().Arriving == before {
		runtime.Gosched()
	}
	return stream, conn
}

// A request of which only the beginning comes is not waited for without end, and what it holds is given back.
func TestAHalfSentRequestIsEnded(t *testing.T) {
	t.Parallel()
	p := newPort(t, Options{Patience: 100 * time.Millisecond})
	stream, _ := p.begin(t, "127.0.0.1")
	if err := stream.RecvMsg(&grpc_health_v1.HealthCheckResponse{}); status.Code(err) != codes.Unavailable {
		t.Errorf("the client is told %v", err)
	}
	p.log.await(t, "the client began a request and did not send the rest in time")
	if p.count(ClosedSlow) == 0 {
		t.Error("nothing was counted")
	}
}

// Who takes back one call after the other, or is refused, makes others wait without ever having a turn.
func TestWhoMakesCallsInVainWithoutEndLosesItsConnection(t *testing.T) {
	t.Parallel()
	p := newPort(t, Options{})
	conn := p.client(t, "127.0.0.1")
	all := 0
	take := func(n int) {
		for range n {
			ctx, cancel := context.WithCancel(t.Context())
			stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, grpc_health_v1.Health_Check_FullMethodName)
			if err != nil {
				t.Fatal(err)
			}
			cancel()
			if err := stream.RecvMsg(&grpc_health_v1.HealthCheckResponse{}); status.Code(err) != codes.Canceled {
				t.Fatalf("the client is told %v", err)
			}
		}
		all += n
		for p.count("unread") < all {
			runtime.Gosched()
		}
	}
	take(mostInVain - 1)
	if _, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	take(mostInVain - 1)
	if n := p.count(ClosedInVain); n != 0 {
		t.Errorf("%d connections were ended of a client that has its call answered in between", n)
	}
	take(1)
	for p.count(ClosedInVain) == 0 {
		runtime.Gosched()
	}
}

// Half-sent requests do not hold up a stop.
func TestHalfSentRequestsAreGivenUpWhenTheCAStops(t *testing.T) {
	t.Parallel()
	p := newPort(t, Options{})
	stream, _ := p.begin(t, "127.0.0.1")
	p.gate.Drain()
	if err := stream.RecvMsg(&grpc_health_v1.HealthCheckResponse{}); status.Code(err) != codes.Unavailable {
		t.Errorf("the client is told %v", err)
	}
}

// A connection over which there is no work is idle, whatever else goes on over it.
func TestStreamsThatAreNoWorkKeepNoPlace(t *testing.T) {
	t.Parallel()
	p := newPort(t, Options{Connections: 32, Work: func(method string) bool { return method == grpc_health_v1.Health_Check_FullMethodName }})
	watch, err := grpc_health_v1.NewHealthClient(p.client(t, "127.0.0.9")).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	for i := range 64 {
		p.call(t, fmt.Sprintf("127.0.1.%d", 1+i))
	}
	if _, err := watch.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream goes on: %v", err)
	}
}

func TestThereAreNeverMoreConnectionsThanDescriptors(t *testing.T) {
	if got, most := New(Options{Connections: 1 << 40}).connections, DescriptorsAllow(); got != most {
		t.Errorf("%d connections, where the descriptors allow %d", got, most)
	}
}

// enter has a caller ask for a place, and returns once it waits.
func enter(t *testing.T, g *Gate, ctx context.Context, from string, entered chan<- *Place) <-chan error {
	t.Helper()
	before, ended := g.Counts().WaitingCalls, make(chan error, 1)
	go func() {
		place, err := g.Enter(ctx, &net.TCPAddr{IP: net.ParseIP(from)})
		if err == nil {
			entered <- place
		}
		ended <- err
	}()
	for g.Counts().WaitingCalls == before {
		select {
		case err := <-ended:
			t.Fatalf("it did not wait: %v", err)
		default:
			runtime.Gosched()
		}
	}
	return ended
}

// Though there are places enough for a flood of dear calls from one peer, a call of another is checked next but one.
func TestAFloodOfDearCallsTakesTurnsForTheProcessor(t *testing.T) {
	g := New(Options{})
	const greedy, modest = "192.0.2.1", "192.0.2.2"
	var checking []*Place
	for range runtime.GOMAXPROCS(0) {
		place, err := g.Enter(t.Context(), &net.TCPAddr{IP: net.ParseIP(greedy)})
		if err != nil {
			t.Fatal(err)
		}
		checking = append(checking, place)
	}
	entered := make(chan *Place)
	const flood = 100
	for range flood {
		enter(t, g, t.Context(), greedy, entered)
	}
	enter(t, g, t.Context(), modest, entered)
	var order []string
	for i := range flood + 1 {
		checking[i].Checked() // and goes on in its place
		next := <-entered
		checking, order = append(checking, next), append(order, next.peer.Addr().String())
	}
	if order[0] != greedy || order[1] != modest {
		t.Errorf("the first to be checked were %v", order[:2])
	}
	for _, place := range checking {
		place.Leave()
		place.Leave() // which changes nothing
	}
	if g.calls.places != 512 || g.calls.free != runtime.GOMAXPROCS(0) {
		t.Errorf("after all %d places and %d turns are free", g.calls.places, g.calls.free)
	}
}

// Whoever gives up, or is sent away, while it waits to be checked keeps no place.
func TestWhoWaitsToBeCheckedMayGiveUp(t *testing.T) {
	g := New(Options{})
	var checking []*Place
	for range runtime.GOMAXPROCS(0) {
		place, err := g.Enter(t.Context(), &net.TCPAddr{IP: net.ParseIP("192.0.2.1")})
		if err != nil {
			t.Fatal(err)
		}
		checking = append(checking, place)
	}
	entered := make(chan *Place)
	ctx, cancel := context.WithCancel(t.Context())
	impatient := enter(t, g, ctx, "192.0.2.2", entered)
	cancel()
	if err := <-impatient; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	patient := enter(t, g, t.Context(), "192.0.2.2", entered)
	g.Drain()
	if err := <-patient; !errors.Is(err, errStopping) {
		t.Errorf("when the CA stops: %v", err)
	}
	for _, place := range checking {
		place.Leave()
	}
	if g.calls.places != 512 || g.calls.free != runtime.GOMAXPROCS(0) {
		t.Errorf("after all %d places and %d turns are free", g.calls.places, g.calls.free)
	}
}

// A call that stood aside and came back in vain has no place to leave.
func TestWhoComesBackInVainLeavesNothing(t *testing.T) {
	g := New(Options{})
	place, err := g.Enter(t.Context(), &net.TCPAddr{IP: net.ParseIP("192.0.2.1")})
	if err != nil {
		t.Fatal(err)
	}
	place.Leave()
	g.Drain()
	g.calls.places = 0 // so that there is none to come back to
	if err := place.Again(t.Context()); !errors.Is(err, errStopping) {
		t.Errorf("error %v", err)
	}
	place.Checked()
	place.Leave()
	if g.calls.places != 0 || g.calls.free != runtime.GOMAXPROCS(0) {
		t.Errorf("it gave back what it had not: %d places and %d turns are free", g.calls.places, g.calls.free)
	}
}
