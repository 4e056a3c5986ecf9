package envoys

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/gob"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// Identity is what an Envoy proves itself with.
type Identity struct {
	Chain [][]byte // DER, the leaf first
	Key   []byte   // PKCS #8
}

// WriteIdentities writes a file for Order.Identities.
func WriteIdentities(path string, identities []Identity) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(gob.NewEncoder(file).Encode(identities), file.Close())
}

func readIdentities(path string) (identities []Identity, err error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return identities, gob.NewDecoder(file).Decode(&identities)
}

// shaking is how many Envoys connect at once.
const shaking = 64

// crowd are the streams that are open.
type crowd struct {
	dial func(i int) (net.Conn, error)

	mu      sync.Mutex
	changed *sync.Cond
	roots   []int // of each stream: how many certificates were in what it acknowledged last; 0: nothing yet
	got     int   // responses, in all
	first   time.Time
	last    time.Time // of an acknowledgement
	failed  error
	conns   []net.Conn
}

func newCrowd(dial func(i int) (net.Conn, error)) *crowd {
	c := &crowd{dial: dial}
	c.changed = sync.NewCond(&c.mu)
	return c
}

// open opens streams until there are so many, and waits until each has acknowledged something.
func (c *crowd) open(count int, identities []Identity, serverLeaf []byte) error {
	if len(identities) < count {
		return fmt.Errorf("there are %d identities for %d streams", len(identities), count)
	}
	c.mu.Lock()
	begin := len(c.roots)
	c.roots = append(c.roots, make([]int, count-begin)...)
	c.mu.Unlock()
	next := make(chan int)
	var opening sync.WaitGroup
	for range shaking {
		opening.Go(func() {
			for i := range next {
				if err := c.start(i, identities[i], serverLeaf); err != nil {
					c.fail(fmt.Errorf("stream %d: %w", i, err))
				}
			}
		})
	}
	for i := begin; i < count; i++ {
		next <- i
	}
	close(next)
	opening.Wait()
	_, err := c.await(1)
	return err
}

// start opens a stream. What comes on it is acknowledged until it ends.
func (c *crowd) start(i int, identity Identity, serverLeaf []byte) error {
	key, err := x509.ParsePKCS8PrivateKey(identity.Key)
	if err != nil {
		return err
	}
	raw, err := c.dial(i)
	if err != nil {
		return err
	}
	conn := tls.Client(raw, &tls.Config{Certificates: []tls.Certificate{{Certificate: identity.Chain, PrivateKey: key}}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13,
		InsecureSkipVerify: true, // to compare costs less than to verify
		VerifyConnection: func(state tls.ConnectionState) error {
			if !bytes.Equal(state.PeerCertificates[0].Raw, serverLeaf) {
				return errors.New("the server has another certificate than it had")
			}
			return nil
		}})
	if err := conn.Handshake(); err != nil {
		return errors.Join(err, raw.Close())
	}
	s, err := open(conn, fmt.Sprintf("envoy-%d", i))
	if err != nil {
		return errors.Join(err, raw.Close())
	}
	c.mu.Lock()
	c.conns = append(c.conns, raw)
	c.mu.Unlock()
	go func() {
		defer raw.Close()
		for {
			version, nonce, roots, err := s.receive()
			if err == nil {
				c.note(i, 0)
				err = s.request(version, nonce, nil)
			}
			if err != nil {
				c.fail(fmt.Errorf("stream %d: %w", i, err))
				return
			}
			c.note(i, roots)
		}
	}()
	return nil
}

// note notes a response (no roots), or that it was acknowledged.
func (c *crowd) note(i, roots int) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if roots == 0 {
		if c.got++; c.first.IsZero() {
			c.first = now
		}
		return
	}
	c.roots[i], c.last = roots, now
	c.changed.Signal()
}

func (c *crowd) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed == nil {
		c.failed = err
	}
	c.changed.Broadcast()
}

// Pushed is how a push went.
type Pushed struct {
	Responses   int       // that came since the last one
	First, Last time.Time // when the first response came, and when the last one was acknowledged
}

// await waits until every stream has acknowledged at least so many roots.
func (c *crowd) await(roots int) (Pushed, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := 0; i < len(c.roots); {
		switch {
		case c.failed != nil:
			return Pushed{}, c.failed
		case c.roots[i] >= roots:
			i++
		default:
			c.changed.Wait()
		}
	}
	p := Pushed{Responses: c.got, First: c.first, Last: c.last}
	c.got, c.first = 0, time.Time{}
	return p, c.failed
}
