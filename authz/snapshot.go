package authz

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
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
	// MultipleProviders says that CUSTOM policies of one workload may have
	// different providers, each of which is asked, as with Istio's
	// PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS. Without it a request that
	// such policies match is denied.
	MultipleProviders bool
	// Envoy is the version of the proxies whose reading of requests is followed
	// where versions differ; zero means the newest known.
	Envoy EnvoyVersion
}

func (o Options) root() string { return cmp.Or(o.RootNamespace, "istio-system") }

// EnvoyVersion is a version of Envoy, of which only what policies decide by
// matters:
//
//   - 1.37.1 and later, and the fixed releases of older lines (1.36.5, 1.35.8 and
//     1.34.13), match each value of a repeated header by itself; earlier ones
//     match all of them joined by commas.
//   - 1.34.1 and later, and the fixed releases of older lines (1.33.3, 1.32.6 and
//     1.31.8), take "*" for a character of a segment in a path template; to earlier
//     ones a path with it matches no template.
//
// What 1.38.4 changed about parameters of path segments ("/a;x/..;/b") happens
// where the proxy normalizes the path, before any policy sees it.
type EnvoyVersion struct{ Major, Minor, Patch int }

// ParseEnvoyVersion reads "1.40.0", or "1.40" for its first release.
func ParseEnvoyVersion(s string) (EnvoyVersion, error) {
	var v EnvoyVersion
	parts := strings.Split(s, ".")
	if len(parts) != 2 && len(parts) != 3 {
		return v, fmt.Errorf("%s is no version of Envoy; write it as 1.40.0", clip(s))
	}
	for i, to := range []*int{&v.Major, &v.Minor, &v.Patch}[:len(parts)] {
		n, err := strconv.ParseUint(parts[i], 10, 16)
		if err != nil {
			return EnvoyVersion{}, fmt.Errorf("%s is no version of Envoy; write it as 1.40.0", clip(s))
		}
		*to = int(n)
	}
	return v, nil
}

// has reports whether a change is in the version that came with one release and
// was brought to older lines by others.
func (v EnvoyVersion) has(first EnvoyVersion, older ...EnvoyVersion) bool {
	if v == (EnvoyVersion{}) {
		return true
	}
	for _, o := range older {
		if v.Major == o.Major && v.Minor == o.Minor {
			return v.Patch >= o.Patch
		}
	}
	return cmp.Or(cmp.Compare(v.Major, first.Major), cmp.Compare(v.Minor, first.Minor), cmp.Compare(v.Patch, first.Patch)) >= 0
}

func (v EnvoyVersion) language() language {
	return language{
		joins:    !v.has(EnvoyVersion{1, 37, 1}, EnvoyVersion{1, 36, 5}, EnvoyVersion{1, 35, 8}, EnvoyVersion{1, 34, 13}),
		asterisk: v.has(EnvoyVersion{1, 34, 1}, EnvoyVersion{1, 33, 3}, EnvoyVersion{1, 32, 6}, EnvoyVersion{1, 31, 8}),
	}
}

// Snapshot is a compiled [Set]: immutable to its users, safe for concurrent use,
// to be swapped as a whole. A nil Snapshot stands for policies that were never
// loaded; it denies everything with [ReasonNoPolicies].
type Snapshot struct {
	*compiler
	spaces map[string]*space
	// others is the space of the namespaces without policies of their own.
	others     *space
	generation uint64
	bans       *banned
}

// Generation counts the snapshots from the one that Compile made, which is 1. It is
// 0 for a nil Snapshot.
func (s *Snapshot) Generation() uint64 {
	if s == nil {
		return 0
	}
	return s.generation
}

// policy is a compiled resource.
type policy struct {
	*resource
	by *compiler
	// serial tells policies apart, in this snapshot and in those that follow it.
	serial uint64
	// root says that the policy is of the root namespace.
	root bool
	// whole names the resource where no rule does. Its Reason is why it is refused
	// whatever it says, or empty.
	whole *Rule
	// The rules of a RequestAuthentication, or those of an AuthorizationPolicy:
	// listed are all, rules those that can match a request.
	tokens []tokenRule
	listed []*Rule
	rules  []*rule
	// reads are the attributes that the rules read, names what of those they read by
	// name.
	reads Field
	names []Name
	// problems are what compiling found.
	problems []Problem
}

