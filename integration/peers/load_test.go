package peers

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// load asks a server over one connection, as a proxy's worker does: HTTP/2 frames by
// hand, so that it takes a small part of what the servers take.
type load struct {
	conn   net.Conn
	w      *bufio.Writer
	framer *http2.Framer
	enc    *hpack.Encoder
	block  bytes.Buffer
	dec    *hpack.Decoder
	fields [][2]string
	window int // what the server lets this send
	next   uint32
	sent   map[uint32]ask
	unread int // data that the server was not told of
}

// ask is a request that has no answer yet.
type ask struct {
	at      time.Time
	message int
	denied  bool
	status  string
}

func dial(socket, token string) (*load, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	l := &load{conn: conn, w: bufio.NewWriterSize(conn, 64<<10), next: 1, window: 65535, sent: make(map[uint32]ask)}
	l.framer = http2.NewFramer(l.w, bufio.NewReaderSize(conn, 64<<10))
	l.framer.SetReuseFrames()
	l.enc = hpack.NewEncoder(&l.block)
	l.dec = hpack.NewDecoder(4096, nil)
	l.fields = [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/envoy.service.auth.v3.Authorization/Check"}, {":authority", "agent"},
		{"te", "trailers"}, {"content-type", "application/grpc"}, {"grpc-timeout", "3000m"}, {"x-envoy-internal", "true"}}
	if token != "" {
		l.fields = append(l.fields, [2]string{"authorization", "Bearer " + token})
	}
	l.w.WriteString(http2.ClientPreface)
	l.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	l.framer.WriteWindowUpdate(0, 1<<28)
	return l, l.w.Flush()
}

func (l *load) close() { l.conn.Close() }

// send asks; it does not flush.
func (l *load) send(n int, message []byte) error {
	l.block.Reset()
	for _, f := range l.fields {
		l.enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
	}
	id := l.next
	l.next += 2
	if err := l.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: l.block.Bytes(), EndHeaders: true}); err != nil {
		return err
	}
	data := make([]byte, 5, 5+len(message))
	binary.BigEndian.PutUint32(data[1:], uint32(len(message)))
	data = append(data, message...)
	for l.window < len(data) {
		if err := l.w.Flush(); err != nil {
			return err
		}
		if _, _, err := l.read(); err != nil {
			return err
		}
	}
	l.window -= len(data)
	l.sent[id] = ask{at: time.Now(), message: n}
	return l.framer.WriteData(id, true, data)
}

// read reads a frame. done is set if it was the last of an answer.
func (l *load) read() (a ask, done bool, err error) {
	f, err := l.framer.ReadFrame()
	if err != nil {
		return a, false, err
	}
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if !f.IsAck() {
			l.framer.WriteSettingsAck()
			err = l.w.Flush()
		}
	case *http2.PingFrame:
		if !f.IsAck() {
			l.framer.WritePing(true, f.Data)
			err = l.w.Flush()
		}
	case *http2.WindowUpdateFrame:
		if f.StreamID == 0 {
			l.window += int(f.Increment)
		}
	case *http2.DataFrame:
		a := l.sent[f.StreamID]
		// A denial has its code in the status: 0x0a, its length, 0x08, the code.
		d := f.Data()
		a.denied = len(d) > 7 && d[5] == 0x0a && d[6] > 1 && d[7] == 0x08
		l.sent[f.StreamID] = a
	case *http2.HeadersFrame:
		status := ""
		l.dec.SetEmitFunc(func(h hpack.HeaderField) {
			if h.Name == "grpc-status" {
				status = h.Value
			}
		})
		if _, err := l.dec.Write(f.HeaderBlockFragment()); err != nil {
			return a, false, err
		}
		if !f.StreamEnded() {
			return a, false, nil
		}
		a, done = l.sent[f.StreamID], true
		delete(l.sent, f.StreamID)
		if a.status = status; status != "0" {
			err = fmt.Errorf("a check failed with gRPC status %q", status)
		}
	case *http2.RSTStreamFrame:
		err = fmt.Errorf("a check was reset: %s", f.ErrCode)
	case *http2.GoAwayFrame:
		err = errors.New("the server goes away")
	}
	return a, done, err
}

// run asks n times with so many in flight, the messages in turn, and returns how long
// each answer took. denied says which messages have to be denied; nil: nobody looks.
func (l *load) run(n, inFlight int, messages [][]byte, denied []bool) (took []time.Duration, err error) {
	took = make([]time.Duration, 0, n)
	sent := 0
	for len(took) < n {
		for sent < n && len(l.sent) < inFlight {
			if err := l.send(sent%len(messages), messages[sent%len(messages)]); err != nil {
				return nil, err
			}
			sent++
		}
		if err := l.w.Flush(); err != nil {
			return nil, err
		}
		// All that has come, before more is sent.
		for {
			a, done, err := l.read()
			if err != nil {
				return nil, err
			}
			if done {
				if denied != nil && a.denied != denied[a.message] {
					return nil, fmt.Errorf("message %d: denied %v", a.message, a.denied)
				}
				took = append(took, time.Since(a.at))
				break
			}
		}
	}
	return took, nil
}

// quantile is that of some durations, which it sorts.
func quantile(d []time.Duration, q float64) time.Duration {
	slices.Sort(d)
	return d[min(len(d)-1, int(q*float64(len(d))))]
}
