package authz

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/identity"
)

// This file is for those who explain decisions and try changes: it shows parts of
// what Decide does, each by itself and without an index.

// Truth is a logical value of three. The order makes "and" the minimum and "or"
// the maximum.
type Truth uint8

// What cannot be known is neither false nor true.
const (
	No Truth = iota
	Unknown
	Yes
)

// String is "no", "unknown" or "yes".
func (t Truth) String() string {
	switch t {
	case Yes:
		return "yes"
	case Unknown:
		return "unknown"
	}
	return "no"
}

// Matcher is one rule by itself. It is immutable and safe for concurrent use.
type Matcher struct {
	http, tcp *rule
	language  language
}

// NewMatcher compiles a rule, of which Index, Action, Namespace and Spec are read,
// for an Envoy. Spec has the aliases of trust domains written out. What Index -1
// stands for matches nothing.
func NewMatcher(r Rule, v EnvoyVersion) *Matcher {
	m := &Matcher{language: v.language()}
	if r.Index >= 0 {
		m.http, m.tcp = newRule(&r, r.Spec, m.language, false), newRule(&r, r.Spec, m.language, true)
	}
	return m
}

// Match holds the request against the rule.
func (m *Matcher) Match(r *Request) Truth {
	c := m.http
	if !r.HTTP {
		c = m.tcp
	}
	if c == nil {
		return No
	}
	v := newView(r, m.language)
	var buf [256]byte
	v.host = lower(v.host, buf[:])
	return Truth(c.match(&v))
}

// CheckTokens is what rules of RequestAuthentications say of a request: the reason
// of a denial and the index of the rule in whose name it is, or an empty reason.
func CheckTokens(rules []TokenRule, r *Request) (rule int, reason Reason) {
	if len(rules) == 0 {
		return -1, ""
	}
	ts := make(tokens, len(rules))
	for i := range rules {
		ts[i] = newTokenRule(rules[i], &Rule{Index: i})
	}
	v := newView(r, language{})
	by, reason := ts.check(&v)
	if by == nil {
		return -1, ""
	}
	return by.Index, reason
}

// PeerModes are the modes of PeerAuthentication: that of the ports which have none of
// their own, and those of the others, with the "NAMESPACE/NAME" of the resources that
// set them, empty where none did.
func (p *Program) PeerModes() (other PortMode, ports map[uint16]PortMode) {
	if p == nil || !p.compiled {
		return PortMode{Mode: ModeStrict}, nil
	}
	show := func(m peerMode) PortMode {
		out := PortMode{Mode: m.mode}
		if m.by != nil {
			out.Policy = m.by.policy
		}
		return out
	}
	ports = make(map[uint16]PortMode, len(p.peer.ports))
	for port, m := range p.peer.ports {
		ports[port] = show(m)
	}
	return show(p.peer.mode), ports
}

// PortMode is a mode and who set it.
type PortMode struct {
	Mode   Mode
	Policy string
}

// Options are what the snapshot was compiled with.
func (s *Snapshot) Options() Options {
	if s == nil || s.compiler == nil {
		return Options{}
	}
	return s.compiler.options
}

// Selects reports whether a resource is about a workload, and if not, why, as a
// clause for people. [Snapshot.For] follows the same rules.
func (s *Snapshot) Selects(r Resource, w identity.Workload) (selected bool, why string) {
	if s == nil || s.compiler == nil {
		return false, "no policies were loaded yet"
	}
	root := s.options.root()
	p := s.compiler.policy(r.r)
	switch {
	case p.whole.Reason == ReasonUnreadable:
		return true, ""
	case p.key.kind == KindPeerAuthentication && p.key.namespace == root && len(p.selector) > 0:
		return false, "a PeerAuthentication of the root namespace that has a selector selects nothing"
	case p.key.namespace != root && p.key.namespace != w.Namespace:
		return false, "it is of namespace " + plain(p.key.namespace)
	case p.selects(w.Labels, p.root == (w.Namespace == root)):
		return true, ""
	case len(p.targets) > 0:
		if _, ok := w.Labels[gatewayLabel]; !ok {
			return false, "it is attached by a target reference, which sidecars ignore"
		}
		return false, "it is attached to something else by its target references"
	}
	for _, l := range p.selector {
		switch v, ok := w.Labels[l.name]; {
		case !ok:
			return false, fmt.Sprintf("its selector demands %s=%s, and the workload has no such label", plain(l.name), plain(l.value))
		case v != l.value:
			return false, fmt.Sprintf("its selector demands %s=%s, and the workload has %s=%s", plain(l.name), plain(l.value), plain(l.name), plain(v))
		}
	}
	return false, "the workload is a waypoint, which honours no selectors"
}

// Spec is a copy of the resource's specification, a *security.AuthorizationPolicy,
// *security.PeerAuthentication or *security.RequestAuthentication; nil for a
// resource that cannot be enforced.
func (r Resource) Spec() proto.Message {
	switch {
	case r.r == nil || r.r.reason != "":
	case r.r.peer != nil:
		return proto.CloneOf(r.r.peer)
	case r.r.token != nil:
		return proto.CloneOf(r.r.token)
	case r.r.kind == KindAuthorizationPolicy:
		if m, err := r.r.spec(); err == nil {
			return m
		}
	}
	return nil
}

// DryRun reports whether the resource is a policy that only reports what it would
// have done.
func (r Resource) DryRun() bool { return r.r.dryRun }

// With is the resource with another specification, which is checked as Parse does. It
// stands where the resource does.
func (r Resource) With(spec proto.Message) (Resource, error) {
	j, err := protojson.Marshal(spec)
	if err != nil {
		return Resource{}, err
	}
	metadata := map[string]any{"name": r.r.name, "namespace": r.r.namespace}
	if !r.r.created.IsZero() {
		metadata["creationTimestamp"] = r.r.created.UTC().Format(time.RFC3339)
	}
	if r.r.dryRun {
		metadata["annotations"] = map[string]any{dryRun: "true"}
	}
	var value any
	dec := json.NewDecoder(bytes.NewReader(j))
	dec.UseNumber()
	if err := dec.Decode(&value); err != nil {
		return Resource{}, err
	}
	p := &parser{origin: r.r.origin}
	p.object(map[string]any{"apiVersion": group + "/v1", "kind": r.r.kind, "metadata": metadata, "spec": value}, source{}, false)
	changed, problems := p.resources, p.problems
	for _, p := range problems {
		if p.Severity == SeverityError {
			err = errors.Join(err, p)
		}
	}
	if err != nil {
		return Resource{}, err
	}
	if len(changed) != 1 {
		return Resource{}, fmt.Errorf("%s became %d resources", r, len(changed))
	}
	out := changed[0].r
	out.line, out.created = r.r.line, r.r.created
	for i := range out.ruleLines {
		out.ruleLines[i] = r.r.line
		if i < len(r.r.ruleLines) {
			out.ruleLines[i] = r.r.ruleLines[i]
		}
	}
	return changed[0], nil
}

// Resource is the "NAMESPACE/NAME" of the rule's resource, as it stands in decisions;
// empty for a document that could not be read.
func (r *Rule) Resource() string { return r.policy }
