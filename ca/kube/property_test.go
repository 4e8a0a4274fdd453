package kube_test

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var worlds = flag.Int("worlds", whole(24, 3), "random clusters of the property test; where they are fewer than 24, they need not come to every situation")

// whole is n, or the part of it that is looked at with the race detector.
func whole(n, part int) int {
	if raceEnabled {
		return part
	}
	return n
}

// TestAnAgentObtainsExactlyTheLivePodsOfItsNode runs random clusters, whose changes
// reach the authority late, out of order between kinds of objects, or only with a
// list, and random requests by agents on the real services. What is right is
// decided by a model that looks at lists of objects and knows nothing of caches,
// indices and UIDs that are remembered.
func TestAnAgentObtainsExactlyTheLivePodsOfItsNode(t *testing.T) {
	covered := map[string]int{}
	missing := func(k string) bool { return covered[k] == 0 && *worlds >= 24 }
	seed := 0
	// Rare situations may need some more clusters.
	for ; seed < *worlds || seed < 6**worlds && slices.ContainsFunc(mustCover, missing); seed++ {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, uint64(seed)+1, covered)
			defer w.close()
			for w.step = 0; w.step < 220 && !t.Failed(); w.step++ {
				w.act()
			}
			w.checkLog()
			if t.Failed() {
				t.Logf("seed %d, the last steps:\n%s", seed+1, strings.Join(w.history[max(0, len(w.history)-25):], "\n"))
			}
		})
		if t.Failed() {
			return
		}
	}
	var table strings.Builder
	for _, k := range slices.Sorted(maps.Keys(covered)) {
		fmt.Fprintf(&table, "%7d  %s\n", covered[k], k)
	}
	t.Logf("%d clusters; what they did:\n%s", seed, table.String())
	for _, k := range mustCover {
		if missing(k) {
			t.Errorf("the generator never made %q", k)
		}
	}
}

// mustCover are the situations that the generator has to come to, each with its
// right answer.
var mustCover = []string{
	"uid: issued", "uid: issued, terminating", "uid: refused, other node", "uid: refused, ended", "uid: refused, gone", "uid: refused, replaced pod",
	"uid: refused, grace is over", "uid: refused, node gone", "uid: refused, account gone", "uid: refused, account is being deleted", "uid: refused, not scheduled",
	"uid: refused, never existed", "uid: refused, not seen yet",
	"token: issued", "token: refused, other node", "token: refused, gone", "token: refused, node was replaced", "token: refused, account was replaced", "token: refused, expired",
	"token: refused, audience", "token: refused, odd", "token: refused, not seen yet",
	"agent: refused, its pod is gone", "agent: refused, its node was replaced", "agent: refused, its SVID expired",
	"meanwhile: refused",
	"attest: agent", "attest: refused, account", "attest: refused, audience", "attest: refused by the API server", "attest: refused, contradiction", "attest: refused, not for the audience",
	"attest: no answer of the API server", "attest: refused, not seen yet",
	"renew: agent", "renew: refused", "renew: refused, token too old",
	"watch: compared", "watch: ended",
	"feed: event", "feed: list",
}

// act does one random thing, and checks what follows from it.
func (w *world) act() {
	r := w.rand
	if w.alive() < 2 && r.IntN(3) == 0 {
		w.bringUp()
	}
	switch n := r.IntN(100); {
	case n < 28:
		w.change()
	case n < 50:
		w.deliver()
	case n < 55:
		w.pass([]time.Duration{time.Second, 31 * time.Second, 61 * time.Second, 61 * time.Second, 11 * time.Minute}[r.IntN(5)])
	case n < 63:
		w.attest()
	case n < 67:
		w.renew(w.anyAgent())
	case n < 68:
		// The very moment at which an SVID ends, on a connection that was made before.
		if a := w.anyAgent(); a != nil && w.agentDead(a) == "" {
			if r.IntN(3) == 0 {
				// Renewed in time, and then once more, too long after its token.
				w.pass(time.Until(a.cert.Leaf.NotAfter) - time.Minute)
				w.renew(a)
				w.pass(12 * time.Minute)
				w.renew(w.agents[len(w.agents)-1])
				break
			}
			w.pass(time.Until(a.cert.Leaf.NotAfter))
			w.renew(a)
			w.order(a, "uid: ", "", "", a.pod.PodUID, &capb.IssueItem{Evidence: &capb.IssueItem_PodUid{PodUid: a.pod.PodUID}})
		}
	case n < 83:
		w.issueByUID()
	case n < 97:
		w.issueByToken(false)
	default:
		w.issueByToken(true)
	}
	synctest.Wait()
	w.compareWatches()
}

