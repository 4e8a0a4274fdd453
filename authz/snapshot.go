package authz

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/identity"
)

// Options are the facts about the mesh that policies refer to.
type Options struct {
	// TrustDomain is the mesh's own; zero means cluster.local.
	TrustDomain spiffeid.TrustDomain
	// TrustDomainAliases are further names of it, as in the trustDomainAliases
	// of Istio's mesh configuration; one may begin or end with a star.
	TrustDomainAliases []string
	// RootNamespace is where mesh-wide resources live; empty means istio-system.
	RootNamespace string
}

func (o Options) root() string { return cmp.Or(o.RootNamespace, "istio-system") }

// Snapshot is a compiled [Set]: immutable to its users, safe for concurrent use,
// to be swapped as a whole. A nil Snapshot stands for policies that were never
// loaded; it denies everything with [ReasonNoPolicies].
type Snapshot struct {
	spaces map[string]*space
	// others is the space of the namespaces without policies of their own.
	others *space
}

// policy is a compiled resource.
type policy struct {
	key      key
	created  time.Time
	selector []label
	// whole names the resource where no rule does.
	whole *Rule
	// One of three: refused for a reason, a PeerAuthentication, or rules.
	reason Reason
	peer   *security.PeerAuthentication
	rules  []*rule
	action Action
}

// Compile turns a set into a snapshot. It does not fail: what it reports are
// warnings about policies that are enforced as they are written.
func Compile(s Set, o Options) (*Snapshot, []Problem) {
	c := &compiler{root: o.root(), domains: newDomains(o)}
	var mesh []*policy
	own := make(map[string][]*policy)
	for res := range s.All() {
		p := c.policy(res.r)
		switch {
		case p.key.kind == KindPeerAuthentication && p.key.namespace == c.root && len(p.selector) > 0:
			c.problems = append(c.problems, Problem{
				Origin: res.r.origin, Line: res.r.line, Resource: res.r.id(), Field: "spec.selector", Severity: SeverityWarning,
				Message: "a PeerAuthentication with a selector in the root namespace selects nothing",
				Fix:     "move it to the namespace of the workload, or remove the selector",
			})
		case p.key.namespace == c.root, p.reason == ReasonUnreadable:
			mesh = append(mesh, p)
		default:
			own[p.key.namespace] = append(own[p.key.namespace], p)
		}
	}
	snap := &Snapshot{spaces: make(map[string]*space, len(own)), others: newSpace(mesh, c.root)}
	for ns, policies := range own {
		snap.spaces[ns] = newSpace(slices.Concat(mesh, policies), c.root)
	}
	return snap, c.problems
}

type compiler struct {
	root     string
	domains  domains
	problems []Problem
}

func (c *compiler) policy(r *resource) *policy {
	p := &policy{key: r.key, created: r.created, selector: r.selector, reason: r.reason, peer: r.peer}
	p.whole = &Rule{
		Kind: r.kind, Namespace: r.namespace, Name: r.name, Index: -1,
		Origin: r.origin, Line: r.line, Reason: r.reason, detail: r.detail,
	}
	switch r.kind {
	case KindAuthorizationPolicy, KindPeerAuthentication, KindRequestAuthentication:
	default:
		p.whole.Kind = "" // no kind that there is; metrics and scripts need not know it
	}
	if r.name != "" {
		p.whole.policy = r.key.policy()
	}
	if r.reason != "" {
		p.whole.Action = ActionDeny
	}
	if r.policy == nil {
		return p
	}
	if r.policy.GetAction() == security.AuthorizationPolicy_DENY {
		p.action = ActionDeny
		p.whole.Action = ActionDeny
	}
	for i, spec := range r.policy.GetRules() {
		meta := *p.whole
		meta.Index, meta.Line = i, r.ruleLines[i]
		var foreign []string
		meta.Spec, foreign = c.domains.expand(spec)
		for _, v := range foreign {
			c.problems = append(c.problems, Problem{
				Origin: r.origin, Line: meta.Line, Resource: r.id(), Field: fmt.Sprintf("spec.rules[%d]", i), Severity: SeverityWarning,
				Message: fmt.Sprintf("principal %s is of a trust domain that is neither the mesh's nor an alias of it", clip(v)),
				Fix:     "correct the trust domain, or add it as an alias",
			})
		}
		p.rules = append(p.rules, newRule(&meta))
	}
	return p
}

