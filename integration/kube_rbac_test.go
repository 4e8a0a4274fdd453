package integration_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/kubetest"

	api "istio.io/api/security/v1beta1"
	security "istio.io/client-go/pkg/apis/security/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apitypes "k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"
)

// call is a request as the API server's audit log has it.
type call struct {
	Verb       string
	RequestURI string
	User       struct{ Username string }
	ObjectRef  struct{ Resource, Subresource, Namespace, Name, APIGroup string }
	// Annotations say how it was authorized.
	Annotations map[string]string
}

func (c call) String() string {
	if c.ObjectRef.Resource == "" {
		return c.Verb + " " + c.path()
	}
	return fmt.Sprintf("%s %s %s %s/%s", c.Verb, c.ObjectRef.APIGroup, c.resource(), c.ObjectRef.Namespace, c.ObjectRef.Name)
}

func (c call) resource() string {
	if c.ObjectRef.Subresource != "" {
		return c.ObjectRef.Resource + "/" + c.ObjectRef.Subresource
	}
	return c.ObjectRef.Resource
}

func (c call) path() string {
	u, err := url.Parse(c.RequestURI)
	if err != nil {
		return c.RequestURI
	}
	return u.Path
}

// grant is one verb on one thing, as a role gives it.
type grant struct {
	namespace            string // of the role; empty: everywhere
	verb, group          string
	resource, name, path string
}

func (g grant) String() string {
	return strings.Join(strings.Fields(fmt.Sprint(g.verb, " ", g.group, " ", g.resource, " ", g.name, " ", g.path, " ", g.namespace)), " ")
}

func (g grant) allows(c call) bool {
	if g.path != "" {
		return c.ObjectRef.Resource == "" && c.Verb == g.verb && c.path() == g.path
	}
	return c.Verb == g.verb && c.ObjectRef.APIGroup == g.group && c.resource() == g.resource &&
		(g.namespace == "" || c.ObjectRef.Namespace == g.namespace) && (g.name == "" || c.ObjectRef.Name == g.name)
}

// grantsOf reads from deploy/manifests what a service account is granted, one verb
// on one thing at a time.
func grantsOf(tb testing.TB, account string) (grants []grant) {
	tb.Helper()
	files, err := filepath.Glob("../deploy/manifests/*.yaml")
	if err != nil || len(files) == 0 {
		tb.Fatalf("no manifests: %v", err)
	}
	roles := map[string][]grant{} // KIND/NAME
	var bound []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			tb.Fatal(err)
		}
		for doc := range bytes.SplitSeq(b, []byte("\n---\n")) {
			var o struct {
				Kind     string
				Metadata struct{ Name, Namespace string }
				Rules    []rbac.PolicyRule
				RoleRef  rbac.RoleRef
				Subjects []rbac.Subject
			}
			if err := yaml.Unmarshal(doc, &o); err != nil {
				tb.Fatalf("%s: %v", f, err)
			}
			for _, r := range o.Rules {
				for _, verb := range r.Verbs {
					if verb == "*" || slices.Contains(r.Resources, "*") || slices.Contains(r.APIGroups, "*") {
						tb.Errorf("%s: %s %s grants a wildcard", f, o.Kind, o.Metadata.Name)
					}
					for _, p := range r.NonResourceURLs {
						roles[o.Kind+"/"+o.Metadata.Name] = append(roles[o.Kind+"/"+o.Metadata.Name], grant{verb: verb, path: p})
					}
					for _, group := range r.APIGroups {
						for _, resource := range r.Resources {
							names := r.ResourceNames
							if len(names) == 0 {
								names = []string{""}
							}
							for _, name := range names {
								roles[o.Kind+"/"+o.Metadata.Name] = append(roles[o.Kind+"/"+o.Metadata.Name],
									grant{namespace: o.Metadata.Namespace, verb: verb, group: group, resource: resource, name: name})
							}
						}
					}
				}
			}
			for _, s := range o.Subjects {
				if s.Kind == rbac.ServiceAccountKind && s.Namespace+"/"+s.Name == account {
					bound = append(bound, o.RoleRef.Kind+"/"+o.RoleRef.Name)
				}
			}
		}
	}
	for _, b := range bound {
		grants = append(grants, roles[b]...)
	}
	if len(grants) == 0 {
		tb.Fatalf("deploy/manifests grants nothing to %s", account)
	}
	return grants
}

