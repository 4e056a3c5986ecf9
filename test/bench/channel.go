package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What grpc-go does unless told otherwise (backoff.DefaultConfig, minConnectTimeout).
const (
	connectLimit    = 20 * time.Second
	reconnectWait   = time.Second
	reconnectFactor = 1.6
	reconnectJitter = 0.2
	reconnectMost   = 2 * time.Minute
)

// The agent's options of its connection.
const (
	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 10 * time.Second
	window           = 1 << 20
	firstWindow      = 65535 // octets (RFC 9113 6.9.2)
)

// channel is a gRPC channel with the timing of grpc-go's, and one call at a time: it connects with the first call; while it connects a call waits; once connecting has failed calls
// fail at once, until a later try succeeds; a connection that ends leaves it idle. The frames are written by hand, since grpc-go's client costs more CPU than what a server does
// for it, and a herd's agents share one core.
type channel struct {
	method  string
	connect func(ctx context.Context) (*tls.Conn, error)
	ctx     context.Context
	close   context.CancelFunc

	mu     sync.Mutex
	try    *try // nil: idle
	failed bool // the last try that ended did
}

// try is an attempt to connect, and what became of it once done is closed.
type try struct {
	done chan struct{}
	link *link
	err  error
}

func newChannel(method string, connect func(context.Context) (*tls.Conn, error)) *channel {
	c := &channel{method: method, connect: connect}
	c.ctx, c.close = context.WithCancel(context.Background())
	return c
}

// begin connects if the channel is idle. It returns the try to wait for; nil: it failed last, and goes on trying.
func (c *channel) begin() *try {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.try == nil {
		c.try = &try{done: make(chan struct{})}
		go c.keepTrying(c.try)
	}
	if c.failed {
		return nil
	}
	return c.try
}

// keepTrying connects until that succeeds.
func (c *channel) keepTrying(t *try) {
	for wait := reconnectWait; ; wait = min(time.Duration(float64(wait)*reconnectFactor), reconnectMost) {
		began := time.Now()
		t.link, t.err = c.open()
		c.mu.Lock()
		c.failed = t.err != nil
		close(t.done)
		if !c.failed {
			c.mu.Unlock()
			t.link.read()
			c.mu.Lock()
			c.try = nil
			c.mu.Unlock()
			return
		}
		t = &try{done: make(chan struct{})}
		c.try = t
		c.mu.Unlock()
		if !pause(c.ctx, wait-time.Since(began), reconnectJitter) { // grpc-go counts from the beginning of the try
			return
		}
	}
}

// open connects, up to the server's settings.
func (c *channel) open() (*link, error) {
	ctx, cancel := context.WithTimeout(c.ctx, connectLimit)
	defer cancel()
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	context.AfterFunc(c.ctx, func() { conn.NetConn().Close() })
	stop := context.AfterFunc(ctx, func() { conn.NetConn().Close() })
	l := &link{conn: conn, method: c.method, answer: make(chan reply, 1), ended: make(chan struct{}), next: 1}
	l.encoder = hpack.NewEncoder(&l.block)
	l.out, l.in = http2.NewFramer(&l.pending, nil), http2.NewFramer(nil, bufio.NewReaderSize(conn, 4<<10))
	l.in.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	err = l.greet()
	if !stop() || err != nil {
		return nil, errors.Join(errors.New("the server did not say its settings"), err, conn.NetConn().Close())
	}
	return l, nil
}

// call is one call. The error has the code that grpc-go's would have.
func (c *channel) call(ctx context.Context, headers []hpack.HeaderField, request []byte) ([]byte, error) {
	t := c.begin()
	if t == nil {
		return nil, status.Error(codes.Unavailable, "connecting has failed")
	}
	select {
	case <-t.done:
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if t.err != nil {
		return nil, status.Error(codes.Unavailable, t.err.Error())
	}
	return t.link.call(ctx, headers, request)
}

// link is an HTTP/2 connection.
type link struct {
	conn   *tls.Conn
	method string
	in     *http2.Framer // of the goroutine that reads
	heard  atomic.Int64  // when a frame came last, in UNIX ns
	answer chan reply    // to the call that is under way
	ended  chan struct{}
	err    error // why, once it has ended

	mu      sync.Mutex
	pending bytes.Buffer // frames to write
	out     *http2.Framer
	block   bytes.Buffer
	encoder *hpack.Encoder
	next    uint32 // stream
}

type reply struct {
	stream  uint32
	code    codes.Code
	message string
	data    []byte
}

// greet exchanges settings.
func (l *link) greet() error {
	l.pending.WriteString(http2.ClientPreface)
	err := errors.Join(l.out.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window}), l.out.WriteWindowUpdate(0, window-firstWindow), l.flush())
	if err != nil {
		return err
	}
	f, err := l.in.ReadFrame()
	if err != nil {
		return err
	}
	if settings, ok := f.(*http2.SettingsFrame); !ok || settings.IsAck() {
		return fmt.Errorf("its first frame is %v", f)
	}
	return errors.Join(l.out.WriteSettingsAck(), l.flush())
}

