package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/gob"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"strconv"
	"sync"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	transport "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"kedge/test/bench/envoys"
)

// bareSDSVerb is the argument that makes this program a bare server of streams.
const bareSDSVerb = "bare-sds"

// bareSDSOrder is read from standard input.
type bareSDSOrder struct {
	Certificate envoys.Identity // of the server
	ClientCAs   []byte          // PEM
	Root        []byte          // PEM; it is sent as often as there are to be roots
	Address     string          // the file that gets its address
}

// bareServer is the least that a server of streams can be: grpc-go with mTLS and the buffers of Kedge's port, which sends one prepared message to each stream and waits for the answer.
// It decides nothing, remembers nothing and records nothing.
type bareServer struct {
	root []byte

	mu      sync.Mutex
	message []byte
	changed chan struct{} // closed when there is another message
}

func playBareSDS() error {
	debug.SetGCPercent(200) // as Kedge has it
	var order bareSDSOrder
	if err := gob.NewDecoder(os.Stdin).Decode(&order); err != nil {
		return err
	}
	key, err := x509.ParsePKCS8PrivateKey(order.Certificate.Key)
	if err != nil {
		return err
	}
	clients := x509.NewCertPool()
	if !clients.AppendCertsFromPEM(order.ClientCAs) {
		return errors.New("no CA for clients")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	memory := envoys.NewMemory(l)
	b := &bareServer{root: order.Root}
	b.push(1)
	if err := (&envoys.Player{Dial: func(i int) (net.Conn, error) { return memory.Dial(envoys.Address(i)) }, Push: b.push}).Listen(); err != nil {
		return err
	}
	server := grpc.NewServer(grpc.ForceServerCodecV2(prepared{}), grpc.ReadBufferSize(4<<10), grpc.StaticStreamWindowSize(64<<10), grpc.StaticConnWindowSize(64<<10),
		grpc.Creds(credentials.NewTLS(&tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients,
			Certificates: []tls.Certificate{{Certificate: order.Certificate.Chain, PrivateKey: key}}})),
		grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error { return b.serve(stream) }))
	if err := os.WriteFile(order.Address, []byte(l.Addr().String()), 0o600); err != nil {
		return err
	}
	return server.Serve(memory)
}

// push makes the message with so many roots, for everybody.
func (b *bareServer) push(roots int) {
	var anchors []byte
	for range roots {
		anchors = append(anchors, b.root...)
	}
	secret := must(anypb.New(&transport.Secret{Name: envoys.Secret, Type: &transport.Secret_ValidationContext{ValidationContext: &transport.CertificateValidationContext{
		TrustedCa: &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: anchors}}}}}))
	message := must(proto.Marshal(&discovery.DiscoveryResponse{VersionInfo: strconv.Itoa(roots), Nonce: strconv.Itoa(roots), TypeUrl: envoys.SecretType, Resources: []*anypb.Any{secret}}))
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.changed != nil {
		close(b.changed)
	}
	b.message, b.changed = message, make(chan struct{})
}

func (b *bareServer) serve(stream grpc.ServerStream) error {
	var request []byte
	if err := stream.RecvMsg(&request); err != nil {
		return err
	}
	for {
		b.mu.Lock()
		message, changed := b.message, b.changed
		b.mu.Unlock()
		if err := stream.SendMsg(message); err != nil {
			return err
		}
		if err := stream.RecvMsg(&request); err != nil { // the acknowledgement
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// prepared is a codec for messages that are octets already.
type prepared struct{}

func (prepared) Name() string { return "proto" }

func (prepared) Marshal(v any) (mem.BufferSlice, error) {
	message, ok := v.([]byte)
	if !ok {
		return nil, fmt.Errorf("a message of the type %T", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(message)}, nil
}

// Unmarshal looks at nothing.
func (prepared) Unmarshal(mem.BufferSlice, any) error { return nil }
