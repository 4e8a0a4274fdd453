package integration_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/integration/kubetest"

	"golang.org/x/sync/errgroup"
	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// BenchmarkAuthorityAtScale has 500 agents and 5,000 pods on a real API server: how
// many watches that costs it, what the authority's memory is, and how long after
// its creation a new pod has its first SVID, through an agent that learns of the
// pod on WatchNode and asks for it.
func BenchmarkAuthorityAtScale(b *testing.B) {
	const nodes, perNode = 500, 10
	c := kubetest.Start(b, kubetest.Options{})
	bin := releaseBuild(b)
	// All of them have one address here, and connect at once.
	k := newKubeCA(b, bin, c, "limits: {handshakesPerAddress: 1024}\n")
	roots := k.roots()
	empty := k.rss(b)

	for _, account := range []string{"web", "db"} {
		c.ServiceAccount(b, "shop", account)
	}
	agents := make([]*simAgent, nodes)
	began := time.Now()
	g := &errgroup.Group{}
	g.SetLimit(8)
	for i := range nodes {
		g.Go(func() error {
			node := fmt.Sprintf("node-%03d", i)
			c.Node(b, node)
			agents[i], _ = k.agent(roots, node)
			for j := range perNode - 1 {
				c.Pod(b, kubetest.PodSpec{Namespace: "shop", ServiceAccount: []string{"web", "db"}[j%2], Node: node, Name: fmt.Sprintf("p-%03d-%d", i, j),
					Labels: map[string]string{"app": "web", "version": "v1", "pod-template-hash": "5d4f8c9b7d"}, IP: fmt.Sprintf("10.%d.%d.%d", i/250, i%250, j+2)})
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	b.Logf("%d nodes with %d pods each after %v", nodes, perNode, time.Since(began).Round(time.Second))

	// Each agent follows its node, and asks for what is new.
	arrived := &arrivals{at: map[string]time.Time{}}
	ctx, stop := context.WithCancel(b.Context())
	var watching sync.WaitGroup
	var ready sync.WaitGroup
	ready.Add(nodes)
	for _, a := range agents {
		watching.Go(func() { arrived.follow(ctx, b, a, ready.Done) })
	}
	ready.Wait()

	watches := func(group, resource string) (n float64) {
		text, err := c.Kube.CoreV1().RESTClient().Get().AbsPath("/metrics").DoRaw(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "apiserver_longrunning_requests{") && strings.Contains(line, `resource="`+resource+`"`) && strings.Contains(line, `verb="WATCH"`) && strings.Contains(line, `group="`+group+`"`) {
				f := strings.Fields(line)
				v, err := strconv.ParseFloat(f[len(f)-1], 64)
				if err != nil {
					b.Fatal(err)
				}
				n += v
			}
		}
		return n
	}
	// The API server watches itself, so it is compared with how it is without us.
	for b.Loop() {
		var pods []*core.Pod
		for i := range 200 {
			at := time.Now()
			pod, err := c.Kube.CoreV1().Pods("shop").Create(b.Context(), &core.Pod{
				ObjectMeta: metav1.ObjectMeta{GenerateName: "new-", Labels: map[string]string{"app": "new"}},
				Spec: core.PodSpec{ServiceAccountName: "web", NodeName: fmt.Sprintf("node-%03d", i*7%nodes),
					Containers: []core.Container{{Name: "app", Image: "app"}}},
			}, metav1.CreateOptions{})
			if err != nil {
				b.Fatal(err)
			}
			arrived.created(string(pod.UID), at)
			pods = append(pods, pod)
		}
		kubetest.Poll(b, "all new pods' SVIDs", func() error {
			if n := arrived.waiting(); n > 0 {
				return fmt.Errorf("%d are missing", n)
			}
			return nil
		})
		for _, p := range pods {
			c.DeletePod(b, p)
		}
	}
	with := map[string]float64{}
	for _, r := range []string{"pods", "nodes", "serviceaccounts"} {
		with[r] = watches("", r)
	}
	for _, r := range []string{"authorizationpolicies", "peerauthentications", "requestauthentications"} {
		with["policies"] += watches("security.istio.io", r)
	}
	took := arrived.took()
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms-first-svid-p50")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "ms-first-svid-p99")
	b.ReportMetric(k.rss(b), "MiB-authority")
	b.ReportMetric(empty, "MiB-authority-empty")
	stop()
	watching.Wait()
	k.stop("signet-ca", syscall.SIGTERM)
	kubetest.Poll(b, "the authority's watches to end", func() error {
		for _, r := range []string{"pods", "nodes", "serviceaccounts"} {
			if watches("", r) >= with[r] {
				return errors.New("they are still there")
			}
		}
		return nil
	})
	for _, r := range []string{"pods", "nodes", "serviceaccounts"} {
		b.ReportMetric(with[r]-watches("", r), "watches-"+r)
	}
	left := 0.0
	for _, r := range []string{"authorizationpolicies", "peerauthentications", "requestauthentications"} {
		left += watches("security.istio.io", r)
	}
	b.ReportMetric(with["policies"]-left, "watches-policies-of-the-elected-replica")
}

// arrivals is when pods were created and when they had their first SVID.
type arrivals struct {
	mu   sync.Mutex
	at   map[string]time.Time // created and waiting; guarded by mu
	done map[string]time.Time // has an SVID; guarded by mu
	all  []time.Duration      // guarded by mu
}

func (a *arrivals) created(uid string, at time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if got, ok := a.done[uid]; ok { // sooner than the answer to its creation
		a.all = append(a.all, got.Sub(at))
		return
	}
	a.at[uid] = at
}

func (a *arrivals) issued(uid string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	if at, ok := a.at[uid]; ok {
		a.all = append(a.all, now.Sub(at))
		delete(a.at, uid)
		return
	}
	if a.done == nil {
		a.done = map[string]time.Time{}
	}
	a.done[uid] = now
}

func (a *arrivals) waiting() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.at)
}

func (a *arrivals) took() []time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	slices.Sort(a.all)
	return a.all
}

// follow asks for an SVID of each pod that WatchNode tells of, on one stream.
func (a *arrivals) follow(ctx context.Context, b *testing.B, agent *simAgent, ready func()) {
	ready = sync.OnceFunc(ready)
	defer ready()
	s, err := agent.WatchNode(ctx, &capb.WatchNodeRequest{})
	if err != nil {
		b.Error(err)
		return
	}
	issue, err := agent.Issue(ctx)
	if err != nil {
		b.Error(err)
		return
	}
	for id := uint64(1); ; id++ {
		m, err := s.Recv()
		if err != nil {
			if ctx.Err() == nil {
				b.Error(err)
			}
			return
		}
		if len(m.GetPods()) == 0 {
			continue
		}
		req := &capb.IssueRequest{Id: id}
		for _, p := range m.GetPods() {
			item := byPodUID(p.GetUid())
			_, item.PublicKey = newSPKI(b)
			req.Items = append(req.Items, item)
		}
		if err := issue.Send(req); err != nil {
			b.Error(err)
			return
		}
		resp, err := issue.Recv()
		if err != nil {
			if ctx.Err() == nil {
				b.Error(err)
			}
			return
		}
		for i, r := range resp.GetResults() {
			if r.GetX509() != nil {
				a.issued(m.GetPods()[i].GetUid())
			}
		}
		ready()
	}
}

// rss is the authority's memory in MiB.
func (k *kubeCA) rss(b *testing.B) float64 {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", k.procs["signet-ca"].cmd.Process.Pid))
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
