package istio_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/istio"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	pb "istio.io/api/security/v1alpha1"
)

// rawStream opens RPCs by hand and sends no message, so that the server has to
// decide on the headers alone.
type rawStream struct {
	t    *testing.T
	conn *tls.Conn
	f    *http2.Framer
	next uint32
}

func (w *world) raw(t *testing.T) *rawStream {
	t.Helper()
	conn, err := w.pipe.DialContext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(conn, &tls.Config{RootCAs: w.roots(), ServerName: dnsName, NextProtos: []string{"h2"}})
	t.Cleanup(func() { c.Close() })
	if err := c.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	r := &rawStream{t: t, conn: c, f: http2.NewFramer(c, c), next: 1}
	r.f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := r.f.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return r
}

type buffer struct{ b []byte }

func (b *buffer) Write(p []byte) (int, error) { b.b = append(b.b, p...); return len(p), nil }

func (r *rawStream) begin(authorization string) uint32 {
	r.t.Helper()
	b := &buffer{}
	e := hpack.NewEncoder(b)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", pb.IstioCertificateService_CreateCertificate_FullMethodName},
		{":authority", dnsName}, {"content-type", "application/grpc"}, {"te", "trailers"}, {"authorization", authorization}} {
		if err := e.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			r.t.Fatal(err)
		}
	}
	id := r.next
	r.next += 2
	if err := r.f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: b.b, EndHeaders: true}); err != nil {
		r.t.Fatal(err)
	}
	return id
}

// status waits for the end of an RPC and returns its code; "" if none came in time.
func (r *rawStream) status(id uint32, within time.Duration) string {
	r.t.Helper()
	_ = r.conn.SetReadDeadline(time.Now().Add(within))
	for {
		f, err := r.f.ReadFrame()
		if err != nil {
			return ""
		}
		if h, ok := f.(*http2.MetaHeadersFrame); ok && h.StreamID == id {
			for _, v := range h.Fields {
				if v.Name == "grpc-status" {
					return v.Value
				}
			}
		}
	}
}

// TestStrangersAreRefusedOnTheirHeaders: without proof no message is waited for.
func TestStrangersAreRefusedOnTheirHeaders(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.raw(t)
	if s := r.status(r.begin("Bearer nothing"), time.Minute); s != "16" {
		t.Errorf("status %q; want 16, Unauthenticated", s)
	}
	if n := w.InFlight(); n != 0 {
		t.Errorf("%d places are taken", n)
	}
}

// TestOnePodCannotTakeAllPlaces: RPCs whose message does not come hold places, of
// one pod only so many; the others go on, and the places are given back.
func TestOnePodCannotTakeAllPlaces(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	greedy, token := w.raw(t), "Bearer "+w.issuer.Token(client, "istio-ca")
	for range istio.MaxOfPod {
		greedy.begin(token)
	}
	eventually(t, "all places of the pod are taken", func() bool { return w.InFlight() == istio.MaxOfPod })
	w.deny(t, codes.ResourceExhausted, "too many requests at once; try again later", w.token(client))
	w.allow(t, serverID, w.token(server))
	greedy.conn.Close()
	eventually(t, "the places are free", func() bool { return w.InFlight() == 0 })
	w.allow(t, "spiffe://cluster.local/ns/default/sa/client", w.token(client))
}

// TestAFewPodsCannotTakeAllPlaces, either: what one gets is less the fewer there are.
func TestAFewPodsCannotTakeAllPlaces(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for i := range istio.MaxInFlight / istio.MaxOfPod {
		pod := client
		pod.Pod, pod.PodUID = fmt.Sprintf("greedy-%d", i), fmt.Sprintf("uid-greedy-%d", i)
		w.pods.Set(pod)
		greedy, token := w.raw(t), "Bearer "+w.issuer.Token(pod, "istio-ca")
		ended := make(chan string, 1)
		go func() { ended <- greedy.status(2*istio.MaxOfPod-1, time.Minute) }() // of the last one
		had := w.InFlight()
		for range istio.MaxOfPod {
			greedy.begin(token)
		}
		// Until all have a place, or the last has none; on a slow machine the first may have
		// ended by then.
		eventually(t, "the last RPC of the pod to be read", func() bool { return len(ended) > 0 || w.InFlight() >= had+istio.MaxOfPod })
	}
	if n := w.InFlight(); n > istio.MaxInFlight*4/5 {
		t.Errorf("%d of %d places are taken", n, istio.MaxInFlight)
	}
	w.allow(t, serverID, w.token(server))
}

// TestTheProofMustHoldWhenTheMessageComes: a pod that goes in between gets
// nothing.
func TestTheProofMustHoldWhenTheMessageComes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.raw(t)
	id := r.begin("Bearer " + w.issuer.Token(client, "istio-ca"))
	eventually(t, "the RPC is admitted", func() bool { return w.InFlight() == 1 })
	w.pods.Delete(client.PodUID)
	if err := r.f.WriteData(id, true, binary.BigEndian.AppendUint32([]byte{0}, 0)); err != nil {
		t.Fatal(err)
	}
	if s := r.status(id, time.Minute); s != "16" {
		t.Errorf("status %q; want 16, Unauthenticated", s)
	}
}

// TestWithoutTheServersTap a handler has no caller and issues nothing.
func TestWithoutTheServersTap(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if _, err := w.CreateCertificate(context.Background(), &pb.IstioCertificateRequest{}); err == nil {
		t.Error("issued without a caller")
	}
}
