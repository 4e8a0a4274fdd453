package kube_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest/attesttest"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Names are few, so that they are used again and accounts are shared.
var (
	nodeNames    = []string{"node-a", "node-b", "node-c"}
	accountNames = []string{"signet-system/signet-agent", "shop/signet-agent", "shop/web", "shop/db", "default/web"}
	kinds        = []string{"pods", "nodes", "accounts"}
)

// The objects of a cluster, as users and controllers see them.
type (
	apiPod struct {
		namespace, name, uid string
		account, node        string
		ended                bool      // Succeeded or Failed
		ends                 time.Time // the deletion timestamp: the end of its grace period
	}
	apiAccount struct {
		namespace, name, uid string
		deleting             bool
	}
	state struct {
		pods     map[string]apiPod // by NAMESPACE/NAME
		nodes    map[string]string // name → UID
		accounts map[string]apiAccount
	}
)

func (p apiPod) key() string     { return p.namespace + "/" + p.name }
func (a apiAccount) key() string { return a.namespace + "/" + a.name }

func newState() state {
	return state{map[string]apiPod{}, map[string]string{}, map[string]apiAccount{}}
}

// whyNot is why a pod is nobody, as the authority has seen the cluster; empty: it
// is alive. This is the whole definition, once more and by itself.
func (w *world) whyNot(p apiPod) string {
	a, ok := w.seen.accounts[p.namespace+"/"+p.account]
	_, node := w.seen.nodes[p.node]
	switch {
	case p.ended:
		return "ended"
	case !p.ends.IsZero() && time.Now().After(p.ends.Add(time.Minute-1)):
		return "grace is over"
	case p.node == "":
		return "not scheduled"
	case !node:
		return "node gone"
	case !ok:
		return "account gone"
	case a.deleting:
		return "account is being deleted"
	}
	return ""
}

// find is the pod with that UID in a state.
func (s state) find(uid string) (apiPod, bool) {
	for _, p := range s.pods {
		if p.uid == uid {
			return p, true
		}
	}
	return apiPod{}, false
}

// missing is why there is no pod with that UID in what the authority has seen.
func (w *world) missing(uid string) string {
	if _, ok := w.actual.find(uid); ok {
		return "not seen yet"
	}
	ever, ok := w.ever[uid]
	if !ok {
		return "never existed"
	}
	if _, ok := w.seen.pods[ever.key()]; ok {
		return "replaced pod"
	}
	return "gone"
}

func spiffeID(p apiPod) string {
	return "spiffe://cluster.local/ns/" + p.namespace + "/sa/" + p.account
}

// agentDead is why an agent's credential is worth nothing; empty: it is good.
func (w *world) agentDead(a *agent) string {
	p, ok := w.seen.find(a.pod.PodUID)
	switch {
	case !time.Now().Before(a.cert.Leaf.NotAfter):
		return "its SVID expired"
	case !ok || w.whyNot(p) != "":
		return "its pod is gone"
	case w.seen.nodes[p.node] != a.pod.NodeUID:
		return "its node was replaced"
	}
	return ""
}

// rightUID is what an agent that is alive must be answered.
func (w *world) rightUID(a *agent, uid string) (want, id string) {
	p, ok := w.seen.find(uid)
	if !ok {
		return "refused, " + w.missing(uid), ""
	}
	if why := w.whyNot(p); why != "" {
		return "refused, " + why, ""
	}
	if p.node != a.pod.Node {
		return "refused, other node", ""
	}
	if !p.ends.IsZero() {
		return "issued, terminating", spiffeID(p)
	}
	return "issued", spiffeID(p)
}

// tokenBad is why a token is refused for an audience, whoever shows it.
func (w *world) tokenBad(t *token, audience string) string {
	p, ok := w.seen.find(t.claims.PodUID)
	switch {
	case t.odd != "":
		return "odd"
	case t.audience != audience:
		return "audience"
	case !time.Now().Before(t.expires):
		return "expired"
	case !ok:
		return w.missing(t.claims.PodUID)
	case w.whyNot(p) != "":
		return "gone"
	case w.seen.accounts[p.namespace+"/"+p.account].uid != t.claims.ServiceAccountUID:
		return "account was replaced"
	case w.seen.nodes[p.node] != t.claims.NodeUID:
		return "node was replaced"
	}
	return ""
}

