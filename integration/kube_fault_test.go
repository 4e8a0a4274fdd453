package integration_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/integration/kubetest"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// refusedAgent waits for an attestation to be refused for good, or fails.
func (k *kubeCA) refusedAgent(t *testing.T, roots *x509.CertPool, token string, want codes.Code) {
	t.Helper()
	kubetest.Poll(t, "the token to be refused", func() error {
		_, err := k.tryAgent(roots, token)
		if err == nil {
			t.Fatal("an agent SVID was issued")
		}
		if status.Code(err) == codes.Unavailable && want != codes.Unavailable {
			return err
		}
		if status.Code(err) != want {
			t.Fatalf("got %v, want %v", err, want)
		}
		return nil
	})
}

// refusedItem waits for an item to be refused with one of these codes.
func (a *simAgent) refusedItem(t *testing.T, item *capb.IssueItem, want ...capb.Refusal_Code) {
	t.Helper()
	kubetest.Poll(t, "the request to be refused", func() error {
		id, refusal, err := a.issue(t, item)
		if id != "" {
			return fmt.Errorf("%s was issued", id)
		}
		if err != nil {
			return err
		}
		for _, c := range want {
			if refusal.GetCode() == c {
				return nil
			}
		}
		return fmt.Errorf("refused with %v (%s), want %v", refusal.GetCode(), refusal.GetMessage(), want)
	})
}

