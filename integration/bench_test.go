package integration_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/codes"
)

// releaseBuild builds the daemons as they ship, without the race detector.
func releaseBuild(b *testing.B) string {
	b.Helper()
	dir := b.TempDir()
	for name, pkg := range map[string]string{"signet-ca": "ca", "signet-agent": "agent"} {
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, name), "../cmd/"+pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
	}
	return dir
}

const benchPolicy = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: default}
spec:
  rules:
  - from: [{source: {principals: ["cluster.local/ns/default/sa/client"]}}]
    to: [{operation: {methods: ["GET"], paths: ["/api/*"]}}]
`

// BenchmarkDaemons measures the daemons as processes: time to a proxy's first
// secret, checks a second over the socket, and memory.
func BenchmarkDaemons(b *testing.B) {
	bin := releaseBuild(b)
	const workloads = 2000
	s := newStandalone(b, bin, workloads, benchPolicy)
	conn := s.dial()
	rss := func(program string) float64 {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.procs[program].cmd.Process.Pid))
		if err != nil {
			b.Fatal(err)
		}
		_, after, _ := strings.Cut(string(text), "VmRSS:")
		kb, err := strconv.Atoi(strings.Fields(after)[0])
		if err != nil {
			b.Fatal(err)
		}
		return float64(kb) / 1024
	}
	next := 0
	// Each identity is new: key, issuance with its fsync, verification, push.
	b.Run("first-secret", func(b *testing.B) {
		var worst time.Duration
		for range b.N {
			ctx, cancel := context.WithTimeout(s.as(b.Context(), next%workloads), 20*time.Second)
			next++
			start := time.Now()
			if _, err := fetch(ctx, conn, "default"); err != nil {
				b.Fatal(err)
			}
			worst = max(worst, time.Since(start))
			cancel()
		}
		b.ReportMetric(float64(b.Elapsed().Microseconds())/1000/float64(b.N), "ms/secret")
		b.ReportMetric(float64(worst.Microseconds())/1000, "ms-worst")
	})
	for _, inFlight := range []int{1, 64} {
		b.Run(fmt.Sprintf("check-over-socket/in-flight=%d", inFlight), func(b *testing.B) {
			client := authv3.NewAuthorizationClient(conn)
			ctx := s.as(b.Context(), 0)
			req := checkRequest()
			var wg sync.WaitGroup
			work := make(chan struct{}, inFlight)
			b.ResetTimer()
			for range inFlight {
				wg.Go(func() {
					for range work {
						if r, err := client.Check(ctx, req); err != nil || r.GetStatus().GetCode() != int32(codes.OK) {
							b.Errorf("%v, %v", r, err)
							return
						}
					}
				})
			}
			for range b.N {
				work <- struct{}{}
			}
			close(work)
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "checks/s")
		})
	}
	b.Run("memory", func(b *testing.B) {
		for range b.N {
			b.ReportMetric(rss("signet-ca"), "MB-RSS-ca")
			b.ReportMetric(rss("signet-agent"), "MB-RSS-agent")
		}
	})
}

// checkRequest is what an Envoy sends for a small request, without the peer's
// certificate.
func checkRequest() *authv3.CheckRequest {
	address := func(ip string, port uint32) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
	}
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source:      &authv3.AttributeContext_Peer{Address: address("127.0.0.1", 40000), Principal: "spiffe://cluster.local/ns/default/sa/client"},
		Destination: &authv3.AttributeContext_Peer{Address: address("127.0.0.1", 8443), Principal: "spiffe://cluster.local/ns/default/sa/w0"},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{Method: "GET", Path: "/api/items?x=1", Host: "w0", Scheme: "https", Protocol: "HTTP/1.1",
			Headers: map[string]string{":authority": "w0", ":method": "GET", ":path": "/api/items?x=1", "user-agent": "bench/1.0", "accept": "*/*", "x-request-id": "1f0e2d3c-0000-4000-8000-000000000000"}}},
	}}
}