func (w *world) rightToken(a *agent, t *token) (want, id string) {
	if why := w.tokenBad(t, "signet"); why != "" {
		return "refused, " + why, ""
	}
	p, _ := w.seen.find(t.claims.PodUID)
	if p.node != a.pod.Node {
		return "refused, other node", ""
	}
	return "issued", spiffeID(p)
}

func (w *world) rightAttest(t *token) string {
	if t.odd == "" && t.audience == "signet-ca" && time.Now().Before(t.expires) && t.claims.Namespace+"/"+t.claims.ServiceAccount != accountNames[0] {
		return "refused, account"
	}
	if why := w.tokenBad(t, "signet-ca"); why != "" {
		return "refused, " + why
	}
	switch {
	case w.api.mode == away:
		return "no answer of the API server"
	case !w.api.good(t):
		return "refused by the API server"
	case w.api.mode == lying:
		return "refused, contradiction"
	case w.api.mode == deaf:
		return "refused, not for the audience"
	}
	return "agent"
}

// token is one that was issued at some time.
type token struct {
	text     string
	claims   identity.Workload
	audience string
	expires  time.Time
	odd      string // how it differs from one that the API server issues
}

// mint makes a token of a pod as the API server would now, or an odd one that it
// would not.
func (w *world) mint(p apiPod, audience, odd string) *token {
	c := identity.Workload{Namespace: p.namespace, ServiceAccount: p.account, ServiceAccountUID: w.actual.accounts[p.namespace+"/"+p.account].uid,
		Pod: p.name, PodUID: p.uid, Node: p.node, NodeUID: w.actual.nodes[p.node]}
	var edits []attesttest.Edit
	switch odd {
	case "no node UID":
		edits = append(edits, attesttest.Without("kubernetes.io/node/uid"))
	case "no account UID":
		edits = append(edits, attesttest.Without("kubernetes.io/serviceaccount/uid"))
	case "other name":
		edits = append(edits, attesttest.Claim("kubernetes.io/pod/name", "other"))
	case "other account":
		edits = append(edits, attesttest.Claim("kubernetes.io/serviceaccount/name", "other"), attesttest.Claim("sub", "system:serviceaccount:"+p.namespace+":other"))
	case "other node":
		edits = append(edits, attesttest.Claim("kubernetes.io/node/name", "node-x"))
	case "another key":
		edits = append(edits, attesttest.SignedBy(w.stranger))
	case "unsigned":
		edits = append(edits, attesttest.Unsigned())
	case "two audiences":
		edits = append(edits, attesttest.Claim("aud", []string{audience, "other"}))
	case "too long":
		edits = append(edits, attesttest.TTL(2*time.Hour))
	}
	t := &token{text: w.issuer.Token(c, audience, edits...), claims: c, audience: audience, expires: time.Now().Truncate(time.Second).Add(10 * time.Minute), odd: odd}
	w.tokens = append(w.tokens, t)
	return t
}

var odds = []string{"no node UID", "no account UID", "other name", "other account", "other node", "unsigned", "another key", "two audiences", "too long"}

// anyToken is a fresh token of a pod, or one from earlier.
func (w *world) anyToken(forAgent bool) *token {
	r := w.rand
	if len(w.tokens) > 0 && r.IntN(3) == 0 {
		return pick(r, w.tokens[max(0, len(w.tokens)-60):])
	}
	var pods []apiPod
	for _, k := range slices.Sorted(maps.Keys(w.actual.pods)) {
		p := w.actual.pods[k]
		agents := p.namespace+"/"+p.account == accountNames[0]
		// The API server issues none for a pod without node or account.
		if w.actual.nodes[p.node] != "" && w.actual.accounts[p.namespace+"/"+p.account].uid != "" && (!forAgent || agents || r.IntN(6) == 0) {
			pods = append(pods, p)
		}
	}
	if len(pods) == 0 {
		return nil
	}
	audience, odd := "signet", ""
	if forAgent != (r.IntN(10) == 0) {
		audience = "signet-ca"
	}
	if r.IntN(6) == 0 {
		odd = pick(r, odds)
	}
	return w.mint(pick(r, pods), audience, odd)
}

// apiMode is how the API server answers TokenReviews.
type apiMode int

const (
	honest apiMode = iota
	away           // not at all
	lying          // one fact differs from the token's
	deaf           // it knows nothing of audiences
)

// api answers TokenReviews by what is true in the cluster now, not by what the
// authority has seen of it.
type api struct {
	w    *world
	mode apiMode
}