// flush writes what is pending. The link is locked, or young.
func (l *link) flush() error {
	_, err := l.conn.Write(l.pending.Bytes())
	l.pending.Reset()
	return err
}

// read takes in frames until the connection ends.
func (l *link) read() {
	defer close(l.ended)
	defer l.conn.NetConn().Close()
	var a reply
	for {
		f, err := l.in.ReadFrame()
		if err != nil {
			l.err = err
			return
		}
		l.heard.Store(time.Now().UnixNano())
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				l.write(func() error { return l.out.WriteSettingsAck() })
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				l.write(func() error { return l.out.WritePing(true, f.Data) })
			}
		case *http2.MetaHeadersFrame:
			for _, field := range f.Fields {
				switch field.Name {
				case "grpc-status":
					n, err := strconv.ParseUint(field.Value, 10, 32)
					if err != nil {
						n = uint64(codes.Unknown)
					}
					a.code = codes.Code(n)
				case "grpc-message":
					a.message = field.Value
				}
			}
			if f.StreamEnded() {
				a.stream = f.StreamID
				l.answer <- a
				a = reply{}
			}
		case *http2.DataFrame:
			a.data = append(a.data, f.Data()...)
		case *http2.RSTStreamFrame:
			l.answer <- reply{stream: f.StreamID, code: codes.Unavailable, message: "the stream was reset: " + f.ErrCode.String()}
			a = reply{}
		case *http2.GoAwayFrame:
			l.err = fmt.Errorf("the server says good-bye: %s", f.ErrCode)
			return
		}
	}
}

// write writes frames; when it fails, the reading ends as well.
func (l *link) write(frames func() error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if errors.Join(frames(), l.flush()) != nil {
		_ = l.conn.NetConn().Close()
	}
}

func (l *link) call(ctx context.Context, headers []hpack.HeaderField, request []byte) ([]byte, error) {
	message := make([]byte, 5, 5+len(request)) // not compressed, and its length
	binary.BigEndian.PutUint32(message[1:], uint32(len(request)))
	message = append(message, request...)
	var stream uint32
	l.write(func() error {
		l.block.Reset()
		for _, field := range append([]hpack.HeaderField{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"}, {Name: ":path", Value: l.method},
			{Name: ":authority", Value: l.conn.RemoteAddr().String()}, {Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"}}, headers...) {
			if err := l.encoder.WriteField(field); err != nil {
				return err
			}
		}
		stream = l.next
		l.next += 2
		return errors.Join(l.out.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: l.block.Bytes(), EndHeaders: true}), l.out.WriteData(stream, true, message))
	})
	began := time.Now()
	for wait := time.Duration(keepaliveTime); ; {
		timer := time.NewTimer(wait)
		select {
		case a := <-l.answer:
			timer.Stop()
			if a.stream != stream {
				continue
			}
			if a.code != codes.OK {
				return nil, status.Error(a.code, a.message)
			}
			if len(a.data) < 5 || a.data[0] != 0 || int(binary.BigEndian.Uint32(a.data[1:])) != len(a.data)-5 {
				return nil, status.Error(codes.Internal, "the answer is not one message")
			}
			return a.data[5:], nil
		case <-l.ended:
			timer.Stop()
			if errors.Is(l.err, io.EOF) || errors.Is(l.err, net.ErrClosed) {
				return nil, status.Error(codes.Unavailable, "the connection was closed")
			}
			return nil, status.Error(codes.Unavailable, l.err.Error())
		case <-ctx.Done():
			timer.Stop()
			return nil, status.FromContextError(ctx.Err()).Err()
		case <-timer.C:
			silent := min(time.Since(began), time.Since(time.Unix(0, l.heard.Load())))
			switch {
			case silent < keepaliveTime:
				wait = keepaliveTime - silent
			case silent < keepaliveTime+keepaliveTimeout:
				l.write(func() error { return l.out.WritePing(false, [8]byte{}) })
				wait = keepaliveTimeout
			default:
				_ = l.conn.NetConn().Close() // which ends the reading
				wait = keepaliveTimeout
			}
		}
	}
}