// alive is how many agents are.
func (w *world) alive() (n int) {
	for _, a := range w.agents {
		if w.agentDead(a) == "" {
			n++
		}
	}
	return n
}

// bringUp makes a node with an agent that is attested, and some pods.
func (w *world) bringUp() {
	node := pick(w.rand, nodeNames)
	w.createNode(node)
	for _, a := range accountNames {
		if w.actual.accounts[a].deleting {
			w.removeAccount(w.actual.accounts[a])
		}
		w.createAccount(a)
	}
	key := "signet-system/agent-on-" + node
	w.removePod(key)
	p := apiPod{namespace: "signet-system", name: "agent-on-" + node, uid: w.newUID(), account: "signet-agent", node: node}
	w.ever[p.uid], w.everUID = p, append(w.everUID, p.uid)
	w.setPod(p)
	for _, k := range kinds {
		w.deliverAll(k)
	}
	synctest.Wait()
	w.pass(2 * time.Second) // the API server may just have been away
	tok := w.mint(p, "signet-ca", "")
	cert, err := w.attestToken(tok.text)
	if err != nil {
		w.t.Fatalf("step %d: a new agent: %v", w.step, err)
	}
	w.adopt(cert, tok)
}

// change is what users, kubelets and controllers do to the cluster.
func (w *world) change() {
	r := w.rand
	pod := pick(r, slices.Sorted(maps.Keys(w.actual.pods)))
	switch n := r.IntN(22); {
	case n < 6 || len(w.actual.pods) < 3:
		w.createPod(w.freePodName())
	case n < 8:
		w.note("schedule %s", pod)
		if p := w.actual.pods[pod]; p.node == "" {
			p.node = pick(r, nodeNames)
			w.setPod(p)
		}
	case n < 9: // the same name again
		w.removePod(pod)
		w.createPod(pod)
	case n < 10:
		w.removePod(pod)
	case n < 12:
		p := w.actual.pods[pod]
		if p.ends.IsZero() {
			p.ends = time.Now().Add([]time.Duration{5 * time.Second, 30 * time.Second, 10 * time.Minute}[r.IntN(3)])
			w.note("terminate %s by %v", pod, p.ends)
			w.setPod(p)
		}
	case n < 13:
		p := w.actual.pods[pod]
		p.ended = true
		w.note("end %s", pod)
		w.setPod(p)
	case n < 14:
		w.removeNode(pick(r, nodeNames))
	case n < 15: // another machine of the same name
		name := pick(r, nodeNames)
		w.removeNode(name)
		w.createNode(name)
	case n < 17:
		w.createNode(pick(r, nodeNames))
	case n < 19:
		a := w.actual.accounts[pick(r, slices.Sorted(maps.Keys(w.actual.accounts)))]
		w.note("account %s/%s goes", a.namespace, a.name)
		if !a.deleting && r.IntN(3) > 0 {
			a.deleting = true
			w.setAccount(a)
		} else {
			w.removeAccount(a)
			if r.IntN(2) == 0 { // the same name again
				w.createAccount(a.key())
			}
		}
	default:
		w.createAccount(accountNames[r.IntN(len(accountNames))])
	}
}

// deliver brings events of one kind of object to the authority, or has its watch
// broken and the list read anew.
func (w *world) deliver() {
	kind := pick(w.rand, kinds)
	if w.rand.IntN(8) == 0 {
		w.relist(kind)
		return
	}
	for range 1 + w.rand.IntN(6) {
		w.deliverOne(kind)
	}
	if w.rand.IntN(3) == 0 {
		for _, k := range kinds {
			w.deliverAll(k)
		}
	}
}

