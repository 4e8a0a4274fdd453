package sds_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"

	"github.com/signet-mesh/signet/sds"
)

// rotate gives each of n pods a new SVID.
func (f *fixture) rotate(pods int) {
	m := map[string]*x509svid.SVID{}
	for i := range pods {
		pod := fmt.Sprintf("pod-%d", i)
		m[pod] = f.ca.svid(workload(pod), time.Hour)
	}
	f.svids.set(m)
}

// openOne opens the stream of one secret, as Envoy does for each.
func openOne(t testing.TB, n *node, pod, name string) grpc.BidiStreamingClient[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse] {
	t.Helper()
	ctx, cancel := context.WithCancel(as(t.Context(), pod))
	t.Cleanup(cancel)
	st, err := n.client().StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{name}}); err != nil {
		t.Fatal(err)
	}
	return st
}

func TestEachOfAThousandStreamsGetsARotationOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		streams, pods := 1000, 20
		if testing.Short() {
			streams = 200
		}
		f := newFixture(t)
		f.rotate(pods)
		f.trust.Store(f.ca.trust(1))
		n := startNode(t, f.secrets)
		in := make([]*inbox[discoveryv3.DiscoveryResponse], streams)
		for i := range in {
			in[i] = receive(openOne(t, n, fmt.Sprintf("pod-%d", i%pods), []string{"default", "ROOTCA"}[i/pods%2]))
		}
		// count is how many streams of each kind got a response, which must be of the pod's own.
		count := func() (svids, bundles int) {
			t.Helper()
			synctest.Wait()
			for i, c := range in {
				r := c.take()
				if r == nil {
					continue
				}
				s := unpack(t, r.GetResources()[0])
				if cert := s.GetTlsCertificate(); cert != nil {
					got, err := x509svid.Parse(cert.GetCertificateChain().GetInlineBytes(), cert.GetPrivateKey().GetInlineBytes())
					if want, _ := workload(fmt.Sprintf("pod-%d", i%pods)).ID(td); err != nil || got.ID != want {
						t.Fatalf("stream of %s got an SVID of %v, %v", want, got.ID, err)
					}
					svids++
				} else {
					bundles++
				}
				if c.take() != nil {
					t.Fatalf("stream %d got more than one response", i)
				}
			}
			return svids, bundles
		}
		if s, b := count(); s != streams/2 || b != streams/2 {
			t.Fatalf("at first %d SVIDs and %d bundles", s, b)
		}
		f.rotate(pods)
		if s, b := count(); s != streams/2 || b != 0 {
			t.Errorf("a rotation of SVIDs pushed %d SVIDs and %d bundles", s, b)
		}
		f.trust.Store(newAuthority(t).trust(2))
		if s, b := count(); s != 0 || b != streams/2 {
			t.Errorf("a rotation of the root pushed %d SVIDs and %d bundles", s, b)
		}
		if got := n.metric(t, "signet_sds_open_streams"); got != float64(streams) {
			t.Errorf("%v streams open", got)
		}
	})
}

// BenchmarkPush is one change that goes to all streams, until the last has it.
func BenchmarkPush(b *testing.B) {
	for _, streams := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			f := newFixture(b)
			f.rotate(1)
			n := startNode(b, f.secrets)
			got := make(chan error, streams)
			for range streams {
				st := openOne(b, n, "pod-0", "default")
				go func() {
					for {
						// No acknowledgment: a stream is read at a limited rate.
						_, err := st.Recv()
						got <- err
						if err != nil {
							return
						}
					}
				}()
			}
			all := func() {
				for range streams {
					if err := <-got; err != nil {
						b.Fatal(err)
					}
				}
			}
			all()
			ab := [2]*x509svid.SVID{f.ca.svid(workload("pod-0"), time.Hour), f.ca.svid(workload("pod-0"), time.Hour)}
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				f.svids.set(map[string]*x509svid.SVID{"pod-0": ab[i%2]})
				all()
			}
			b.StopTimer()
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(streams), "ns/stream")
		})
	}
}

// BenchmarkFirstSecret is the time from opening a stream to its first secret.
func BenchmarkFirstSecret(b *testing.B) {
	f := newFixture(b)
	f.rotate(1)
	n := startNode(b, f.secrets)
	b.ReportAllocs()
	for b.Loop() {
		ctx, cancel := context.WithCancel(as(b.Context(), "pod-0"))
		st, err := n.client().StreamSecrets(ctx)
		if err == nil {
			err = st.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})
		}
		if err == nil {
			_, err = st.Recv()
		}
		if err != nil {
			b.Fatal(err)
		}
		cancel()
	}
}

// BenchmarkResources is what a push costs before it is on the wire.
func BenchmarkResources(b *testing.B) {
	f := newFixture(b)
	f.rotate(1)
	f.trust.Store(f.ca.trust(1))
	for _, name := range []string{"default", "ROOTCA"} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := f.secrets.Resources(b.Context(), workload("pod-0"), sds.SecretType, []string{name}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