// Compile turns a set into a snapshot. It does not fail: what it reports are
// warnings about policies that are enforced as they are written.
func Compile(s Set, o Options) (*Snapshot, []Problem) {
	c := &compiler{options: o, domains: newDomains(o), language: o.Envoy.language()}
	return (&Snapshot{compiler: c}).Update(s)
}

// Update compiles a set with the options of s, which must not be nil, and keeps
// of s what the change leaves as it was: the policies whose resources are the
// same, and the programs in which only those are. s goes on as it is.
func (s *Snapshot) Update(set Set) (*Snapshot, []Problem) {
	if s.compiler == nil { // nobody compiled it
		return Compile(set, Options{})
	}
	root := s.options.root()
	next := &Snapshot{compiler: s.compiler, generation: s.generation + 1, bans: s.bans.again()}
	var mesh []*policy
	own := make(map[string][]*policy, len(s.spaces))
	var problems []Problem
	for r := range set.resources {
		p := s.policy(r)
		problems = append(problems, p.problems...)
		switch {
		case p.key.kind == KindPeerAuthentication && p.key.namespace == root && len(p.selector) > 0:
			problems = append(problems, Problem{
				Origin: r.origin, Line: r.line, Resource: r.id(), Field: "spec.selector", Severity: SeverityWarning,
				Message: "a PeerAuthentication with a selector in the root namespace selects nothing",
				Fix:     "move it to the namespace of the workload, or remove the selector",
			})
		case p.key.namespace == root, p.whole.Reason == ReasonUnreadable:
			mesh = append(mesh, p)
		default:
			own[p.key.namespace] = append(own[p.key.namespace], p)
		}
	}
	slices.SortStableFunc(problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Resource, b.Resource), cmp.Compare(a.Line, b.Line))
	})

	bySerial := func(a, b *policy) int { return cmp.Compare(a.serial, b.serial) }
	slices.SortFunc(mesh, bySerial)
	next.others = next.space(mesh, s.others, false)
	next.spaces = make(map[string]*space, len(own)+1)
	next.spaces[root] = next.space(mesh, s.spaces[root], true)
	for ns, policies := range own {
		slices.SortFunc(policies, bySerial)
		next.spaces[ns] = next.space(slices.Concat(mesh, policies), s.spaces[ns], false)
	}
	return next, problems
}

// compiler is shared by a snapshot and those that follow it.
type compiler struct {
	language
	options Options
	domains domains
	// serial is the number of the last policy that was compiled.
	serial atomic.Uint64
}

// policy is what the resource comes to. It is kept with the resource, so that the
// next snapshot of the same compiler has it.
func (c *compiler) policy(r *resource) *policy {
	if done := r.compiled.Load(); done != nil && done.by == c {
		return done
	}
	p := c.compile(r)
	p.root = p.key.namespace == c.options.root()
	r.compiled.Store(p)
	return p
}