// attest has a pod's token shown as an agent's.
func (w *world) attest() {
	w.pass(11 * time.Second) // nothing is remembered of earlier reviews
	tok := w.anyToken(true)
	if w.rand.IntN(6) == 0 {
		// A good token of a pod whose end the authority has not seen yet.
		for _, k := range slices.Sorted(maps.Keys(w.seen.pods)) {
			p := w.seen.pods[k]
			if _, there := w.actual.find(p.uid); !there && p.namespace+"/"+p.account == accountNames[0] && w.whyNot(p) == "" {
				for _, t := range w.tokens {
					if t.claims.PodUID == p.uid && t.audience == "signet-ca" && t.odd == "" {
						tok = t
					}
				}
			}
		}
	}
	if tok == nil {
		return
	}
	w.api.mode = []apiMode{honest, honest, honest, honest, honest, away, lying, deaf}[w.rand.IntN(8)]
	defer func() { w.api.mode = honest }()
	want := w.rightAttest(tok)
	cert, err := w.attestToken(tok.text)
	w.note("attest %s with a token of %s for %s (%s): want %s, got %v", tok.claims.Node, tok.claims.PodUID, tok.audience, tok.odd, want, err)
	w.verdict("attest: ", want, err == nil)
	// What is gone for good is not to be asked for again.
	if w.api.mode == honest && status.Code(err) == codes.Unavailable && !w.api.good(tok) {
		w.t.Errorf("step %d: a token that the API server does not accept: %v", w.step, err)
	}
	if err == nil {
		w.adopt(cert, tok)
	}
}

// renew asks on the connection that the agent has.
func (w *world) renew(a *agent) {
	if a == nil {
		return
	}
	want := "agent"
	switch {
	case w.agentDead(a) != "":
		want = "refused"
	case time.Since(a.tokenAt) >= tokenEvery:
		want = "refused, token too old"
	}
	cert, err := w.tryAttest(a.conn, &capb.AttestRequest{Evidence: &capb.AttestRequest_Renewal{Renewal: &capb.Renewal{}}})
	w.note("renew %s: want %s, got %v", a, want, err)
	w.verdict("renew: ", want, err == nil)
	if err == nil {
		w.adopt(cert, &token{claims: a.pod})
		w.agents[len(w.agents)-1].tokenAt = a.tokenAt
	}
}

func (w *world) issueByUID() {
	a := w.anyAgent()
	if w.rand.IntN(5) == 0 {
		a = pick(w.rand, w.agents)
	}
	if a == nil {
		return
	}
	uid := pick(w.rand, w.everUID[max(0, len(w.everUID)-14):])
	if w.rand.IntN(12) == 0 {
		uid = "00000000-0000-4000-8000-000000000000"
	}
	if w.rand.IntN(4) == 0 {
		// One of its own node that something is the matter with, each thing alike.
		bad := map[string][]string{}
		for _, k := range slices.Sorted(maps.Keys(w.seen.pods)) {
			if p := w.seen.pods[k]; p.node == a.pod.Node && w.whyNot(p) != "" {
				bad[w.whyNot(p)] = append(bad[w.whyNot(p)], p.uid)
			}
		}
		if len(bad) > 0 {
			uid = pick(w.rand, bad[pick(w.rand, slices.Sorted(maps.Keys(bad)))])
		}
	}
	if w.rand.IntN(25) == 0 {
		// One whose account has just gone.
		for _, k := range slices.Sorted(maps.Keys(w.seen.pods)) {
			p := w.seen.pods[k]
			if gone, ok := w.actual.accounts[p.namespace+"/"+p.account]; ok && p.node == a.pod.Node && gone.key() != accountNames[0] && w.whyNot(p) == "" {
				w.removeAccount(gone)
				w.deliverAll("accounts")
				uid = p.uid
				break
			}
		}
	}
	want, id := w.rightUID(a, uid)
	w.order(a, "uid: ", want, id, uid, &capb.IssueItem{Evidence: &capb.IssueItem_PodUid{PodUid: uid}})
}

