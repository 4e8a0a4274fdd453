package explain

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	security "istio.io/api/security/v1beta1"
	typev1beta1 "istio.io/api/type/v1beta1"
	"sigs.k8s.io/yaml"

	"github.com/signet-mesh/signet/authz"
)

// newRule is one more rule for the ALLOW policy that is nearest and selects as few
// workloads.
func (s *search) newRule(a at) (Part, bool) {
	spec, text := s.exactRule(&a.Request)
	for _, m := range a.misses() {
		if ns, _, _ := strings.Cut(m.Policy, "/"); ns != s.Workload.Namespace {
			continue // a policy of the mesh would open it to all
		}
		id := authz.KindAuthorizationPolicy + " " + m.Policy
		if s.wide(id) {
			continue
		}
		return Part{
			On: id, Field: "spec.rules", Change: "add", Value: text, cost: 5, key: id + " new rule",
			Text: fmt.Sprintf("add a rule to ALLOW %s (%s) that allows exactly %s", m.Policy, m.Origin, text),
			yaml: func() string { return listItem(yamlOf(spec)) },
			policy: func(d *draft) error {
				m, err := d.spec(id)
				if err != nil {
					return err
				}
				p, ok := m.(*security.AuthorizationPolicy)
				if !ok {
					return errGone
				}
				p.Rules = append(p.Rules, proto.CloneOf(spec))
				return nil
			},
		}, true
	}
	return Part{}, false
}

// wide says that a policy has no selector though the workload could be selected, so
// that what it allows is allowed of more workloads.
func (s *search) wide(id string) bool {
	for r := range s.Set.All() {
		if p, ok := r.Spec().(*security.AuthorizationPolicy); ok && r.String() == id {
			return len(p.GetSelector().GetMatchLabels()) == 0 && len(s.Workload.Labels) > 0
		}
	}
	return true
}

// selector are labels that select the workload, and few others: those of a policy
// that does already, or those that name applications, or all.
func (s *search) selector() map[string]string {
	for r := range s.Set.All() {
		if p, ok := r.Spec().(*security.AuthorizationPolicy); ok && r.Namespace() == s.Workload.Namespace && len(p.GetSelector().GetMatchLabels()) > 0 {
			if selected, _ := s.Snapshot.Selects(r, s.Workload); selected {
				return p.GetSelector().GetMatchLabels()
			}
		}
	}
	for _, name := range []string{"app.kubernetes.io/name", "app", "k8s-app"} {
		if v, ok := s.Workload.Labels[name]; ok {
			return map[string]string{name: v}
		}
	}
	return maps.Clone(s.Workload.Labels)
}

// document is a resource as YAML.
func document(kind, namespace, name string, spec proto.Message) string {
	j, err := protojson.Marshal(spec)
	if err != nil {
		return ""
	}
	text, err := json.Marshal(map[string]any{
		"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": map[string]any{"namespace": namespace, "name": name}, "spec": json.RawMessage(j),
	})
	if err != nil {
		return ""
	}
	y, err := yaml.JSONToYAML(text)
	if err != nil {
		return ""
	}
	return string(y)
}

// unused is a name that no resource has.
func (s *search) unused(name string) string {
	name = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, lowerASCII(name))
	name = strings.Trim(name[:min(len(name), 50)], "-")
	try := name
	for i := 2; ; i++ {
		taken := false
		for r := range s.Set.All() {
			taken = taken || r.Namespace() == s.Workload.Namespace && r.Name() == try
		}
		if !taken {
			return try
		}
		try = fmt.Sprintf("%s-%d", name, i)
	}
}

func (s *search) create(kind, name string, spec proto.Message, text string, cost int, note string) Part {
	id := kind + " " + s.Workload.Namespace + "/" + name
	return Part{
		On: id, Change: "create", Text: text, cost: cost, key: "new " + kind, note: note,
		yaml: func() string { return document(kind, s.Workload.Namespace, name, spec) },
		policy: func(d *draft) error {
			d.added = append(d.added, document(kind, s.Workload.Namespace, name, spec))
			return nil
		},
	}
}

// newPolicy is a policy that says one thing.
func (s *search) newPolicy(r *authz.Request, action authz.Action) Part {
	rule, text := s.exactRule(r)
	p := &security.AuthorizationPolicy{Rules: []*security.Rule{rule}}
	verb := "allow"
	if action == authz.ActionDeny {
		p.Action, verb = security.AuthorizationPolicy_DENY, "deny"
	}
	labels := s.selector()
	note := ""
	if len(labels) > 0 {
		p.Selector = selectorOf(labels)
	} else {
		note = "the workload has no labels to select it by, so this is about every workload of the namespace"
	}
	who := "caller"
	if len(rule.From) > 0 && len(rule.From[0].Source.Principals) > 0 {
		name := rule.From[0].Source.Principals[0]
		who = name[strings.LastIndexByte(name, '/')+1:]
	}
	return s.create(authz.KindAuthorizationPolicy, s.unused(verb+"-"+who), p,
		fmt.Sprintf("create %s policy %s/%s that %s exactly %s", action, s.Workload.Namespace, s.unused(verb+"-"+who), map[string]string{"allow": "allows", "deny": "denies"}[verb], text), 6, note)
}

func selectorOf(labels map[string]string) *typev1beta1.WorkloadSelector {
	return &typev1beta1.WorkloadSelector{MatchLabels: labels}
}