// usesExactly fails on a call of the account that was refused, on one that
// deploy/manifests does not grant, and on a granted verb that was never used.
func usesExactly(t *testing.T, c *kubetest.Cluster, account string) {
	t.Helper()
	grants := grantsOf(t, account)
	used := map[grant]int{}
	calls := callsOf(t, c, account)
	for _, call := range calls {
		if call.Annotations["authorization.k8s.io/decision"] != "allow" {
			t.Errorf("%s: refused: %s (%s)", account, call, call.Annotations["authorization.k8s.io/reason"])
			continue
		}
		covered := false
		for _, g := range grants {
			if g.allows(call) {
				covered = true
				used[g]++
			}
		}
		if !covered {
			t.Errorf("%s: not granted by deploy/manifests: %s", account, call)
		}
	}
	var table strings.Builder
	for _, g := range grants {
		fmt.Fprintf(&table, "%6d  %s\n", used[g], g)
		if used[g] == 0 {
			t.Errorf("%s: granted and never used: %s", account, g)
		}
	}
	t.Logf("%s made %d calls; granted verbs and how often each was used:\n%s", account, len(calls), table.String())
}

// callsOf is what an account asked of the API server so far.
func callsOf(t testing.TB, c *kubetest.Cluster, account string) (calls []call) {
	t.Helper()
	user := "system:serviceaccount:" + strings.Replace(account, "/", ":", 1)
	s := bufio.NewScanner(bytes.NewReader(c.Audit(t)))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var e struct {
			call
			Stage string
		}
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		// A watch is written when it begins and when it ends.
		if e.User.Username == user && (e.Stage == "ResponseComplete" || e.Stage == "ResponseStarted" && e.Verb == "watch") {
			calls = append(calls, e.call)
		}
	}
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	return calls
}

func TestAuthorityUsesExactlyItsPermissions(t *testing.T) {
	t.Parallel()
	bin := programs(t)
	c := kubetest.Start(t, kubetest.Options{AuditLog: true})
	withoutRules(t, c)
	k := newKubeCA(t, bin, c, "")
	roots := k.roots()
	c.Node(t, "node-a")
	agent, _ := k.agent(roots, "node-a")
	web := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "web", Node: "node-a"})
	agent.mustIssue(t, byPodUID(string(web.UID)), "spiffe://cluster.local/ns/shop/sa/web")

	t.Run("the trust bundle is kept correct", func(t *testing.T) { keepsTrust(t, c) })
	t.Run("authors of policies are told", func(t *testing.T) { tellsAuthors(t, c) })

	// Once more, as with an API server that does not stream lists.
	k.stop("signet-ca", syscall.SIGTERM)
	t.Log("starting again without streamed lists")
	k.env = []string{"KUBE_FEATURE_WatchListClient=false"}
	k.start("signet-ca")
	again := k.attested(roots, c.Pod(t, kubetest.PodSpec{Namespace: "signet-system", ServiceAccount: "signet-agent", Node: "node-a", Name: "second"}))
	again.mustIssue(t, byPodUID(string(web.UID)), "spiffe://cluster.local/ns/shop/sa/web")
	// The new one has been elected once it reports again.
	breakPolicies(t, c, "again")
	k.stop("signet-ca", syscall.SIGTERM)
	usesExactly(t, c, "signet-system/signet-ca")
}

