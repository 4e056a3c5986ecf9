package hsm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// protocol is what parent and child must both speak, word for word. Any change to frames or messages changes it.
const protocol = "kedge hsm 2"

// maxFrame is the longest frame in octets, its length field not counted: a token with some thousand keys is listed in one.
const maxFrame = 4 << 20

// maxDigest is the longest digest in octets: that of SHA-512.
const maxDigest = 64

// kind says what a frame asks for or answers.
type kind byte

const (
	kindHello    kind = iota + 1 // payload: the protocol; answered by the child's
	kindStart                    // startRequest → Info: the module is loaded, and the token found
	kindLogin                    // loginRequest → sourceIdentity of the PIN that was taken
	kindPing                     // → nothing: the token is there
	kindSign                     // signRequest and the digest → the raw signature
	kindFind                     // findRequest → findReply
	kindList                     // listRequest → listReply
	kindGenerate                 // generateRequest → nothing
	kindDelete                   // deleteRequest → nothing
	kindDone                     // answer: the payload is the result
	kindFailed                   // answer: the payload is a failure
)

// frame is one message. An answer carries the id, the generation and the digest of its request.
//
//	octets  4       1     8   8           1              0–64    …
//	        length  kind  id  generation  digest length  digest  payload
type frame struct {
	kind       kind
	id         uint64
	generation uint64
	digest     []byte
	payload    []byte
}

const frameHeader = 1 + 8 + 8 + 1

func appendFrame(b []byte, f frame) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(frameHeader+len(f.digest)+len(f.payload)))
	b = append(b, byte(f.kind))
	b = binary.BigEndian.AppendUint64(b, f.id)
	b = binary.BigEndian.AppendUint64(b, f.generation)
	b = append(b, byte(len(f.digest)))
	b = append(b, f.digest...)
	return append(b, f.payload...)
}

// decodeFrame reads what stands behind a length field. Digest and payload are part of body.
func decodeFrame(body []byte) (frame, error) {
	if len(body) < frameHeader {
		return frame{}, fmt.Errorf("a frame of %d octets is too short", len(body))
	}
	f := frame{kind: kind(body[0]), id: binary.BigEndian.Uint64(body[1:]), generation: binary.BigEndian.Uint64(body[9:])}
	digest := int(body[17])
	if digest > maxDigest || digest > len(body)-frameHeader {
		return frame{}, fmt.Errorf("a frame of %d octets says that its digest has %d", len(body), digest)
	}
	if f.kind < kindHello || f.kind > kindFailed {
		return frame{}, fmt.Errorf("a frame is of the unknown kind %d", f.kind)
	}
	f.digest, f.payload = body[frameHeader:frameHeader+digest], body[frameHeader+digest:]
	return f, nil
}

// readFrame reads one frame. At the end of the stream between two frames the error is io.EOF.
func readFrame(r io.Reader) (frame, error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return frame{}, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > maxFrame {
		return frame{}, fmt.Errorf("a frame of %d octets is longer than the %d that are allowed", n, maxFrame)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return frame{}, errors.Join(errors.New("a frame was cut off"), err)
	}
	return decodeFrame(body)
}

// frameWriter writes frames of many goroutines in as few system calls as there can be: who comes while another one writes leaves its frame to it.
type frameWriter struct {
	conn net.Conn

	mu      sync.Mutex
	waiting []byte
	spare   []byte
	busy    bool
	err     error
}

// write writes the frame, or leaves it to the goroutine that is writing. An error is that of any earlier write too.
func (w *frameWriter) write(f frame) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting = appendFrame(w.waiting, f)
	if w.busy {
		return w.err
	}
	w.busy = true
	for len(w.waiting) > 0 && w.err == nil {
		out := w.waiting
		w.waiting, w.spare = w.spare[:0], nil
		w.mu.Unlock()
		_, err := w.conn.Write(out)
		w.mu.Lock()
		w.spare = out
		w.err = err
	}
	w.busy = false
	return w.err
}
