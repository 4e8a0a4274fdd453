package peers

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/identity"
)

// checks are the questions as an Envoy sends them, and which must be denied.
func checks(tb testing.TB, policies int) (messages [][]byte, denied []bool) {
	tb.Helper()
	address := func(ip string, port uint32) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
	}
	qs := questions(policies)
	for _, name := range []string{"hit", "hit", "hit", "miss", "hit", "hit", "hit", "unknown"} {
		q := qs[name]
		b, err := proto.Marshal(&authv3.CheckRequest{Attributes: &authv3.AttributeContext{
			Source:      &authv3.AttributeContext_Peer{Address: address("10.0.0.1", 40000), Principal: "spiffe://" + q.principal},
			Destination: &authv3.AttributeContext_Peer{Address: address("10.0.0.2", 8443), Principal: "spiffe://cluster.local/ns/default/sa/things"},
			Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{Id: "1234567890", Method: "POST", Path: q.path, Host: "things:8080", Scheme: "https", Protocol: "HTTP/1.1",
				Headers: map[string]string{":authority": "things:8080", ":method": "POST", ":path": q.path, ":scheme": "https", "user-agent": "bench/1.0", "accept": "*/*", "content-type": "application/json",
					"content-length": "2", "x-request-id": "1f0e2d3c-0000-4000-8000-000000000000", "x-forwarded-proto": "https", "x-b3-traceid": "463ac35c9f6413ad48485a3953bb6124", "x-b3-spanid": "a2fb4a1d1a96d312"}}},
		}})
		if err != nil {
			tb.Fatal(err)
		}
		messages, denied = append(messages, b), append(denied, !q.allowed)
	}
	return messages, denied
}

// checkPolicies is how many policies there are.
const checkPolicies = 100

// decides says whether a server decides, or says yes to everything.
func decides(name string) bool { return name != "raw" && name != "raw-plain" && name != "generated" }

// TestServersAgree keeps the benchmarks honest: each server answers each question, and
// those that decide decide alike, under changes of policies too.
func TestServersAgree(t *testing.T) {
	messages, denied := checks(t, checkPolicies)
	for name := range servers {
		t.Run(name, func(t *testing.T) {
			p := startServer(t, name, checkPolicies)
			l, err := dial(p.socket, p.token)
			if err != nil {
				t.Fatal(err)
			}
			defer l.close()
			want := denied
			if !decides(name) {
				want = make([]bool, len(messages))
			}
			for _, weather := range []string{"calm", "storm"} {
				p.say(t, weather)
				if _, err := l.run(500, 20, messages, want); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// serverOrder is the order in which the servers are measured.
var serverOrder = []string{"signet", "raw", "raw-plain", "generated", "opa-direct", "opa"}

// BenchmarkChecks measures servers over a Unix socket: 64 checks in flight, where
// "cpu-ns/op" is the processor time of the server for a check, so that checks a second
// of one core are 10⁹ of it, whatever else the machine does; and one in flight.
func BenchmarkChecks(b *testing.B) {
	for _, name := range serverOrder {
		for _, inFlight := range []int{64, 1} {
			b.Run(fmt.Sprintf("engine=%s/in-flight=%d", name, inFlight), func(b *testing.B) {
				messages, denied := checks(b, checkPolicies)
				if !decides(name) {
					denied = nil
				}
				p := startServer(b, name, checkPolicies)
				l, err := dial(p.socket, p.token)
				if err != nil {
					b.Fatal(err)
				}
				defer l.close()
				if _, err := l.run(2000, inFlight, messages, denied); err != nil {
					b.Fatal(err)
				}
				before := p.processor(b)
				b.ResetTimer()
				took, err := l.run(b.N, inFlight, messages, denied)
				b.StopTimer()
				if err != nil {
					b.Fatal(err)
				}
				used := p.processor(b) - before
				b.ReportMetric(float64(used.Nanoseconds())/float64(b.N), "cpu-ns/op")
				b.ReportMetric(float64(b.N)/used.Seconds(), "checks/core-s")
				b.ReportMetric(float64(quantile(took, 0.5).Nanoseconds())/1e3, "p50-us")
				b.ReportMetric(float64(quantile(took, 0.99).Nanoseconds())/1e3, "p99-us")
			})
		}
	}
}

// BenchmarkCheckStorm measures Signet's server with eight checks in flight while one of
// its policies changes a hundred times a second, beside the same without.
func BenchmarkCheckStorm(b *testing.B) {
	for _, policies := range []int{100, 1000} {
		for _, weather := range []string{"calm", "storm"} {
			b.Run(fmt.Sprintf("policies=%d/%s", policies, weather), func(b *testing.B) {
				messages, denied := checks(b, policies)
				p := startServer(b, "signet", policies)
				l, err := dial(p.socket, p.token)
				if err != nil {
					b.Fatal(err)
				}
				defer l.close()
				p.say(b, weather)
				if _, err := l.run(2000, 8, messages, denied); err != nil {
					b.Fatal(err)
				}
				b.ResetTimer()
				took, err := l.run(b.N, 8, messages, denied)
				b.StopTimer()
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(quantile(took, 0.5).Nanoseconds())/1e3, "p50-us")
				b.ReportMetric(float64(quantile(took, 0.99).Nanoseconds())/1e3, "p99-us")
			})
		}
	}
}

// BenchmarkCheckInProcess measures Signet's part of a check alone: a message in bytes
// in, an answer in bytes out.
func BenchmarkCheckInProcess(b *testing.B) {
	messages, denied := checks(b, checkPolicies)
	var text []byte
	for i := range checkPolicies {
		text = append(text, policyText(i, 0)...)
	}
	resources, _ := authz.Parse("p.yaml", text)
	set, _ := authz.Set{}.Update(resources)
	snapshot, _ := authz.Compile(set, authz.Options{})
	var current atomic.Pointer[authz.Snapshot]
	current.Store(snapshot)
	s, err := extauthz.New(extauthz.Config{Snapshot: current.Load})
	if err != nil {
		b.Fatal(err)
	}
	ctx := identity.WithCaller(context.Background(), identity.Caller{Workload: identity.Workload{Namespace: "default", PodUID: "u",
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2")}}, Until: time.Now().Add(time.Hour)})
	for _, name := range []string{"allow", "deny"} {
		b.Run(name, func(b *testing.B) {
			m := messages[slices.Index(denied, name == "deny")]
			if _, err := s.Answer(ctx, m); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Answer(ctx, m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