// keepsTrust edits, freezes and deletes the ConfigMap.
func keepsTrust(t *testing.T, c *kubetest.Cluster) {
	maps := c.Kube.CoreV1().ConfigMaps("signet-system")
	// with edits it, or says that somebody else did in between.
	with := func(edit func(m *core.ConfigMap)) error {
		m, err := maps.Get(t.Context(), "signet-trust", metav1.GetOptions{})
		if err != nil {
			return err
		}
		edit(m)
		_, err = maps.Update(t.Context(), m, metav1.UpdateOptions{})
		return err
	}
	m, err := maps.Get(t.Context(), "signet-trust", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	right := m.Data["root.pem"]
	if !strings.Contains(right, "BEGIN CERTIFICATE") {
		t.Fatalf("it holds %q", right)
	}
	for name, harm := range map[string]func() error{
		"another root": func() error {
			return with(func(m *core.ConfigMap) {
				m.Data["root.pem"] = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
			})
		},
		"another key": func() error {
			return with(func(m *core.ConfigMap) { m.Data["more.pem"], m.Labels["mine"] = right, "stays" })
		},
		"bytes":   func() error { return with(func(m *core.ConfigMap) { m.BinaryData = map[string][]byte{"x": {1}} }) },
		"deleted": func() error { return maps.Delete(t.Context(), "signet-trust", metav1.DeleteOptions{}) },
		"frozen while wrong": func() error {
			return with(func(m *core.ConfigMap) {
				frozen := true
				m.Data["root.pem"], m.Immutable = "wrong", &frozen
			})
		},
	} {
		began := time.Now()
		kubetest.Poll(t, name, harm) // the authority may write it once more in between
		kubetest.Poll(t, name+": the bundle to be right again", func() error {
			m, err := maps.Get(t.Context(), "signet-trust", metav1.GetOptions{})
			if err == nil && (len(m.Data) != 1 || m.Data["root.pem"] != right || len(m.BinaryData) != 0 || m.Immutable != nil && *m.Immutable) {
				err = fmt.Errorf("it holds %v", m.Data)
			}
			return err
		})
		t.Logf("%s: right again after %v", name, time.Since(began).Round(time.Millisecond))
	}
	if other, err := maps.List(t.Context(), metav1.ListOptions{}); err != nil || len(other.Items) > 2 {
		t.Errorf("other ConfigMaps in signet-system: %v, %v", other.Items, err)
	}
}

// withoutRules takes the validation rules out of the policy types, as in CRDs from
// before they had any: what is invalid then reaches the authority.
func withoutRules(t *testing.T, c *kubetest.Cluster) {
	t.Helper()
	d, err := dynamic.NewForConfig(c.Admin())
	if err != nil {
		t.Fatal(err)
	}
	crds := d.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	var strip func(any)
	strip = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			delete(v, "x-kubernetes-validations")
			for _, e := range v {
				strip(e)
			}
		case []any:
			for _, e := range v {
				strip(e)
			}
		}
	}
	for _, name := range []string{"authorizationpolicies", "peerauthentications", "requestauthentications"} {
		kubetest.Poll(t, "the rules to be gone", func() error {
			o, err := crds.Get(t.Context(), name+".security.istio.io", metav1.GetOptions{})
			if err != nil {
				return err
			}
			strip(o.Object["spec"])
			_, err = crds.Update(t.Context(), o, metav1.UpdateOptions{})
			return err
		})
	}
}

