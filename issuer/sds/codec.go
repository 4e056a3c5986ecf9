package sds

import (
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// message is a response that is marshalled already, in parts. Parts are shared between streams and never change.
type message [][]byte

// codec is gRPC's own for protocol buffers, and sends a message as it is.
type codec struct{ encoding.CodecV2 }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(message)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	buffers := make(mem.BufferSlice, len(m))
	for i, part := range m {
		buffers[i] = mem.SliceBuffer(part)
	}
	return buffers, nil
}

// ServerOption lets a gRPC server send what a Server has rendered once for many streams. It changes nothing for other services.
func ServerOption() grpc.ServerOption {
	standard := encoding.GetCodecV2(proto.Name)
	if standard == nil {
		panic(fmt.Sprintf("gRPC has no codec %q", proto.Name)) // its package registers it
	}
	return grpc.ForceServerCodecV2(codec{standard})
}
