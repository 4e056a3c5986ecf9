package envoys

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/encoding/protowire"
)

// Names of the protocol.
const (
	Method     = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"
	SecretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	Secret     = "ROOTCA"
)

// window is how much a server may send ahead, in octets: so much that none is given to it later.
const window = 16 << 20

// stream is one SDS stream, alone on its connection.
type stream struct {
	conn  net.Conn
	out   *http2.Framer
	in    *http2.Framer
	ready bytes.Buffer // frames to write
	data  []byte       // of a response that has not come whole
}

const streamID = 1

// open asks for ROOTCA.
func open(conn *tls.Conn, node string) (*stream, error) {
	s := &stream{conn: conn}
	s.out, s.in = http2.NewFramer(&s.ready, nil), http2.NewFramer(nil, conn)
	s.in.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	s.in.SetReuseFrames()
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, field := range []hpack.HeaderField{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"}, {Name: ":path", Value: Method}, {Name: ":authority", Value: "kedge"},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"}} {
		if err := encoder.WriteField(field); err != nil {
			return nil, err
		}
	}
	s.ready.WriteString(http2.ClientPreface)
	var id []byte
	id = protowire.AppendTag(id, 1, protowire.BytesType) // Node.id
	id = protowire.AppendString(id, node)
	return s, errors.Join(s.out.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window}), s.out.WriteWindowUpdate(0, window),
		s.out.WriteHeaders(http2.HeadersFrameParam{StreamID: streamID, BlockFragment: block.Bytes(), EndHeaders: true}), s.request("", "", id))
}

// request sends a DiscoveryRequest (envoy/service/discovery/v3/discovery.proto).
func (s *stream) request(version, nonce string, node []byte) error {
	message := make([]byte, 5, 256)
	for _, field := range []struct {
		number protowire.Number
		text   string
	}{{1, version}, {2, string(node)}, {3, Secret}, {4, SecretType}, {5, nonce}} {
		if field.text != "" {
			message = protowire.AppendTag(message, field.number, protowire.BytesType)
			message = protowire.AppendString(message, field.text)
		}
	}
	binary.BigEndian.PutUint32(message[1:], uint32(len(message)-5))
	if err := s.out.WriteData(streamID, false, message); err != nil {
		return err
	}
	return s.flush()
}

func (s *stream) flush() error {
	_, err := s.conn.Write(s.ready.Bytes())
	s.ready = bytes.Buffer{} // what is idle keeps nothing
	return err
}

// receive waits for a response, and returns what is to be said of it and how many certificates are in it.
func (s *stream) receive() (version, nonce string, roots int, err error) {
	for {
		frame, err := s.in.ReadFrame()
		if err != nil {
			return "", "", 0, err
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = errors.Join(s.out.WriteSettingsAck(), s.flush())
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = errors.Join(s.out.WritePing(true, f.Data), s.flush())
			}
		case *http2.MetaHeadersFrame:
			if f.StreamEnded() {
				var status []string
				for _, field := range f.Fields {
					status = append(status, field.Name+": "+field.Value)
				}
				err = fmt.Errorf("the server ended the stream: %s", strings.Join(status, ", "))
			}
		case *http2.RSTStreamFrame:
			err = fmt.Errorf("the server reset the stream: %s", f.ErrCode)
		case *http2.GoAwayFrame:
			err = fmt.Errorf("the server sends its clients away: %s %s", f.ErrCode, f.DebugData())
		case *http2.DataFrame:
			s.data = append(s.data, f.Data()...)
			if len(s.data) < 5 || len(s.data) < 5+int(binary.BigEndian.Uint32(s.data[1:])) {
				continue
			}
			version, nonce, err = readResponse(s.data[5:])
			roots = bytes.Count(s.data, []byte("BEGIN CERTIFICATE"))
			s.data = nil
			return version, nonce, roots, err
		}
		if err != nil {
			return "", "", 0, err
		}
	}
}

// readResponse finds version_info and nonce in a DiscoveryResponse.
func readResponse(message []byte) (version, nonce string, err error) {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return "", "", protowire.ParseError(n)
		}
		message = message[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, kind, message); n < 0 {
				return "", "", protowire.ParseError(n)
			}
			message = message[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(message)
		if n < 0 {
			return "", "", protowire.ParseError(n)
		}
		message = message[n:]
		switch number {
		case 1:
			version = string(value)
		case 5:
			nonce = string(value)
		}
	}
	if nonce == "" {
		return "", "", errors.New("a response has no nonce")
	}
	return version, nonce, nil
}
