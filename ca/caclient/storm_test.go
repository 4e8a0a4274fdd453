package caclient_test

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
	"github.com/signet-mesh/signet/identity/holder"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/test/bufconn"
)

var storm = flag.Int("storm", 100, "how many agents come back at once in TestStorm")

// TestStorm: after an outage in which everything expired, all agents come back at one
// moment, each with twenty identities and nothing else than its token. Every one gets
// all, and the authority certifies nothing in vain. -storm 10000 is the full size.
func TestStorm(t *testing.T) {
	const identities = 20
	n := *storm
	issuer := attesttest.NewIssuer(t)
	pods := &identity.Pods{}
	var all []identity.Workload
	agentOf := func(i int) identity.Workload {
		return identity.Workload{Namespace: "signet-system", ServiceAccount: "signet-agent", Pod: fmt.Sprintf("agent-%d", i), PodUID: fmt.Sprintf("uid-agent-%d", i), Node: fmt.Sprintf("node-%d", i)}
	}
	podOf := func(i, k int) identity.Workload {
		return identity.Workload{Namespace: "shop", ServiceAccount: fmt.Sprintf("sa-%d", k), Pod: fmt.Sprintf("pod-%d-%d", i, k), PodUID: fmt.Sprintf("uid-%d-%d", i, k), Node: fmt.Sprintf("node-%d", i)}
	}
	for i := range n {
		all = append(all, agentOf(i))
		for k := range identities {
			all = append(all, podOf(i, k))
		}
	}
	pods.Replace(all)
	keys, err := attest.OpenKeys(attest.KeysConfig{File: issuer.JWKSFile()})
	if err != nil {
		t.Fatal(err)
	}
	attestor := func(audience string) *attest.Attestor {
		at, err := attest.New(attest.Config{Issuer: issuer.URL(), Audience: audience, Keys: keys, Pods: pods, AnyServiceAccount: true})
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/ca", 0o700); err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewRegistry()
	a, err := ca.Open(t.Context(), ca.Config{TrustDomain: td, DataDir: dir + "/ca", Pods: pods, Agents: attestor("signet-ca"), Workloads: attestor("signet"), Metrics: registry,
		// In memory all agents have one address.
		Limits: ca.LimitsConfig{AgentRate: 100, AgentBurst: 2000, IdentityRate: 1, IdentityBurst: 60, HandshakesPerAddress: 1 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	pipe := bufconn.Listen(8 << 10) // both ways, of each connection
	server := a.NewServer()
	ctx, cancel := context.WithCancel(t.Context())
	var background sync.WaitGroup
	background.Go(func() { _ = server.Serve(pipe) })
	background.Go(func() { _ = a.Run(ctx) })
	trust, _ := a.Trust()
	write(t, filepath.Join(dir, "root.pem"), trust.PEM())

	type agent struct {
		client *caclient.Client
		holder *holder.Holder
		pods   *identity.Pods
	}
	agents := make([]agent, n)
	for i := range agents {
		token := filepath.Join(dir, fmt.Sprintf("token-%d", i))
		write(t, token, []byte(issuer.Token(agentOf(i), "signet-ca")))
		g := &agents[i]
		g.pods = &identity.Pods{}
		if g.client, err = caclient.New(caclient.Config{Addresses: []string{"authority:1"}, TrustDomain: td, Node: fmt.Sprintf("node-%d", i), RootFile: filepath.Join(dir, "root.pem"),
			TokenFile: token, Pods: g.pods, Dial: func(ctx context.Context, _ string) (net.Conn, error) { return pipe.DialContext(ctx) }}); err != nil {
			t.Fatal(err)
		}
		if g.holder, err = holder.New(holder.Config{TrustDomain: td, Issuer: g.client, Pods: g.pods, Node: fmt.Sprintf("node-%d", i),
			Trust: func() *identity.Trust { t, _ := g.client.Trust(); return t }}); err != nil {
			t.Fatal(err)
		}
	}
	took := make([]time.Duration, n)
	var running sync.WaitGroup
	start := time.Now()
	before := a.Issued()
	for i := range agents {
		g := &agents[i]
		running.Go(func() { _ = g.client.Run(ctx) })
		running.Go(func() { _ = g.holder.Run(ctx) })
	}
	var recovered sync.WaitGroup
	for i := range agents {
		g := &agents[i]
		recovered.Go(func() {
			for k := range identities {
				for {
					_, changed := g.pods.OnNode(fmt.Sprintf("node-%d", i))
					svid, news, err := g.holder.SVID(identity.Caller{Workload: podOf(i, k)})
					if err == nil && svid != nil {
						break
					}
					select {
					case <-news:
					case <-changed:
					case <-ctx.Done():
						return
					}
				}
			}
			took[i] = time.Since(start)
		})
	}
	done := make(chan struct{})
	go func() { recovered.Wait(); close(done) }()
	// How often nobody waited for the authority, and nobody could have: it was idle while
	// agents had not recovered.
	looks, idle := 0, 0
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for late := time.After(15 * time.Minute); done != nil; {
		select {
		case <-done:
			done = nil
		case <-late:
			t.Error("not all agents recovered")
			done = nil
		case <-look.C:
			if looks++; total(t, registry, "signet_ca_waiting_items") == 0 {
				idle++
			}
		}
	}
	end := time.Since(start)
	issued := a.Issued() - before
	cancel()
	running.Wait()
	server.Stop()
	pipe.Close()
	background.Wait()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	shed, refused := total(t, registry, "signet_ca_shed_total"), total(t, registry, "signet_ca_refusals_total")
	slices.Sort(took)
	needed := uint64(n * (identities + 1))
	t.Logf("%d agents with %d identities on %d processors: all recovered in %.1f s, p50 %.1f s, p99 %.1f s; %.0f certificates a second; %d were issued, %d are needed; peak RSS of authority and agents %d MiB",
		n, identities, runtime.GOMAXPROCS(0), end.Seconds(), took[n/2].Seconds(), took[n*99/100].Seconds(), float64(issued)/end.Seconds(), issued, needed, peakRSS(t)>>20)
	t.Logf("requests sent away %.0f, refusals %.0f; nothing waited for the authority in %d of %d looks", shed, refused, idle, looks)
	// Authority and agents are one process here: what an agent's two connections hold on both
	// sides, its identities and its pods, and some for everything else.
	if got, most := peakRSS(t), 512<<20+n*stormAgent; n >= 300 && got > most { // the race detector has its own memory
		t.Errorf("peak RSS is %d MiB; at most %d are allowed", got>>20, most>>20)
	}
	if took[0] == 0 {
		t.Error("an agent did not recover")
	}
	// Work is conserved: what was certified somebody waited for.
	if issued < needed || issued > needed+needed/10+10 {
		t.Errorf("%d certificates were issued; %d are needed", issued, needed)
	}
}

// stormAgent is what an agent of the storm may cost in bytes, on both sides.
const stormAgent = 5 << 18

// total is the sum of a metric over its labels.
func total(t *testing.T, r *prometheus.Registry, name string) (sum float64) {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}

// peakRSS is that of this process, in bytes.
func peakRSS(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "VmHWM:")
	line, _, _ := strings.Cut(after, "kB")
	n, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	return n << 10
}