// space is the policies that can select a workload of one namespace.
type space struct {
	root     string
	policies []*policy
	// labels are the names of the labels that selectors of the policies read,
	// sorted. Workloads that agree on them have the same program.
	labels []string

	mu sync.RWMutex
	// classes are the programs by the values of the labels, guarded by mu.
	classes map[string]*Program
	// programs are the programs by the policies that are in them, guarded by mu.
	programs map[string]*Program
}

// maxClasses bounds what a space remembers. Beyond it begins anew, so that
// labels which nobody has any more do not stay for ever.
const maxClasses = 4096

func newSpace(policies []*policy, root string) *space {
	labels := make(map[string]bool)
	for _, p := range policies {
		for _, l := range p.selector {
			labels[l.name] = true
		}
	}
	return &space{
		root: root, policies: policies, labels: slices.Sorted(maps.Keys(labels)),
		classes: make(map[string]*Program), programs: make(map[string]*Program),
	}
}

// For is the program of the policies that select w, by its namespace and its
// labels. Workloads that the same policies select share one, and asking again
// for a class of workloads is a look-up. It returns nil, which denies, only for
// a nil or zero Snapshot.
func (s *Snapshot) For(w identity.Workload) *Program {
	if s == nil {
		return nil
	}
	sp := s.others
	if own, ok := s.spaces[w.Namespace]; ok {
		sp = own
	}
	if sp == nil { // nobody compiled it
		return nil
	}
	return sp.program(w.Labels)
}

func (s *space) program(labels map[string]string) *Program {
	var buf [256]byte
	class := buf[:0]
	for _, name := range s.labels {
		v, ok := labels[name]
		if !ok {
			class = append(class, 0)
			continue
		}
		class = binary.AppendUvarint(class, uint64(len(v))+1)
		class = append(class, v...)
	}
	s.mu.RLock()
	p := s.classes[string(class)]
	s.mu.RUnlock()
	if p != nil {
		return p
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.classes[string(class)]; p != nil {
		return p
	}
	if len(s.classes) >= maxClasses {
		clear(s.classes)
		clear(s.programs)
	}
	var chosen []*policy
	var members []byte
	for i, pol := range s.policies {
		if selects(pol.selector, labels) {
			chosen = append(chosen, pol)
			members = binary.AppendUvarint(members, uint64(i))
		}
	}
	if p = s.programs[string(members)]; p == nil {
		p = newProgram(chosen, s.root)
		s.programs[string(members)] = p
	}
	s.classes[string(class)] = p
	return p
}

func newProgram(policies []*policy, root string) *Program {
	p := &Program{}
	var peers []*policy
	var deny, allow []*rule
	for _, pol := range policies {
		switch {
		case pol.reason != "":
			p.refused = append(p.refused, pol.whole)
		case pol.peer != nil:
			peers = append(peers, pol)
		case pol.action == ActionDeny:
			deny = append(deny, pol.rules...)
		default:
			p.allowing = true
			allow = append(allow, pol.rules...)
			if len(pol.rules) == 0 {
				p.empty = append(p.empty, pol.whole)
			}
		}
	}
	slices.SortFunc(p.refused, func(a, b *Rule) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.policy, b.policy), cmp.Compare(a.Origin, b.Origin), cmp.Compare(a.Line, b.Line))
	})
	p.peer = compose(peers, root)
	p.deny, p.allow = newRuleset(deny), newRuleset(allow)
	return p
}