// good says whether the API server accepts a token: its pod and account are there.
// It does not look at the node.
func (a *api) good(t *token) bool {
	p, ok := a.w.actual.find(t.claims.PodUID)
	sa := a.w.actual.accounts[t.claims.Namespace+"/"+t.claims.ServiceAccount]
	return ok && (p.ends.IsZero() || time.Now().Before(p.ends.Add(time.Minute))) && sa.uid == t.claims.ServiceAccountUID && !sa.deleting && time.Now().Before(t.expires)
}

func (a *api) Create(_ context.Context, r *authv1.TokenReview, _ metav1.CreateOptions) (*authv1.TokenReview, error) {
	if a.mode == away {
		return nil, errors.New("connection refused")
	}
	answer := &authv1.TokenReview{}
	for _, t := range a.w.tokens {
		if t.text != r.Spec.Token || !a.good(t) || !slices.Equal(r.Spec.Audiences, []string{t.audience}) {
			continue
		}
		c := t.claims
		extra := func(v string) authv1.ExtraValue { return authv1.ExtraValue{v} }
		answer.Status = authv1.TokenReviewStatus{Authenticated: true, Audiences: r.Spec.Audiences, User: authv1.UserInfo{
			Username: "system:serviceaccount:" + c.Namespace + ":" + c.ServiceAccount, UID: c.ServiceAccountUID,
			Extra: map[string]authv1.ExtraValue{
				"authentication.kubernetes.io/pod-name": extra(c.Pod), "authentication.kubernetes.io/pod-uid": extra(c.PodUID),
				"authentication.kubernetes.io/node-name": extra(c.Node), "authentication.kubernetes.io/node-uid": extra(c.NodeUID),
			}}}
		switch a.mode {
		case deaf:
			answer.Status.Audiences = nil
		case lying:
			u := &answer.Status.User
			switch k := a.w.rand.IntN(6); k {
			case 0:
				u.Username += "x"
			case 1:
				u.UID = "other"
			default:
				delete(u.Extra, []string{"authentication.kubernetes.io/pod-name", "authentication.kubernetes.io/pod-uid", "authentication.kubernetes.io/node-name", "authentication.kubernetes.io/node-uid"}[k-2])
			}
		}
		return answer, nil
	}
	answer.Status.Error = "token is not good"
	// What an API server says of a token that it does not accept counts for nothing.
	answer.Status.Audiences = r.Spec.Audiences
	return answer, nil
}

// What follows changes the cluster and queues the event of it.

func (w *world) newUID() string {
	w.uids++
	return fmt.Sprintf("%08x-0000-4000-8000-%012x", w.uids, w.rand.Uint32())
}

func (w *world) freePodName() (k string) {
	for range 20 {
		k = pick(w.rand, []string{"signet-system", "signet-system", "shop", "shop", "default"}) + fmt.Sprintf("/p%d", w.rand.IntN(9))
		if _, ok := w.actual.pods[k]; !ok {
			return k
		}
	}
	w.removePod(k)
	return k
}

func (w *world) createPod(key string) {
	var p apiPod
	p.namespace, p.name, _ = cut(key)
	p.uid = w.newUID()
	switch p.namespace {
	case "signet-system":
		p.account = "signet-agent"
	case "shop":
		p.account = pick(w.rand, []string{"web", "web", "db", "signet-agent"})
	default:
		p.account = "web"
	}
	if w.rand.IntN(6) > 0 {
		p.node = pick(w.rand, nodeNames)
	}
	w.ever[p.uid] = p
	w.everUID = append(w.everUID, p.uid)
	w.note("create %s %s on %q", key, p.uid, p.node)
	w.setPod(p)
}

func cut(key string) (namespace, name string, ok bool) {
	for i := range key {
		if key[i] == '/' {
			return key[:i], key[i+1:], true
		}
	}
	return "", key, false
}

func (w *world) setPod(p apiPod) {
	_, existed := w.actual.pods[p.key()]
	w.actual.pods[p.key()] = p
	w.queue("pods", func() {
		w.seen.pods[p.key()] = p
		if existed {
			must(w.feed.Pods.Update(p.object()))
		} else {
			must(w.feed.Pods.Add(p.object()))
		}
	})
}

func (w *world) removePod(key string) {
	p, ok := w.actual.pods[key]
	if !ok {
		return
	}
	w.note("delete %s %s", key, p.uid)
	delete(w.actual.pods, key)
	w.queue("pods", func() { delete(w.seen.pods, key); must(w.feed.Pods.Delete(p.object())) })
}

