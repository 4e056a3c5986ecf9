package envoys

import (
	"bytes"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// Memory is a listener whose connections are in the memory of this process, beside those of another listener.
type Memory struct {
	net.Listener
	accepted chan net.Conn // of both
	failed   chan error
	closed   chan struct{}
	close    func() error
}

// NewMemory makes one beside l.
func NewMemory(l net.Listener) *Memory {
	m := &Memory{Listener: l, accepted: make(chan net.Conn), failed: make(chan error), closed: make(chan struct{})}
	m.close = sync.OnceValue(func() error {
		close(m.closed)
		return l.Close()
	})
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				select {
				case m.failed <- err:
				case <-m.closed:
					return
				}
				continue
			}
			select {
			case m.accepted <- conn:
			case <-m.closed:
				_ = conn.Close() // nobody takes it
				return
			}
		}
	}()
	return m
}

// Accept returns the next connection, of either kind.
func (m *Memory) Accept() (net.Conn, error) {
	select {
	case conn := <-m.accepted:
		return conn, nil
	case err := <-m.failed:
		return nil, err
	case <-m.closed:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (m *Memory) Close() error { return m.close() }

// Dial makes a connection in memory, which comes from address.
func (m *Memory) Dial(address net.Addr) (net.Conn, error) {
	up, down := newHalf(), newHalf()
	server := &end{in: up, out: down, local: m.Addr(), remote: address}
	select {
	case m.accepted <- server:
		return &end{in: down, out: up, local: address, remote: m.Addr()}, nil
	case <-m.closed:
		return nil, net.ErrClosed
	}
}

// most is how many octets one side may be ahead of the other.
const most = 64 << 10

// half is one direction of a connection. It keeps no buffer while nothing is under way.
type half struct {
	mu      sync.Mutex
	changed sync.Cond
	data    bytes.Buffer
	closed  bool // by either side

	readBy, writeBy       time.Time // deadlines; zero: none
	readTimer, writeTimer *time.Timer
}

func newHalf() *half {
	h := &half{}
	h.changed.L = &h.mu
	return h
}

func (h *half) read(into []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.data.Len() == 0 {
		if h.closed {
			return 0, io.EOF
		}
		if passed(h.readBy) {
			return 0, os.ErrDeadlineExceeded
		}
		h.changed.Wait()
	}
	n, err := h.data.Read(into)
	if h.data.Len() == 0 {
		h.data = bytes.Buffer{}
	}
	h.changed.Broadcast()
	return n, err
}

func (h *half) write(data []byte) (written int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(data) > 0 {
		switch room := most - h.data.Len(); {
		case h.closed:
			return written, io.ErrClosedPipe
		case passed(h.writeBy):
			return written, os.ErrDeadlineExceeded
		case room > 0:
			n, _ := h.data.Write(data[:min(room, len(data))]) // never fails
			written, data = written+n, data[n:]
			h.changed.Broadcast()
		default:
			h.changed.Wait()
		}
	}
	return written, nil
}

func (h *half) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, timer := range []*time.Timer{h.readTimer, h.writeTimer} {
		if timer != nil {
			timer.Stop()
		}
	}
	h.changed.Broadcast()
}

// limit sets a deadline of this half.
func (h *half) limit(deadline *time.Time, timer **time.Timer, at time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	*deadline = at
	if *timer != nil {
		(*timer).Stop()
		*timer = nil
	}
	if !at.IsZero() && !h.closed {
		*timer = time.AfterFunc(time.Until(at), func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.changed.Broadcast()
		})
	}
	h.changed.Broadcast()
}

func passed(at time.Time) bool { return !at.IsZero() && !time.Now().Before(at) }

// end is one side of a connection.
type end struct {
	in, out       *half
	local, remote net.Addr
}

func (e *end) Read(into []byte) (int, error)  { return e.in.read(into) }
func (e *end) Write(data []byte) (int, error) { return e.out.write(data) }
func (e *end) LocalAddr() net.Addr            { return e.local }
func (e *end) RemoteAddr() net.Addr           { return e.remote }

func (e *end) Close() error {
	e.in.close()
	e.out.close()
	return nil
}

func (e *end) SetReadDeadline(at time.Time) error {
	e.in.limit(&e.in.readBy, &e.in.readTimer, at)
	return nil
}

func (e *end) SetWriteDeadline(at time.Time) error {
	e.out.limit(&e.out.writeBy, &e.out.writeTimer, at)
	return nil
}

func (e *end) SetDeadline(at time.Time) error {
	_ = e.SetReadDeadline(at) // neither fails
	return e.SetWriteDeadline(at)
}
