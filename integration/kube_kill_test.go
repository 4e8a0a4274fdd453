package integration_test

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"flag"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/integration/kubetest"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var killCA = flag.Duration("kill-ca", 8*time.Second, "how long the authority is killed again and again")

// TestAuthorityKilledUnderIssuance kills the authority at random moments while
// agents obtain one SVID after the other. After each restart: what an agent holds
// is still good without attesting again, the root is the same, the ConfigMap is
// right, and the store passes all that signet-ca verify-store looks at, and has
// every certificate that an agent was given.
func TestAuthorityKilledUnderIssuance(t *testing.T) {
	t.Parallel()
	bin := programs(t)
	c := kubetest.Start(t, kubetest.Options{})
	k := newKubeCA(t, bin, c, "")
	roots := k.roots()
	c.Node(t, "node-a")
	agent, _ := k.agent(roots, "node-a")
	var pods []*core.Pod
	for i := range 4 {
		pods = append(pods, c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "web", Node: "node-a", Name: fmt.Sprintf("web-%d", i)}))
	}
	agent.mustIssue(t, byPodUID(string(pods[3].UID)), "spiffe://cluster.local/ns/shop/sa/web")
	bundle := func() string {
		m, err := c.Kube.CoreV1().ConfigMaps("signet-system").Get(t.Context(), "signet-trust", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return m.Data["root.pem"]
	}
	root := bundle()

	// Serials that agents were given, each exactly once.
	var mu sync.Mutex
	serials := map[string]bool{}
	ctx, stop := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	for _, p := range pods {
		clients.Go(func() {
			for ctx.Err() == nil {
				for _, s := range k.burst(ctx, t, agent, p) {
					mu.Lock()
					if serials[s] {
						t.Errorf("serial %s was given twice", s)
					}
					serials[s] = true
					mu.Unlock()
				}
			}
		})
	}
	// A busy machine may not get round to the clients in that time.
	few := func() bool { mu.Lock(); defer mu.Unlock(); return len(serials) < 10 }
	kills, began := 0, time.Now()
	for time.Since(began) < *killCA || few() && time.Since(began) < *killCA+2*time.Minute {
		time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
		k.stop("signet-ca", syscall.SIGKILL)
		kills++
		k.start("signet-ca")
		kubetest.Poll(t, "SVIDs for the agent that was there before", func() error {
			_, refusal, err := agent.issue(t, byPodUID(string(pods[0].UID)))
			if err == nil && refusal != nil {
				err = fmt.Errorf("%v", refusal)
			}
			return err
		})
		if bundle() != root {
			t.Fatal("another root after the restart")
		}
	}
	stop()
	clients.Wait()
	k.stop("signet-ca", syscall.SIGTERM)
	logged := k.verified(t)
	for s := range serials {
		if !logged[s] {
			t.Errorf("serial %s was given and is not in the issuance log", s)
		}
	}
	t.Logf("%d kills in %v; %d SVIDs given, %d certificates on record", kills, time.Since(began).Round(time.Second), len(serials), len(logged))
	if len(serials) < 10 {
		t.Error("hardly anything was issued under the kills")
	}
}

// burst issues on one stream until it breaks, and returns the serials.
func (k *kubeCA) burst(ctx context.Context, t *testing.T, a *simAgent, pod *core.Pod) (serials []string) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	s, err := a.Issue(ctx)
	if err != nil {
		return nil
	}
	for id := uint64(1); ; id++ {
		item := byPodUID(string(pod.UID))
		_, item.PublicKey = newSPKI(t)
		if err := s.Send(&capb.IssueRequest{Id: id, Items: []*capb.IssueItem{item}}); err != nil {
			return serials
		}
		resp, err := s.Recv()
		if err != nil {
			return serials
		}
		if x := resp.GetResults()[0].GetX509(); x != nil {
			serials = append(serials, serialOf(t, x.GetChain()[0]))
		}
		select {
		case <-ctx.Done():
		case <-time.After(pace / 4):
		}
	}
}

// verified checks every invariant of the store that the authority left, and returns
// the serials of the certificates on record.
func (k *kubeCA) verified(t *testing.T) map[string]bool {
	t.Helper()
	f, err := ca.OpenFolder(filepath.Join(k.dir, "ca"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	v, err := f.Verify(t.Context(), nil, true)
	if err != nil || len(v.GetProblems()) > 0 {
		t.Fatalf("%v: %v", err, v.GetProblems())
	}
	serials := map[string]bool{}
	for e, err := range f.Records(t.Context(), &capb.ListLogRequest{}) {
		if err != nil {
			t.Fatal(err)
		}
		if s := e.GetRecord().GetSerial(); len(s) > 0 {
			serials[hex.EncodeToString(s)] = true
		}
	}
	return serials
}

func serialOf(t *testing.T, der []byte) string {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Error(err)
		return ""
	}
	return hex.EncodeToString(ca.Serial(c))
}