func (c *compiler) compile(r *resource) *policy {
	p := &policy{resource: r, by: c, serial: c.serial.Add(1)}
	p.whole = &Rule{
		Kind: r.kind, Namespace: r.namespace, Name: r.name, Index: -1, DryRun: r.dryRun,
		Origin: r.origin, Line: r.line, Reason: r.reason, detail: r.detail,
	}
	switch r.kind {
	case KindAuthorizationPolicy, KindPeerAuthentication, KindRequestAuthentication:
	default:
		p.whole.Kind = "" // no kind that there is; metrics and scripts need not know it
	}
	if r.name != "" {
		p.whole.policy = r.key.policy()
		p.whole.order = order(r.key, 0)
	}
	if r.reason != "" {
		p.whole.Action = ActionDeny
		return p
	}
	for i, spec := range r.token.GetJwtRules() {
		by := *p.whole
		by.Index, by.Line = i, r.ruleLines[i]
		p.tokens = append(p.tokens, newTokenRule(TokenRule{
			Namespace: r.namespace, Name: r.name, Index: i, Origin: r.origin, Line: by.Line, Spec: spec,
		}, &by))
	}
	if len(p.tokens) > 0 {
		p.reads = FieldClaims | FieldHeaders | FieldMethod | FieldPath
	}
	if r.kind != KindAuthorizationPolicy {
		return p
	}
	spec, err := r.spec()
	if err != nil { // never, but a policy that is not enforced must not open anything
		p.whole.Reason, p.whole.detail, p.whole.Action = ReasonInvalid, err.Error(), ActionDeny
		return p
	}
	switch spec.GetAction() {
	case security.AuthorizationPolicy_DENY:
		p.whole.Action = ActionDeny
	case security.AuthorizationPolicy_AUDIT:
		p.whole.Action = ActionAudit
	case security.AuthorizationPolicy_CUSTOM:
		p.whole.Action = ActionCustom
		p.whole.Provider = spec.GetProvider().GetName()
	}
	for i, rule := range spec.GetRules() {
		meta := new(Rule)
		*meta = *p.whole
		meta.Index, meta.Line = i, r.ruleLines[i]
		meta.order = order(r.key, i)
		meta.of = p
		for _, v := range c.domains.expand(rule) {
			p.problems = append(p.problems, Problem{
				Origin: r.origin, Line: meta.Line, Resource: r.id(), Field: fmt.Sprintf("spec.rules[%d]", i), Severity: SeverityWarning,
				Message: fmt.Sprintf("principal %s is of a trust domain that is neither the mesh's nor an alias of it", clip(v)),
				Fix:     "correct the trust domain, or add it as an alias",
			})
		}
		p.listed = append(p.listed, meta)
		if compiled := newRule(meta, rule, c.language, false); compiled != nil {
			p.rules = append(p.rules, compiled)
			p.reads |= compiled.fields() // bare connections have no other conditions
			p.names = compiled.names(p.names)
		}
	}
	return p
}

// spec is the AuthorizationPolicy.
func (r *resource) spec() (*security.AuthorizationPolicy, error) {
	m := &security.AuthorizationPolicy{}
	err := proto.Unmarshal(r.policy, m)
	return m, err
}

// specs are the rules of the policy with the aliases of trust domains written
// out.
func (p *policy) specs() []*security.Rule {
	spec, _ := p.spec() // compiling has read it
	rules := spec.GetRules()
	for _, r := range rules {
		p.by.domains.expand(r)
	}
	return rules
}

// order is the name that Envoy sorts the policies of a filter by.
func order(k key, rule int) string {
	return "ns[" + k.namespace + "]-policy[" + k.name + "]-rule[" + strconv.Itoa(rule) + "]"
}

// space is the policies that can select a workload of one namespace.
type space struct {
	options *Options
	// root says that it is the root namespace.
	root     bool
	policies []*policy
	// labels are the names of the labels that selectors of the policies read,
	// sorted. Workloads that agree on them have the same program.
	labels []string

	mu sync.RWMutex
	// classes are the programs by the values of the labels, guarded by mu.
	classes map[string]*Program
	// programs are the programs by the policies that are in them, guarded by mu.
	programs map[string]*Program
	// inherited are the programs of the snapshot before, guarded by mu, and
	// ancestors those by the values of the labels, if the labels are the same.
	inherited, ancestors map[string]*Program
}

// maxClasses bounds what a space remembers. Beyond it begins anew, so that
// labels which nobody has any more do not stay for ever.
const maxClasses = 4096

// space is that of the policies: the one of the snapshot before if they are the
// same, else a new one which has its programs.
func (s *Snapshot) space(policies []*policy, before *space, root bool) *space {
	if before != nil && slices.Equal(before.policies, policies) {
		return before
	}
	labels := make(map[string]bool)
	for _, p := range policies {
		for _, l := range p.selector {
			labels[l.name] = true
		}
		if p.key.kind != KindPeerAuthentication {
			labels[gatewayLabel], labels[managedLabel] = true, true
		}
	}
	sp := &space{
		options: &s.compiler.options, root: root, policies: policies, labels: slices.Sorted(maps.Keys(labels)),
		classes: make(map[string]*Program), programs: make(map[string]*Program),
	}
	if before != nil {
		before.mu.RLock()
		sp.inherited = maps.Clone(before.programs)
		if slices.Equal(sp.labels, before.labels) {
			sp.ancestors = maps.Clone(before.classes)
		}
		before.mu.RUnlock()
	}
	return sp
}