// TestTokensThatProveNothing shows each kind of bad token, made by the API server
// itself or with its own key, as an agent's and as a workload's.
func TestTokensThatProveNothing(t *testing.T) {
	t.Parallel()
	bin := programs(t)
	c := kubetest.Start(t, kubetest.Options{})
	k := newKubeCA(t, bin, c, "")
	roots := k.roots()
	c.Node(t, "node-a")
	c.Node(t, "node-b")
	agent, agentPod := k.agent(roots, "node-a")
	web := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "web", Node: "node-a"})
	agent.mustIssue(t, byToken(c.Token(t, web, "signet", time.Hour)), "spiffe://cluster.local/ns/shop/sa/web")

	with := func(key string, value any) func(map[string]any) {
		return func(claims map[string]any) { claims[key] = value }
	}
	hour := time.Hour
	past := func(claims map[string]any) {
		claims["iat"], claims["nbf"], claims["exp"] = time.Now().Add(-2*hour).Unix(), time.Now().Add(-2*hour).Unix(), time.Now().Add(-hour).Unix()
	}
	unbound := func(claims map[string]any) { delete(claims["kubernetes.io"].(map[string]any), "pod") }
	foreign := func(alg jose.SignatureAlgorithm, key any, token string) string {
		t.Helper()
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: c.KeyID()}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
		if err != nil {
			t.Fatal(err)
		}
		var claims map[string]any
		if err := parsed.UnsafeClaimsWithoutVerification(&claims); err != nil {
			t.Fatal(err)
		}
		text, err := jwt.Signed(signer).Claims(claims).Serialize()
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	other, _ := newSPKI(t)
	for _, who := range []struct {
		name, audience, wrong string
		pod                   *core.Pod
		refused               func(t *testing.T, token string)
	}{
		{"agent", "signet-ca", "signet", agentPod, func(t *testing.T, token string) { k.refusedAgent(t, roots, token, codes.Unauthenticated) }},
		{"workload", "signet", "signet-ca", web, func(t *testing.T, token string) {
			agent.refusedItem(t, byToken(token), capb.Refusal_CODE_EVIDENCE)
		}},
	} {
		good := c.Token(t, who.pod, who.audience, hour)
		parts := strings.Split(good, ".")
		for name, token := range map[string]string{
			"expired":                    c.Sign(t, who.pod, who.audience, hour, past),
			"wrong audience":             c.Token(t, who.pod, who.wrong, hour),
			"the API server's audience":  c.Token(t, who.pod, kubetest.APIAudience, hour),
			"wrong issuer":               c.Sign(t, who.pod, who.audience, hour, with("iss", "https://other")),
			"too long-lived":             c.Sign(t, who.pod, who.audience, 48*hour, nil),
			"alg none":                   "eyJhbGciOiJub25lIn0." + parts[1] + ".",
			"alg none, with kid":         none(c.KeyID()) + "." + parts[1] + ".",
			"HMAC with the public key":   foreign(jose.HS256, c.PublicKeyPEM(), good),
			"another key, same kid":      foreign(jose.ES256, other, good),
			"a changed byte":             good[:len(good)-9] + flip(good[len(good)-9]) + good[len(good)-8:],
			"bound to no pod":            c.UnboundToken(t, who.pod.Namespace, who.pod.Spec.ServiceAccountName, who.audience, hour),
			"without a pod":              c.Sign(t, who.pod, who.audience, hour, unbound),
			"subject of another account": c.Sign(t, who.pod, who.audience, hour, with("sub", "system:serviceaccount:kube-system:default")),
			"nothing":                    "",
			"rubbish":                    "a.b.c",
		} {
			t.Run(who.name+"/"+name, func(t *testing.T) { who.refused(t, token) })
		}
	}

	t.Run("agent/allow-listed name in another namespace", func(t *testing.T) {
		p := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "signet-agent", Node: "node-a"})
		k.refusedAgent(t, roots, c.Token(t, p, "signet-ca", hour), codes.PermissionDenied)
	})
	t.Run("workload/on another node", func(t *testing.T) {
		p := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "db", Node: "node-b"})
		agent.refusedItem(t, byToken(c.Token(t, p, "signet", hour)), capb.Refusal_CODE_OTHER_NODE)
		agent.refusedItem(t, byPodUID(string(p.UID)), capb.Refusal_CODE_OTHER_NODE)
	})
	t.Run("workload/deleted pod", func(t *testing.T) {
		p := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "deleted", Node: "node-a"})
		token := c.Token(t, p, "signet", hour)
		agent.mustIssue(t, byToken(token), "spiffe://cluster.local/ns/shop/sa/deleted")
		c.DeletePod(t, p)
		agent.refusedItem(t, byToken(token), capb.Refusal_CODE_UNKNOWN_WORKLOAD)
		agent.refusedItem(t, byPodUID(string(p.UID)), capb.Refusal_CODE_UNKNOWN_WORKLOAD)
	})
	t.Run("workload/recreated pod", func(t *testing.T) {
		spec := kubetest.PodSpec{Namespace: "shop", ServiceAccount: "recreated", Node: "node-a"}
		p := c.Pod(t, spec)
		token := c.Token(t, p, "signet", hour)
		agent.mustIssue(t, byToken(token), "spiffe://cluster.local/ns/shop/sa/recreated")
		c.DeletePod(t, p)
		next := c.Pod(t, spec)
		agent.mustIssue(t, byPodUID(string(next.UID)), "spiffe://cluster.local/ns/shop/sa/recreated")
		agent.refusedItem(t, byToken(token), capb.Refusal_CODE_UNKNOWN_WORKLOAD)
		agent.refusedItem(t, byPodUID(string(p.UID)), capb.Refusal_CODE_UNKNOWN_WORKLOAD)
	})
	t.Run("workload/recreated account", func(t *testing.T) {
		p := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "replaced", Node: "node-a"})
		token := c.Token(t, p, "signet", hour)
		agent.mustIssue(t, byToken(token), "spiffe://cluster.local/ns/shop/sa/replaced")
		if err := c.Kube.CoreV1().ServiceAccounts("shop").Delete(t.Context(), "replaced", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		agent.refusedItem(t, byToken(token), capb.Refusal_CODE_UNKNOWN_WORKLOAD)
		c.ServiceAccount(t, "shop", "replaced")
		agent.mustIssue(t, byToken(c.Token(t, p, "signet", hour)), "spiffe://cluster.local/ns/shop/sa/replaced")
		agent.refusedItem(t, byToken(token), capb.Refusal_CODE_EVIDENCE)
	})
	t.Run("workload/terminating pod", func(t *testing.T) {
		p := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "leaving", Node: "node-a"})
		token := c.Token(t, p, "signet", hour)
		c.TerminatePod(t, p)
		agent.mustIssue(t, byToken(token), "spiffe://cluster.local/ns/shop/sa/leaving")
		c.DeletePod(t, p)
		agent.refusedItem(t, byToken(token), capb.Refusal_CODE_UNKNOWN_WORKLOAD)
	})
	t.Run("agent/recreated pod", func(t *testing.T) {
		token := c.Token(t, agentPod, "signet-ca", hour)
		stolen := agent
		c.DeletePod(t, agentPod)
		next := k.agentPod("node-a")
		// Whoever has the credential of the pod that is gone has nothing.
		kubetest.Poll(t, "the stolen credential to be worthless", func() error {
			id, _, err := stolen.issue(t, byPodUID(string(web.UID)))
			if id != "" || err == nil {
				return errors.New("it is still good")
			}
			return nil
		})
		k.refusedAgent(t, roots, token, codes.Unauthenticated)
		agent = k.attested(roots, next)
		agentPod = next
	})
	t.Run("agent/node recreated with a new UID", func(t *testing.T) {
		token := c.Token(t, agentPod, "signet-ca", hour)
		webToken := c.Token(t, web, "signet", hour)
		if err := c.Kube.CoreV1().Nodes().Delete(t.Context(), "node-a", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		c.Node(t, "node-a")
		stolen := agent
		kubetest.Poll(t, "the credential of the old node to be worthless", func() error {
			id, _, err := stolen.issue(t, byPodUID(string(web.UID)))
			if id != "" || err == nil {
				return errors.New("it is still good")
			}
			return nil
		})
		k.refusedAgent(t, roots, token, codes.Unauthenticated)
		// The pods are the new node's: with new tokens they go on.
		agent = k.attested(roots, agentPod)
		agent.refusedItem(t, byToken(webToken), capb.Refusal_CODE_EVIDENCE)
		agent.mustIssue(t, byToken(c.Token(t, web, "signet", hour)), "spiffe://cluster.local/ns/shop/sa/web")
	})
	t.Run("wrong root", func(t *testing.T) {
		strange := x509.NewCertPool()
		block, _ := pem.Decode(must(os.ReadFile(c.CAFile)))
		strange.AddCert(must(x509.ParseCertificate(block.Bytes)))
		if _, err := k.tryAgent(strange, c.Token(t, agentPod, "signet-ca", hour)); err == nil {
			t.Error("an authority under another root was talked to")
		}
	})
}

