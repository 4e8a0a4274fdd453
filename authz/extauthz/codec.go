package extauthz

import (
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// Codec is what a gRPC server must be made with (grpc.ForceServerCodecV2) that this
// service is registered at: it hands the bytes of a check to the service as they
// are, and treats the messages of every other method as gRPC does by itself.
// Without it every check fails.
func Codec() encoding.CodecV2 { return codec{encoding.GetCodecV2(protocodec.Name)} }

// codec is the one of generated messages, but for the two types of a check.
type codec struct{ encoding.CodecV2 }

// message is the bytes of a CheckRequest, valid until free.
type message struct{ buffer mem.Buffer }

func (m *message) bytes() []byte {
	if m.buffer == nil {
		return nil
	}
	return m.buffer.ReadOnlyData()
}

func (m *message) free() {
	if m.buffer != nil {
		m.buffer.Free()
		m.buffer = nil
	}
}

// answer is the bytes of a CheckResponse, never changed once made: checks share it.
type answer struct {
	bytes   []byte
	buffers mem.BufferSlice
}

func newAnswer(b []byte) *answer {
	return &answer{bytes: b, buffers: mem.BufferSlice{mem.SliceBuffer(b)}}
}

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(*message)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	m.free()
	m.buffer = data.MaterializeToBuffer(mem.DefaultBufferPool())
	return nil
}

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if a, ok := v.(*answer); ok {
		return a.buffers, nil
	}
	return c.CodecV2.Marshal(v)
}