func (w *world) removePodUID(uid string) {
	if p, ok := w.actual.find(uid); ok {
		w.removePod(p.key())
	}
}

func (w *world) createNode(name string) {
	if w.actual.nodes[name] != "" {
		return
	}
	uid := w.newUID()
	w.note("create %s %s", name, uid)
	w.actual.nodes[name] = uid
	w.queue("nodes", func() { w.seen.nodes[name] = uid; must(w.feed.Nodes.Add(named("", name, uid, false))) })
}

func (w *world) removeNode(name string) {
	uid := w.actual.nodes[name]
	if uid == "" {
		return
	}
	w.note("delete %s %s", name, uid)
	delete(w.actual.nodes, name)
	w.queue("nodes", func() { delete(w.seen.nodes, name); must(w.feed.Nodes.Delete(named("", name, uid, false))) })
}

func (w *world) createAccount(key string) {
	if _, ok := w.actual.accounts[key]; ok {
		return
	}
	ns, name, _ := cut(key)
	w.note("create account %s", key)
	w.setAccount(apiAccount{namespace: ns, name: name, uid: w.newUID()})
}

func (w *world) setAccount(a apiAccount) {
	_, existed := w.actual.accounts[a.key()]
	w.actual.accounts[a.key()] = a
	w.queue("accounts", func() {
		w.seen.accounts[a.key()] = a
		if existed {
			must(w.feed.Accounts.Update(named(a.namespace, a.name, a.uid, a.deleting)))
		} else {
			must(w.feed.Accounts.Add(named(a.namespace, a.name, a.uid, a.deleting)))
		}
	})
}

func (w *world) removeAccount(a apiAccount) {
	delete(w.actual.accounts, a.key())
	w.queue("accounts", func() {
		delete(w.seen.accounts, a.key())
		must(w.feed.Accounts.Delete(named(a.namespace, a.name, a.uid, a.deleting)))
	})
}

func (w *world) queue(kind string, event func()) { w.queues[kind] = append(w.queues[kind], event) }

func (w *world) deliverOne(kind string) {
	q := w.queues[kind]
	if len(q) == 0 {
		return
	}
	w.queues[kind] = q[1:]
	w.covered["feed: event"]++
	q[0]()
	w.noteLapses()
}

func (w *world) noteLapses() {
	for _, a := range w.agents {
		a.lapsed = a.lapsed || w.agentDead(a) != ""
	}
}

func (w *world) deliverAll(kind string) {
	for len(w.queues[kind]) > 0 {
		w.deliverOne(kind)
	}
}

// relist brings everything of a kind at once, and not what happened in between.
func (w *world) relist(kind string) {
	w.note("list %s", kind)
	w.covered["feed: list"]++
	w.queues[kind] = nil
	defer w.noteLapses()
	var list []any
	switch kind {
	case "pods":
		w.seen.pods = maps.Clone(w.actual.pods)
		for _, p := range w.actual.pods {
			list = append(list, p.object())
		}
		must(w.feed.Pods.Replace(list, ""))
	case "nodes":
		w.seen.nodes = maps.Clone(w.actual.nodes)
		for name, uid := range w.actual.nodes {
			list = append(list, named("", name, uid, false))
		}
		must(w.feed.Nodes.Replace(list, ""))
	case "accounts":
		w.seen.accounts = maps.Clone(w.actual.accounts)
		for _, a := range w.actual.accounts {
			list = append(list, named(a.namespace, a.name, a.uid, a.deleting))
		}
		must(w.feed.Accounts.Replace(list, ""))
	}
}

func (p apiPod) object() *corev1.Pod {
	o := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, Name: p.name, UID: types.UID(p.uid)},
		Spec: corev1.PodSpec{NodeName: p.node, ServiceAccountName: p.account}, Status: corev1.PodStatus{Phase: corev1.PodRunning}}
	if p.ended {
		o.Status.Phase = corev1.PodFailed
	}
	if !p.ends.IsZero() {
		o.DeletionTimestamp = &metav1.Time{Time: p.ends}
	}
	return o
}

func named(namespace, name, uid string, deleting bool) *metav1.PartialObjectMetadata {
	o := &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(uid)}}
	if deleting {
		now := metav1.Now()
		o.DeletionTimestamp = &now
	}
	return o
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