func none(kid string) string {
	h := fmt.Sprintf(`{"alg":"none","kid":%q}`, kid)
	return strings.TrimRight(b64(h), "=")
}

func flip(b byte) string {
	if b == 'A' {
		return "B"
	}
	return "A"
}

// TestAPIServerAway: the authority waits for it at the start, goes on without it,
// and takes up the thread when it is back with another certificate, after etcd was
// restarted, and after what it wants to go on from is too old.
func TestAPIServerAway(t *testing.T) {
	t.Parallel()
	bin := programs(t)
	c := kubetest.Start(t, kubetest.Options{})
	k := prepareKubeCA(t, bin, c, "")
	c.Node(t, "node-a")
	web := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "web", Node: "node-a"})
	pod := k.agentPod("node-a")

	c.APIServer.Kill(t)
	k.launch("signet-ca")
	kubetest.Poll(t, "the authority to say that it waits", func() error {
		text, code, err := page("http://" + k.http["signet-ca"] + "/readyz")
		if err == nil && (code != http.StatusServiceUnavailable || !strings.Contains(text, "have not been read from the API server")) {
			err = fmt.Errorf("%d %s", code, text)
		}
		return err
	})
	if conn, err := net.DialTimeout("tcp", k.caAddr, time.Second); err == nil {
		conn.Close()
		t.Error("it listens before it knows who is who")
	}
	c.APIServer.Start(t)
	roots := k.roots()
	agent := k.attested(roots, pod)
	agent.mustIssue(t, byPodUID(string(web.UID)), "spiffe://cluster.local/ns/shop/sa/web")

	token := c.Token(t, web, "signet", time.Hour)
	own := c.Token(t, pod, "signet-ca", time.Hour)
	c.APIServer.Kill(t)
	// What is known goes on; what needs its word waits.
	agent.mustIssue(t, byPodUID(string(web.UID)), "spiffe://cluster.local/ns/shop/sa/web")
	agent.mustIssue(t, byToken(token), "spiffe://cluster.local/ns/shop/sa/web")
	if _, err := k.tryAgent(roots, own); status.Code(err) != codes.Unavailable {
		t.Errorf("an agent's token without the API server's word: %v", err)
	}
	if text, code, err := page("http://" + k.http["signet-ca"] + "/readyz"); err != nil || code != http.StatusOK {
		t.Errorf("it is not ready while the API server is away: %d %s %v", code, text, err)
	}
	kubetest.Poll(t, "the metric to say so", func() error {
		text, _, err := page("http://" + k.http["signet-ca"] + "/metrics")
		if err == nil && !strings.Contains(text, "\nsignet_kube_away 1") {
			err = errors.New("signet_kube_away is not 1")
		}
		return err
	})

	t.Run("back with another certificate", func(t *testing.T) {
		c.NewServingCertificate(t)
		c.APIServer.Start(t)
		k.seesNewPod(t, agent, "certificate")
		k.attested(roots, pod)
	})
	t.Run("etcd restarted", func(t *testing.T) {
		c.Etcd.Kill(t)
		agent.mustIssue(t, byPodUID(string(web.UID)), "spiffe://cluster.local/ns/shop/sa/web")
		c.Etcd.Start(t)
		c.APIServer.WaitReady(t)
		k.seesNewPod(t, agent, "etcd")
	})
	t.Run("what happened meanwhile", func(t *testing.T) {
		// A pod that ends while the authority sees nothing is gone afterwards.
		c.APIServer.Kill(t)
		c.APIServer.Start(t)
		c.DeletePod(t, web)
		agent.refusedItem(t, byPodUID(string(web.UID)), capb.Refusal_CODE_UNKNOWN_WORKLOAD)
	})
}

