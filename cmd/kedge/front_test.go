package main

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// front stands before a CA: its address stays the same while the CA behind it comes and goes, so that no port has to be kept free. It hangs up while there is none.
type front struct {
	address string
	behind  atomic.Pointer[string]
	mu      sync.Mutex
	open    map[net.Conn]bool
}

func newFront(t *testing.T) *front {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &front{address: l.Addr().String(), open: map[net.Conn]bool{}}
	var connections sync.WaitGroup
	connections.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return // it is closed
			}
			address := f.behind.Load()
			if address == nil {
				_ = client.Close() // the client notices, whatever comes of it
				continue
			}
			f.note(client, true)
			connections.Go(func() {
				forward(client, *address)
				f.note(client, false)
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close() // ends the loop
		f.mu.Lock()
		for client := range f.open {
			_ = client.Close() // ends what is forwarded
		}
		f.mu.Unlock()
		connections.Wait()
	})
	return f
}

func (f *front) note(client net.Conn, open bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if open {
		f.open[client] = true
	} else {
		delete(f.open, client)
	}
}

// lead leads new connections to address; "": nowhere.
func (f *front) lead(address string) {
	if address == "" {
		f.behind.Store(nil)
		return
	}
	f.behind.Store(&address)
}

// forward connects two ends until one of them hangs up.
func forward(client net.Conn, address string) {
	defer client.Close()
	server, err := net.Dial("tcp", address)
	if err != nil {
		return // the client sees its connection end
	}
	defer server.Close()
	go func() {
		_, _ = io.Copy(server, client)
		_ = server.Close()
	}()
	_, _ = io.Copy(client, server)
}
