package source_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"

	"k8s.io/client-go/rest"

	"github.com/signet-mesh/signet/authz/source"
)

// BenchmarkClusterChange is one policy of 10,000 that changes: from the API server's
// event until the snapshot with it is in force; and what 10,000 policies hold.
func BenchmarkClusterChange(b *testing.B) {
	const policies = 10_000
	object := func(i, version int) string {
		return fmt.Sprintf(`{"kind":"AuthorizationPolicy","apiVersion":"security.istio.io/v1","metadata":{"name":"p-%d","namespace":"ns-%d","resourceVersion":"%d","uid":"u","generation":1,"creationTimestamp":"2026-01-01T00:00:00Z","managedFields":[{"manager":"kubectl","operation":"Update","fieldsV1":{"f:spec":{"f:rules":{}}}}]},`+
			`"spec":{"selector":{"matchLabels":{"app":"a-%d"}},"rules":[{"from":[{"source":{"principals":["cluster.local/ns/ns-%d/sa/a"]}}],"to":[{"operation":{"methods":["GET"],"paths":["/v%d/*"]}}]}]}}`,
			i, i%100, version, i, i%100, version)
	}
	events := make(chan string)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		ours := strings.HasSuffix(r.URL.Path, "/authorizationpolicies")
		switch {
		case r.URL.Query().Get("watch") != "":
			w.(http.Flusher).Flush()
			for {
				var event string
				if ours {
					select {
					case event = <-events:
					case <-r.Context().Done():
						return
					}
				} else {
					<-r.Context().Done()
					return
				}
				fmt.Fprintln(w, event)
				w.(http.Flusher).Flush()
			}
		case strings.HasSuffix(r.URL.Path, "/v1"):
			fmt.Fprint(w, `{"kind":"APIResourceList","resources":[{"name":"authorizationpolicies","verbs":["create"]},{"name":"peerauthentications","verbs":["create"]},{"name":"requestauthentications","verbs":["create"]}]}`)
		default:
			fmt.Fprint(w, `{"kind":"List","apiVersion":"security.istio.io/v1","metadata":{"resourceVersion":"1"},"items":[`)
			for i := range policies {
				if ours {
					if i > 0 {
						fmt.Fprint(w, ",")
					}
					fmt.Fprint(w, object(i, 1))
				}
			}
			fmt.Fprint(w, `]}`)
		}
	}))
	defer server.Close()
	defer server.CloseClientConnections()
	heap := func() float64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	before := heap()
	c, err := source.NewCluster(source.ClusterConfig{REST: &rest.Config{Host: server.URL, QPS: -1}})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	defer func() { cancel(); <-done }()
	for c.Generation() == 0 || c.Ready() != nil {
		runtime.Gosched()
	}
	held := (heap() - before) / 1e6
	version := 1
	for b.Loop() {
		version++
		changed := c.Changed()
		events <- fmt.Sprintf(`{"type":"MODIFIED","object":%s}`, object(version%policies, version))
		<-changed
	}
	b.ReportMetric(held, "MB/10k-policies")
}