// seesNewPod waits until a new pod gets its identity.
func (k *kubeCA) seesNewPod(t *testing.T, agent *simAgent, name string) {
	t.Helper()
	var pod *core.Pod
	k.cluster.ServiceAccount(t, "shop", name)
	pod = k.cluster.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: name, Node: "node-a"})
	began := time.Now()
	agent.mustIssue(t, byPodUID(string(pod.UID)), "spiffe://cluster.local/ns/shop/sa/"+name)
	t.Logf("a pod that was created then got its SVID after %v", time.Since(began).Round(time.Millisecond))
}

// TestWatchFaults puts a proxy between the authority and the API server that
// breaks its watches in every way that a watch can break.
func TestWatchFaults(t *testing.T) {
	t.Parallel()
	bin := programs(t)
	c := kubetest.Start(t, kubetest.Options{})
	p := newWatchProxy(t, c)
	c.Apply(t, "../deploy/manifests")
	cfg := c.As(t, "signet-system", "signet-ca")
	cfg.Host = p.url
	k := kubeCAWith(t, bin, c, "kubeconfig: "+p.kubeconfig(t, c, cfg.BearerToken), "")
	c.Node(t, "node-a")
	k.start("signet-ca")
	roots := k.roots()
	agent, _ := k.agent(roots, "node-a")
	web := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "web", Node: "node-a"})
	agent.mustIssue(t, byPodUID(string(web.UID)), "spiffe://cluster.local/ns/shop/sa/web")

	t.Run("closed by the server", func(t *testing.T) {
		for range 3 {
			p.cut()
		}
		k.seesNewPod(t, agent, "closed")
	})
	t.Run("too old resource version", func(t *testing.T) {
		gone := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "gone", Node: "node-a"})
		agent.mustIssue(t, byPodUID(string(gone.UID)), "spiffe://cluster.local/ns/shop/sa/gone")
		before := p.expired.Load()
		p.tooOld.Store(6)
		p.hold.Store(true)
		p.cut()
		c.DeletePod(t, gone) // while nothing is watched: it must not be missed
		p.hold.Store(false)
		agent.refusedItem(t, byPodUID(string(gone.UID)), capb.Refusal_CODE_UNKNOWN_WORKLOAD)
		k.seesNewPod(t, agent, "too-old")
		if n := p.expired.Load() - before; n == 0 {
			t.Error("no watch was answered with 410 Gone")
		} else {
			t.Logf("%d requests were answered with 410 Gone", n)
		}
	})
	t.Run("bookmark gaps", func(t *testing.T) {
		gone := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "unmarked", Node: "node-a"})
		agent.mustIssue(t, byPodUID(string(gone.UID)), "spiffe://cluster.local/ns/shop/sa/unmarked")
		p.noBookmarks.Store(true)
		p.cut()
		p.watching(t)
		marks, expired := p.bookmarks.Load(), p.reallyOld.Load()
		// Objects of other kinds move the resource version on, and no bookmark says so.
		for i := range 20 {
			c.Namespace(t, fmt.Sprintf("gap-%d", i))
		}
		k.seesNewPod(t, agent, "unmarked-too")
		p.hold.Store(true)
		p.cut()
		c.DeletePod(t, gone) // while nothing is watched: it must not be missed
		// An API server that begins anew has no events from before, so that the
		// version which the authority has, the one of its last pod, is too old for it.
		c.APIServer.Kill(t)
		c.APIServer.Start(t)
		p.hold.Store(false)
		agent.refusedItem(t, byPodUID(string(gone.UID)), capb.Refusal_CODE_UNKNOWN_WORKLOAD)
		k.seesNewPod(t, agent, "gap")
		p.watching(t)
		if n := p.bookmarks.Load() - marks; n != 0 {
			t.Errorf("%d bookmarks passed", n)
		}
		if n := p.reallyOld.Load() - expired; n == 0 {
			t.Error("the API server found no watch of pods too old: nothing was proved")
		} else {
			t.Logf("no bookmarks; the API server found %d watches of pods too old", n)
		}
		if marks == 0 {
			t.Error("there were no bookmarks before either: they are not recognised")
		}
	})
	t.Run("pods are seen two seconds late", func(t *testing.T) {
		p.lag.Store(int64(2 * time.Second))
		begun := p.begun.Load()
		p.cut() // the watches that begin now lag
		kubetest.Poll(t, "all watches to begin again", func() error {
			if n := p.begun.Load() - begun; n < 3 {
				return fmt.Errorf("%d have", n)
			}
			return nil
		})
		lagging := k.lagging(t, agent, p)
		if lagging < time.Second {
			t.Errorf("it took %v, the watch lags two seconds", lagging)
		}
		p.lag.Store(0)
		p.cut()
	})
}