// For is the program of the policies that select w, by its namespace and its
// labels. Workloads that the same policies select share one, and asking again
// for a class of workloads is a look-up. It returns nil, which denies, only for
// a nil or zero Snapshot.
func (s *Snapshot) For(w identity.Workload) *Program {
	if s == nil || s.compiler == nil {
		return nil
	}
	sp := s.others
	if own, ok := s.spaces[w.Namespace]; ok {
		sp = own
	}
	if sp == nil { // nobody compiled it
		return nil
	}
	p := sp.program(w.Labels)
	if s.bans != nil {
		p = s.bans.program(p)
	}
	return p
}

// program is that of a workload with the labels.
func (s *space) program(labels map[string]string) *Program {
	class := make([]byte, 0, 256) // on the stack
	for _, name := range s.labels {
		if v, ok := labels[name]; ok {
			class = binary.AppendUvarint(class, uint64(len(v))+1)
			class = append(class, v...)
		} else {
			class = append(class, 0)
		}
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
	for _, pol := range s.policies {
		if pol.selects(labels, pol.root == s.root) {
			chosen = append(chosen, pol)
			members = binary.AppendUvarint(members, pol.serial)
		}
	}
	if p = s.programs[string(members)]; p == nil {
		if p = s.inherited[string(members)]; p == nil {
			p = newProgram(chosen, s.options, s.ancestors[string(class)])
		}
		s.programs[string(members)] = p
	}
	s.classes[string(class)] = p
	return p
}

// newProgram is the program of the policies, which are sorted by serial. What it
// has in common with before, which may be nil, is taken from there.
func newProgram(policies []*policy, o *Options, before *Program) *Program {
	p := &Program{language: o.Envoy.language(), compiled: true, reads: FieldPeer | FieldDestinationPort}
	var peers []*policy
	layers := make(map[layer][]*policy)
	var named map[Name]bool
	for _, pol := range policies {
		p.reads |= pol.reads
		for _, n := range pol.names {
			if !named[n] {
				if named == nil {
					named = make(map[Name]bool)
				}
				named[n] = true
				p.names = append(p.names, n)
			}
		}
		switch {
		case pol.whole.Reason != "":
			p.refused = append(p.refused, pol.whole)
		case pol.kind == KindPeerAuthentication:
			peers = append(peers, pol)
		case pol.kind == KindRequestAuthentication:
			p.tokens = append(p.tokens, pol.tokens...)
		default:
			at := layer{pol.whole.Action, pol.whole.Provider, pol.whole.DryRun}
			layers[at] = append(layers[at], pol)
		}
	}
	// The policies are in the order in which they were compiled, which is no order to
	// report by: a restart, or another replica, would name others.
	slices.SortFunc(p.refused, func(a, b *Rule) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.policy, b.policy), cmp.Compare(a.Origin, b.Origin), cmp.Compare(a.Line, b.Line))
	})
	slices.SortFunc(p.tokens, func(a, b tokenRule) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Index, b.Index))
	})
	for _, t := range p.tokens {
		p.verifies = append(p.verifies, t.TokenRule)
	}
	slices.SortStableFunc(p.verifies, func(a, b *TokenRule) int { return cmp.Compare(a.Spec.GetIssuer(), b.Spec.GetIssuer()) })
	p.outputs = p.tokens.outputs()
	p.peer = compose(peers, o.root())
	for _, at := range slices.SortedFunc(maps.Keys(layers), layer.compare) {
		var rules *ruleset
		if was := before.layer(at); was == nil {
			rules = newRuleset(layers[at], p.language)
		} else if rules = was; !slices.Equal(was.policies, layers[at]) {
			rules = was.follow(layers[at])
		}
		p.layers = append(p.layers, ranked{at, rules})
		switch {
		case at.action == ActionCustom:
			p.custom = append(p.custom, provider{at.provider, rules})
		case at.action == ActionAudit:
			p.audit = rules
		case at.action == ActionDeny && at.dryRun:
			p.shadowDeny = rules
		case at.action == ActionDeny:
			p.deny = rules
		case at.dryRun:
			p.shadowAllow = rules
		default:
			p.allow = rules
		}
	}
	p.several = len(p.custom) > 1 && !o.MultipleProviders
	return p
}

// layer is the ruleset of a layer, or nil.
func (p *Program) layer(at layer) *ruleset {
	if p == nil {
		return nil
	}
	for _, l := range p.layers {
		if l.layer == at {
			return l.rules
		}
	}
	return nil
}
