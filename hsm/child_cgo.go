//go:build cgo

package hsm

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/miekg/pkcs11"
)

// Supported says whether this program can load a module.
func Supported() error { return nil }

// drainLimit is how long calls of the module may take at the end before the child leaves without them.
const drainLimit = 3 * time.Second

// ChildMain is the child: it does what the parent asks until that closes the socket, and returns the exit code. It holds one module, one login and the PIN until that is used.
func ChildMain() int {
	if err := KeepOutOfDumps(); err != nil {
		fmt.Fprintln(os.Stderr, "hsm: keeping the PIN out of core dumps:", err)
		return 1
	}
	file := os.NewFile(socketDescriptor, "parent")
	conn, err := net.FileConn(file)
	if err != nil {
		fmt.Fprintln(os.Stderr, "hsm: this verb is for the program itself, which passes a socket:", err)
		return 1
	}
	file.Close() // conn has a copy
	c := &child{writer: frameWriter{conn: conn}, jobs: make(chan frame, 4096)}
	err = c.serve(bufio.NewReaderSize(conn, 64<<10))
	c.end()
	if !errors.Is(err, io.EOF) {
		fmt.Fprintln(os.Stderr, "hsm:", err)
		return 1
	}
	return 0
}

// child is what runs in the child.
type child struct {
	writer  frameWriter
	module  *module
	jobs    chan frame
	workers sync.WaitGroup
}

// serve reads frames until the socket ends.
func (c *child) serve(r io.Reader) error {
	for {
		f, err := readFrame(r)
		if err != nil {
			return err
		}
		switch f.kind {
		case kindHello:
			if string(f.payload) != protocol {
				return fmt.Errorf("the parent speaks %q, and this program %q: they are not the same program", f.payload, protocol)
			}
			if err := c.writer.write(frame{kind: kindHello, id: f.id, generation: f.generation, payload: []byte(protocol)}); err != nil {
				return err
			}
		case kindStart:
			c.answer(f, func() (any, error) { return request(f.payload, c.start) })
		case kindLogin, kindSign, kindPing, kindFind, kindList, kindGenerate, kindDelete:
			if c.module == nil {
				c.fail(f, &failure{Reason: reasonRequest, Text: "the module is not started"})
				continue
			}
			if f.kind == kindLogin {
				c.answer(f, func() (any, error) {
					return request(f.payload, func(r loginRequest) (any, error) { return c.module.login(r) })
				})
				continue
			}
			c.jobs <- f
		default:
			return fmt.Errorf("the parent sent a frame of the kind %d", f.kind)
		}
	}
}

// start loads the module, finds the token, and starts a worker for each session.
func (c *child) start(r startRequest) (any, error) {
	if c.module != nil {
		return nil, &failure{Reason: reasonRequest, Text: "the module is started already"}
	}
	m, info, err := startModule(r)
	if err != nil {
		return nil, err
	}
	c.module = m
	for _, session := range m.sessions {
		c.workers.Go(func() {
			for f := range c.jobs {
				c.work(session, f)
			}
		})
	}
	return info, nil
}

// work does what one frame asks, in a session.
func (c *child) work(session pkcs11.SessionHandle, f frame) {
	if f.kind == kindSign {
		r, err := decodeSignRequest(f.payload)
		if err != nil {
			c.fail(f, &failure{Reason: reasonRequest, Text: err.Error()})
			return
		}
		signature, err := c.module.sign(session, r, f.digest)
		if err != nil {
			c.fail(f, err)
			return
		}
		c.done(f, signature)
		return
	}
	c.answer(f, func() (any, error) {
		switch f.kind {
		case kindFind:
			return request(f.payload, func(r findRequest) (any, error) { return c.module.find(session, r) })
		case kindList:
			return request(f.payload, func(r listRequest) (any, error) { return c.module.list(session, r) })
		case kindGenerate:
			return request(f.payload, func(r generateRequest) (any, error) { return nil, c.module.generate(r) })
		case kindDelete:
			return request(f.payload, func(r deleteRequest) (any, error) { return nil, c.module.remove(r) })
		}
		return nil, c.module.ping(session)
	})
}

func request[R any](payload []byte, do func(R) (any, error)) (any, error) {
	var r R
	if err := json.Unmarshal(payload, &r); err != nil {
		return nil, &failure{Reason: reasonRequest, Text: err.Error()}
	}
	return do(r)
}

func (c *child) answer(f frame, do func() (any, error)) {
	reply, err := do()
	if err != nil {
		c.fail(f, err)
		return
	}
	payload, err := json.Marshal(reply)
	if err != nil {
		c.fail(f, &failure{Reason: reasonRequest, Text: err.Error()})
		return
	}
	c.done(f, payload)
}

// done and fail answer. When the parent is gone, so is the child soon.
func (c *child) done(f frame, payload []byte) {
	_ = c.writer.write(frame{kind: kindDone, id: f.id, generation: f.generation, digest: f.digest, payload: payload})
}

func (c *child) fail(f frame, err error) {
	var said *failure
	if !errors.As(err, &said) {
		said = &failure{Reason: reasonModule, Text: err.Error()}
	}
	payload, err := json.Marshal(said)
	if err != nil {
		payload = []byte("{}")
	}
	_ = c.writer.write(frame{kind: kindFailed, id: f.id, generation: f.generation, digest: f.digest, payload: payload})
}

// end waits for the calls that are under way and finalises the module: one that is torn down while it is called crashes, and a TPM keeps what a client left in it. A call that
// hangs is left behind.
func (c *child) end() {
	close(c.jobs)
	drained := make(chan struct{})
	go func() {
		c.workers.Wait()
		if c.module != nil {
			c.module.finalize()
		}
		close(drained)
	}()
	select {
	case <-drained:
	case <-time.After(drainLimit):
	}
}

func (f *failure) Error() string { return f.Text }