// breakPolicies makes one policy of each kind that is not enforced, and waits for
// its condition and Event.
func breakPolicies(t *testing.T, c *kubetest.Cluster, name string) {
	t.Helper()
	c.Namespace(t, "shop")
	meta := metav1.ObjectMeta{Namespace: "shop", Name: name}
	sec := c.Istio.SecurityV1()
	// The API server takes a moment to forget the rules.
	kubetest.Poll(t, "a PeerAuthentication without a selector to be taken", func() error {
		_, err := sec.PeerAuthentications("shop").Create(t.Context(), &security.PeerAuthentication{ObjectMeta: meta,
			Spec: api.PeerAuthentication{PortLevelMtls: map[uint32]*api.PeerAuthentication_MutualTLS{80: {Mode: api.PeerAuthentication_MutualTLS_STRICT}}}}, metav1.CreateOptions{})
		return err
	})
	_, errA := sec.AuthorizationPolicies("shop").Create(t.Context(), &security.AuthorizationPolicy{ObjectMeta: meta,
		Spec: api.AuthorizationPolicy{Rules: []*api.Rule{{To: []*api.Rule_To{{Operation: &api.Operation{Ports: []string{"none"}}}}}}}}, metav1.CreateOptions{})
	_, errR := sec.RequestAuthentications("shop").Create(t.Context(), &security.RequestAuthentication{ObjectMeta: meta,
		Spec: api.RequestAuthentication{JwtRules: []*api.JWTRule{{Issuer: "x", Jwks: "not a key set"}}}}, metav1.CreateOptions{})
	if err := errors.Join(errA, errR); err != nil {
		t.Fatal(err)
	}
	kubetest.Poll(t, "conditions and Events of three policies", func() error {
		for kind, get := range map[string]func() (any, error){
			"AuthorizationPolicy": func() (any, error) {
				return sec.AuthorizationPolicies("shop").Get(t.Context(), name, metav1.GetOptions{})
			},
			"PeerAuthentication": func() (any, error) {
				return sec.PeerAuthentications("shop").Get(t.Context(), name, metav1.GetOptions{})
			},
			"RequestAuthentication": func() (any, error) {
				return sec.RequestAuthentications("shop").Get(t.Context(), name, metav1.GetOptions{})
			},
		} {
			o, err := get()
			if err != nil {
				return err
			}
			b, err := json.Marshal(o)
			if err != nil {
				return err
			}
			if !bytes.Contains(b, []byte(`"signet.dev/Enforced"`)) || !bytes.Contains(b, []byte(`"False"`)) {
				return fmt.Errorf("%s has no condition: %s", kind, b)
			}
			events, err := c.Kube.CoreV1().Events("shop").List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + name + ",involvedObject.kind=" + kind})
			if err != nil {
				return err
			}
			if len(events.Items) != 1 || events.Items[0].Message == "" {
				return fmt.Errorf("%s has %d Events", kind, len(events.Items))
			}
		}
		return nil
	})
}

// tellsAuthors breaks a policy and mends it.
func tellsAuthors(t *testing.T, c *kubetest.Cluster) {
	breakPolicies(t, c, "broken")
	sec := c.Istio.SecurityV1().AuthorizationPolicies("shop")
	good, err := sec.Create(t.Context(), &security.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "good"},
		Spec: api.AuthorizationPolicy{Rules: []*api.Rule{{}}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	broken, err := sec.Get(t.Context(), "broken", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("condition: %s", broken.Status.Conditions)
	// Mended: the condition says so.
	if _, err := sec.Patch(t.Context(), "broken", apitypes.MergePatchType, []byte(`{"spec":{"rules":[{}]}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	kubetest.Poll(t, "the condition to be True", func() error {
		p, err := sec.Get(t.Context(), "broken", metav1.GetOptions{})
		if err == nil && (len(p.Status.Conditions) != 1 || p.Status.Conditions[0].Status != "True") {
			err = fmt.Errorf("it is %v", p.Status.Conditions)
		}
		return err
	})
	// What never had a problem is left alone.
	now, err := sec.Get(t.Context(), "good", metav1.GetOptions{})
	if err != nil || now.ResourceVersion != good.ResourceVersion {
		t.Errorf("a good policy was written to: %v, %v", now, err)
	}
}

func TestAgentUsesExactlyItsPermissions(t *testing.T) {
	t.Parallel()
	c := kubetest.Start(t, kubetest.Options{AuditLog: true})
	n := newKubeNode(t, c, "", "")
	// Each kind of policy reaches it.
	sec := c.Istio.SecurityV1()
	meta := metav1.ObjectMeta{Namespace: "shop", Name: "p"}
	_, errA := sec.AuthorizationPolicies("shop").Create(t.Context(), &security.AuthorizationPolicy{ObjectMeta: meta, Spec: api.AuthorizationPolicy{Rules: []*api.Rule{{}}}}, metav1.CreateOptions{})
	_, errP := sec.PeerAuthentications("shop").Create(t.Context(), &security.PeerAuthentication{ObjectMeta: meta}, metav1.CreateOptions{})
	if err := errors.Join(errA, errP); err != nil {
		t.Fatal(err)
	}
	n.stop("signet-agent", syscall.SIGTERM)
	// Once more, as with an API server that does not stream lists.
	n.env = append(n.env, "KUBE_FEATURE_WatchListClient=false")
	n.start("signet-agent")
	n.stop("signet-agent", syscall.SIGTERM)
	usesExactly(t, c, "signet-system/signet-agent")
}
