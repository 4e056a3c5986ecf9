package envoys

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"
)

// Variable names the unix socket on which a server under measurement takes orders.
const Variable = "KEDGE_BENCH_STREAMS"

// Order is one, on a connection of its own. The first that is set counts.
type Order struct {
	Open   *Open `json:",omitempty"`
	Await  int   `json:",omitempty"` // until all have acknowledged so many roots
	Push   int   `json:",omitempty"` // so many roots, to everybody; for a server that has nothing else to push
	Memory bool  `json:",omitempty"` // how much this process has, after some collections
}

// Open opens streams.
type Open struct {
	Count      int    // until there are so many
	Identities string // a file
	ServerLeaf []byte // DER
}

// Report answers an order.
type Report struct {
	Pushed
	Memory uint64 // octets of heap and stacks in use
	Err    string
}

// Player carries orders out.
type Player struct {
	Dial func(i int) (net.Conn, error)
	Push func(roots int) // nil: it cannot
	all  *crowd
}

// Listen takes orders on the socket that Variable names, until the process ends.
func (p *Player) Listen() error {
	l, err := net.Listen("unix", os.Getenv(Variable))
	if err != nil {
		return fmt.Errorf("taking orders: %w", err)
	}
	p.all = newCrowd(p.Dial)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				var order Order
				report, err := Report{}, json.NewDecoder(conn).Decode(&order)
				if err == nil {
					report, err = p.carryOut(order)
				}
				if err != nil {
					report.Err = err.Error()
				}
				_ = json.NewEncoder(conn).Encode(report) // who does not read it has gone
			}()
		}
	}()
	return nil
}

func (p *Player) carryOut(o Order) (r Report, err error) {
	switch {
	case o.Open != nil:
		identities, err := readIdentities(o.Open.Identities)
		if err != nil {
			return r, err
		}
		return r, p.all.open(o.Open.Count, identities, o.Open.ServerLeaf)
	case o.Await > 0:
		r.Pushed, err = p.all.await(o.Await)
		return r, err
	case o.Push > 0 && p.Push != nil:
		p.Push(o.Push)
		return r, nil
	case o.Memory:
		for range 5 { // each halves stacks that were large once
			runtime.GC()
		}
		debug.FreeOSMemory()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		r.Memory = stats.HeapInuse + stats.StackInuse
		return r, nil
	}
	return r, errors.New("the order says nothing that can be done")
}

// Do gives an order to the process that takes them on a socket.
func Do(socket string, order Order) (report Report, err error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return report, err
	}
	defer conn.Close()
	if err := errors.Join(json.NewEncoder(conn).Encode(order), json.NewDecoder(conn).Decode(&report)); err != nil {
		return report, fmt.Errorf("giving an order: %w", err)
	}
	if report.Err != "" {
		return report, errors.New(report.Err)
	}
	return report, nil
}

// Address is that of the Envoy i, from which it connects: an IP address of its own in 127.0.0.0/8.
func Address(i int) *net.TCPAddr {
	return &net.TCPAddr{IP: net.IPv4(127, byte(1+i>>14), byte(i>>7&127), byte(1+i&127))}
}

// Serve gives a server's listener connections in memory besides, and takes orders.
func Serve(l net.Listener) (net.Listener, error) {
	m := NewMemory(l)
	p := &Player{Dial: func(i int) (net.Conn, error) { return m.Dial(Address(i)) }}
	return m, p.Listen()
}

// Play takes orders for streams to a server at address, until the process ends.
func Play(address string) error {
	p := &Player{Dial: func(i int) (net.Conn, error) { return (&net.Dialer{LocalAddr: Address(i)}).Dial("tcp", address) }}
	return p.Listen()
}