// lagging creates a pod and shows its token at once: the answer must be to try
// again, and then the SVID.
func (k *kubeCA) lagging(t *testing.T, agent *simAgent, p *watchProxy) time.Duration {
	t.Helper()
	p.watching(t)
	pod := k.cluster.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "late", Node: "node-a"})
	token := k.cluster.Token(t, pod, "signet", time.Hour)
	began, retried := time.Now(), 0
	for {
		id, refusal, err := agent.issue(t, byToken(token))
		switch {
		case err != nil:
			t.Fatal(err)
		case id != "":
			t.Logf("%d answers to try again, the SVID after %v", retried, time.Since(began).Round(time.Millisecond))
			if retried == 0 {
				t.Error("it was never told to try again")
			}
			return time.Since(began)
		// While the watches were cut for long enough another replica may know more.
		case refusal.GetCode() != capb.Refusal_CODE_UNKNOWN_WORKLOAD && refusal.GetCode() != capb.Refusal_CODE_UNAVAILABLE || refusal.GetRetryAfter().AsDuration() <= 0:
			t.Fatalf("a good token of a pod that is not seen yet: %v", refusal)
		}
		retried++
		if time.Since(began) > time.Minute {
			t.Fatal("it is not seen after a minute")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// watchProxy stands before the API server, with a certificate by the same
// authority in the cluster's kubeconfig.
type watchProxy struct {
	url     string
	tooOld  atomic.Int64 // so many watches are answered with 410 Gone
	expired atomic.Int64 // so many were
	hold    atomic.Bool  // requests wait
	lag     atomic.Int64 // nanoseconds by which watches that begin lag
	watches atomic.Int64 // watches that are open
	begun   atomic.Int64 // watches that began

	noBookmarks atomic.Bool  // as an API server that knows none
	bookmarks   atomic.Int64 // bookmarks that passed
	reallyOld   atomic.Int64 // watches of pods that the API server itself found too old

	mu   sync.Mutex
	open map[net.Conn]struct{} // guarded by mu
	ca   []byte
}

func newWatchProxy(t *testing.T, c *kubetest.Cluster) *watchProxy {
	t.Helper()
	p := &watchProxy{open: map[net.Conn]struct{}{}}
	target := must(url.Parse(c.URL))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(must(os.ReadFile(c.CAFile)))
	forward := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(target); r.Out.Host = target.Host },
		FlushInterval: -1, ErrorLog: nil,
		Transport:    &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
		ModifyResponse: func(r *http.Response) error {
			if r.Request.URL.Query().Get("watch") == "" {
				return nil
			}
			if d := time.Duration(p.lag.Load()); d > 0 {
				r.Body = &lagged{r.Body, d}
			}
			counts := []*count{{text: []byte("BOOKMARK"), n: &p.bookmarks}}
			if r.Request.URL.Path == "/api/v1/pods" {
				counts = append(counts, &count{text: []byte("too old resource version"), n: &p.reallyOld})
			}
			r.Body = &counted{r.Body, counts}
			return nil
		},
	}
	cert, ca := selfSigned(t)
	p.ca = ca
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for p.hold.Load() && r.Context().Err() == nil {
				time.Sleep(5 * time.Millisecond)
			}
			if r.URL.Query().Get("watch") != "" {
				if p.noBookmarks.Load() {
					q := r.URL.Query()
					if q.Get("sendInitialEvents") != "" {
						// A list that is streamed ends with a bookmark.
						w.Header().Set("Content-Type", "application/json")
						w.WriteHeader(http.StatusUnprocessableEntity)
						fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"sendInitialEvents is forbidden","reason":"Invalid","code":422}`)
						return
					}
					q.Del("allowWatchBookmarks")
					r.URL.RawQuery = q.Encode()
				}
				if p.tooOld.Add(-1) >= 0 {
					p.expired.Add(1)
					w.Header().Set("Content-Type", "application/json")
					w.WriteHeader(http.StatusGone)
					fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"too old resource version","reason":"Expired","code":410}`)
					return
				}
				p.begun.Add(1)
				p.watches.Add(1)
				defer p.watches.Add(-1)
			}
			// A watch that is cut off ends in a panic that says so.
			forward.ServeHTTP(w, r)
		}),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}},
		ErrorLog:  nil,
		ConnState: func(conn net.Conn, s http.ConnState) {
			p.mu.Lock()
			defer p.mu.Unlock()
			if s == http.StateClosed || s == http.StateHijacked {
				delete(p.open, conn)
			} else {
				p.open[conn] = struct{}{}
			}
		},
	}
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	p.url = "https://" + l.Addr().String()
	done := make(chan struct{})
	go func() { defer close(done); _ = server.ServeTLS(l, "", "") }()
	t.Cleanup(func() { server.Close(); <-done })
	return p
}

// watching waits until pods, nodes and service accounts are watched.
func (p *watchProxy) watching(t *testing.T) {
	t.Helper()
	kubetest.Poll(t, "the watches to begin again", func() error {
		if p.watches.Load() < 3 {
			return errors.New("not yet")
		}
		return nil
	})
}

// cut breaks every connection, in the middle of whatever is on it.
func (p *watchProxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.open {
		conn.Close()
	}
}

// lagged is a body of which each part is read late.
type lagged struct {
	io.ReadCloser
	by time.Duration
}

func (l *lagged) Read(b []byte) (int, error) {
	n, err := l.ReadCloser.Read(b)
	if n > 0 {
		time.Sleep(l.by)
	}
	return n, err
}

// counted is a body in which texts are counted, in whatever pieces they come.
type counted struct {
	io.ReadCloser
	counts []*count
}

type count struct {
	text []byte
	end  []byte // of what was read
	n    *atomic.Int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.ReadCloser.Read(b)
	for _, c := range c.counts {
		all := append(c.end, b[:n]...)
		c.n.Add(int64(bytes.Count(all, c.text)))
		// Too short to hold the text once more.
		c.end = bytes.Clone(all[max(0, len(all)-len(c.text)+1):])
	}
	return n, err
}