// issueByToken shows a workload's token. With meanwhile, the agent's pod or node
// goes while the authority verifies it.
func (w *world) issueByToken(meanwhile bool) {
	a := w.anyAgent()
	tok := w.anyToken(false)
	if a != nil && w.rand.IntN(5) == 0 {
		// An earlier token of a pod whose account was replaced since.
		for _, old := range w.tokens {
			if p, ok := w.seen.find(old.claims.PodUID); ok && old.audience == "signet" && old.odd == "" && p.node == a.pod.Node &&
				w.seen.accounts[p.namespace+"/"+p.account].uid != old.claims.ServiceAccountUID && time.Now().Before(old.expires) {
				tok = old
			}
		}
	}
	if a == nil || tok == nil {
		return
	}
	item := &capb.IssueItem{Evidence: &capb.IssueItem_Token{Token: tok.text}}
	want, id := w.rightToken(a, tok)
	if meanwhile {
		if want != "issued" {
			return
		}
		d := &interruption{done: make(chan struct{}), happens: func() {
			if w.rand.IntN(2) == 0 {
				w.removeNode(a.pod.Node)
				w.createNode(a.pod.Node)
			} else {
				w.removePodUID(a.pod.PodUID)
			}
			for _, k := range kinds {
				w.deliverAll(k)
			}
		}}
		w.during.Store(d)
		w.order(a, "meanwhile: ", "refused", "", tok.claims.PodUID, item, func() { w.happened(d) })
		return
	}
	w.order(a, "token: ", want, id, tok.claims.PodUID, item)
}

// order sends one item and compares the answer with what is right.
func (w *world) order(a *agent, prefix, want, id, uid string, item *capb.IssueItem, after ...func()) {
	if why := w.agentDead(a); why != "" {
		prefix, want = "agent: ", "refused, "+why
	}
	got, refusal, err := w.issue(a, item)
	for _, f := range after {
		f()
	}
	w.note("%s%s asks for %s: want %s, got %q %v %v", prefix, a, uid, want, got, refusal, err)
	w.verdict(prefix, want, got != "")
	if got != "" {
		if got != id {
			w.t.Errorf("%s obtained %s for %s, want %s", a, got, uid, id)
		}
		w.issued[got+" "+uid]++
	}
	// What may become true is not refused for good.
	if strings.HasSuffix(want, "not seen yet") && (refusal.GetCode() != capb.Refusal_CODE_UNKNOWN_WORKLOAD || refusal.GetRetryAfter().AsDuration() <= 0) {
		w.t.Errorf("a pod that is not seen yet was answered with %v", refusal)
	}
}

// verdict counts a situation and fails the test if the answer is wrong.
func (w *world) verdict(prefix, want string, obtained bool) {
	w.covered[prefix+want]++
	if right := !strings.Contains(want, "refused") && !strings.Contains(want, "no answer"); right != obtained {
		w.t.Errorf("step %d: %s%s, but obtained=%v", w.step, prefix, want, obtained)
	}
}

// compareWatches compares what WatchNode told each agent with the model, and that
// the streams of dead agents have ended.
func (w *world) compareWatches() {
	for _, a := range w.agents {
		got, open := a.watched()
		if w.agentDead(a) != "" {
			if open > 0 {
				w.t.Errorf("step %d: %d streams of %s go on: %s", w.step, open, a, w.agentDead(a))
			}
			w.covered["watch: ended"]++
			continue
		}
		if open < 2 {
			if !a.lapsed {
				w.t.Errorf("step %d: %d streams of %s ended", w.step, 2-open, a)
			}
			a.cancel()
			a.follow()
			synctest.Wait()
			got, _ = a.watched()
		}
		var want []string
		for _, p := range w.seen.pods {
			if w.whyNot(p) == "" && p.node == a.pod.Node {
				want = append(want, p.uid+" "+p.namespace+"/"+p.account)
			}
		}
		slices.Sort(want)
		if !slices.Equal(got, want) {
			w.t.Errorf("step %d: %s was told of\n%v\nalive are\n%v", w.step, a, got, want)
		}
		w.covered["watch: compared"]++
	}
	for _, a := range w.agents {
		if bad := a.violation(); bad != "" {
			w.t.Errorf("step %d: %s was told of %s", w.step, a, bad)
		}
	}
}

func pick[T any](r *rand.Rand, from []T) (zero T) {
	if len(from) == 0 {
		return zero
	}
	return from[r.IntN(len(from))]
}
