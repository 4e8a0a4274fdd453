package authz

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	security "istio.io/api/security/v1beta1"
)

// report collects the problems of one resource.
type report struct {
	*parser
	resource string
	at       source
	problems []Problem
	warnings []Problem // for Lint
	// unloadable says that Envoy cannot load what Istio makes of the resource.
	unloadable bool
	// anyone says that the resource could be about any workload, whatever selector and
	// targets can be read.
	anyone bool
	// first is the first problem.
	reason Reason
	first  string
}

// invalid records that Istio's admission refuses the resource.
func (r *report) invalid(path, fix, format string, args ...any) {
	r.add(ReasonInvalid, path, fix, fmt.Sprintf(format, args...))
}

func (r *report) add(reason Reason, path, fix, message string) {
	if r.reason == "" {
		r.reason, r.first = reason, strings.TrimPrefix(path+": "+message, ": ")
	}
	if len(r.problems) >= maxProblems {
		return
	}
	r.problems = append(r.problems, Problem{
		Origin: r.origin, Line: r.at.line(path), Resource: r.resource, Field: path,
		Message: message, Fix: fix, Reason: reason,
	})
}

// warn records what the author of a resource that is accepted may not expect.
func (r *report) warn(code, path, fix, format string, args ...any) {
	r.note(SeverityWarning, code, path, fix, format, args...)
}

// danger records what Istio's admission accepts and Envoy cannot load.
func (r *report) danger(code, path, fix, format string, args ...any) {
	r.unloadable = true
	r.note(SeverityDanger, code, path, fix, format, args...)
}

func (r *report) note(severity Severity, code, path, fix, format string, args ...any) {
	if r.lint == nil || len(r.warnings) >= maxProblems {
		return
	}
	r.warnings = append(r.warnings, Problem{
		Origin: r.origin, Line: r.at.line(path), Resource: r.resource, Field: path, Severity: severity, Code: code,
		Message: fmt.Sprintf(format, args...), Fix: fix,
	})
}

// refused reports whether anything at or below the path is invalid.
func (r *report) refused(path string) bool {
	return slices.ContainsFunc(r.problems, func(p Problem) bool {
		return p.Reason == ReasonInvalid && strings.HasPrefix(p.Field, path) &&
			(len(p.Field) == len(path) || strings.IndexByte(".[", p.Field[len(path)]) >= 0)
	}) || len(r.problems) >= maxProblems
}

// policy takes a document of the policies' group, or of one of their kinds.
func (p *parser) policy(object map[string]any, at source, k key, apiGroup, version string) {
	metadata, _ := object["metadata"].(map[string]any)
	k.namespace = "default"
	name, ok := metadata["name"].(string)
	// kubectl takes null and "" for none.
	if v := metadata["namespace"]; v != nil && v != "" && ok {
		k.namespace, ok = v.(string)
	}
	if !ok || name == "" {
		p.unreadable(at.line("metadata"), fmt.Sprintf("%s has no name or no namespace that is a string", clip(k.kind)),
			"write metadata.name and metadata.namespace; quote what YAML takes for another type")
		return
	}
	k.name = name
	r := &report{parser: p, resource: k.id(), at: at}
	res := &resource{key: k, origin: p.origin, line: at.line("")}

	var message proto.Message
	switch k.kind {
	case KindAuthorizationPolicy:
		message = &security.AuthorizationPolicy{}
	case KindPeerAuthentication:
		res.peer = &security.PeerAuthentication{}
		message = res.peer
	case KindRequestAuthentication:
		res.token = &security.RequestAuthentication{}
		message = res.token
	}
	switch {
	case apiGroup != group:
		r.invalid("apiVersion", "write "+group+"/v1", "%s is not the group of this kind", clip(apiGroup))
	case message == nil:
		r.invalid("kind", "write one of AuthorizationPolicy, PeerAuthentication, RequestAuthentication", "no such kind of policy")
	case version != "v1" && version != "v1beta1":
		r.invalid("apiVersion", "write "+group+"/v1", "no such version: %s", clip(version))
	}
	r.envelope(object, metadata, res)
	r.annotations(metadata, k.kind)
	var spec tree
	if message != nil {
		spec = r.spec(object, message, schemas[k.kind])
	}
	switch m := message.(type) {
	case *security.AuthorizationPolicy:
		r.authorizationPolicy(m, spec, metadata)
		res.selector = selectorOf(m.GetSelector().GetMatchLabels())
		res.targets = targetsOf(m.GetTargetRef(), m.GetTargetRefs())
		res.dryRun = isDryRun(metadata)
		for i := range m.GetRules() {
			res.ruleLines = append(res.ruleLines, at.line(fmt.Sprintf("spec.rules[%d]", i)))
		}
	case *security.PeerAuthentication:
		r.peerAuthentication(m, spec)
		res.selector = selectorOf(m.GetSelector().GetMatchLabels())
	case *security.RequestAuthentication:
		r.requestAuthentication(m, spec)
		res.selector = selectorOf(m.GetSelector().GetMatchLabels())
		res.targets = targetsOf(m.GetTargetRef(), m.GetTargetRefs())
		for i := range m.GetJwtRules() {
			res.ruleLines = append(res.ruleLines, at.line(fmt.Sprintf("spec.jwtRules[%d]", i)))
		}
	}
	if r.reason != "" && (r.anyone || r.refused("spec.selector") || r.refused("spec.targetRef") || r.refused("spec.targetRefs")) {
		// It could have selected anything.
		res.selector, res.targets = nil, nil
	}
	if r.reason != ReasonInvalid {
		r.advise(message, res, spec, metadata)
	}
	res.unloadable = r.unloadable
	if r.reason != "" {
		res.reason, res.detail = r.reason, r.first
		res.peer, res.token, res.ruleLines = nil, nil, nil
	} else if m, ok := message.(*security.AuthorizationPolicy); ok {
		var err error
		if res.policy, err = proto.Marshal(m); err != nil {
			r.invalid("spec", "report this", "cannot be kept: %v", err)
			res.reason, res.detail = r.reason, r.first
		}
	}
	p.resources = append(p.resources, Resource{res})
	p.problems = append(append(p.problems, r.problems...), r.warnings...)
}

// advise says what the author of a resource that is accepted should know.
func (r *report) advise(message proto.Message, res *resource, spec tree, metadata map[string]any) {
	switch m := message.(type) {
	case *security.AuthorizationPolicy:
		r.loadable(m)
	case *security.RequestAuthentication:
		r.loadableTokens(m)
	}
	if r.lint == nil {
		return
	}
	switch m := message.(type) {
	case *security.AuthorizationPolicy:
		r.lintPolicy(m, spec, metadata)
	case *security.PeerAuthentication:
		r.lintPeer(m, res, spec)
	case *security.RequestAuthentication:
		r.lintTokens(m, spec)
	}
	r.remember(res, message)
}

// metadataFields are the fields of ObjectMeta.
var metadataFields = map[string]bool{
	"name": true, "generateName": true, "namespace": true, "selfLink": true, "uid": true, "resourceVersion": true,
	"generation": true, "creationTimestamp": true, "deletionTimestamp": true, "deletionGracePeriodSeconds": true,
	"labels": true, "annotations": true, "ownerReferences": true, "finalizers": true, "managedFields": true,
}

// envelope checks what every Kubernetes object has.
func (r *report) envelope(object, metadata map[string]any, res *resource) {
	for _, f := range sorted(object) {
		switch f {
		case "apiVersion", "kind", "metadata", "spec", "status":
		default:
			r.invalid(fieldPath("", f), "remove it or correct its spelling", "unknown field")
		}
	}
	for _, f := range sorted(metadata) {
		if !metadataFields[f] {
			r.invalid(fieldPath("metadata", f), "remove it or correct its spelling", "unknown field")
		}
	}
	if !dnsName(res.name, 253, true) {
		r.invalid("metadata.name", "use lower-case letters, digits, '-' and '.'", "%s is no name that Kubernetes accepts", clip(res.name))
	}
	if !dnsName(res.namespace, 63, false) {
		r.invalid("metadata.namespace", "use lower-case letters, digits and '-'", "%s is no namespace that Kubernetes accepts", clip(res.namespace))
	}
	// null is what kubectl prints for an object that was never created.
	if v := metadata["creationTimestamp"]; v != nil {
		s, _ := v.(string)
		t, err := time.Parse(time.RFC3339, s)
		if err != nil {
			r.invalid("metadata.creationTimestamp", "write it as 2006-01-02T15:04:05Z or leave it out", "is not a time")
		}
		res.created = t
	}
	for _, f := range []string{"labels", "annotations"} {
		v, given := metadata[f]
		if !given || v == nil {
			continue
		}
		m, ok := v.(map[string]any)
		if !ok {
			r.invalid("metadata."+f, "write pairs of names and strings", "is not an object")
			continue
		}
		r.sameSize(len(m), "metadata."+f)
		for _, k := range sorted(m) {
			v, ok := m[k].(string)
			switch {
			case !ok:
				r.invalid(keyPath("metadata."+f, k), "quote it", "is not a string")
			case !qualifiedName(k, f == "annotations"):
				r.invalid(keyPath("metadata."+f, k), "write NAME or DOMAIN/NAME", "is no name that Kubernetes accepts")
			case f == "labels" && v != "" && !labelName(v):
				r.invalid(keyPath("metadata."+f, k), "use at most 63 letters, digits, '-', '_' and '.'", "%s is no value that Kubernetes accepts", clip(v))
			}
		}
	}
}

// dnsName reports whether s is a DNS label (RFC 1123), or labels joined by
// dots.
func dnsName(s string, most int, dots bool) bool {
	if len(s) == 0 || len(s) > most {
		return false
	}
	labels := []string{s}
	if dots {
		labels = strings.Split(s, ".")
	}
	for _, l := range labels {
		if l == "" || l[0] == '-' || l[len(l)-1] == '-' {
			return false
		}
		for i := range len(l) {
			if c := l[i]; !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
				return false
			}
		}
	}
	return true
}

// qualifiedName reports whether s can name a label or an annotation: a name, and
// perhaps a DNS name and a slash before it. Annotations ignore case.
func qualifiedName(s string, anyCase bool) bool {
	prefix, name, two := strings.Cut(s, "/")
	if !two {
		return labelName(s)
	}
	if anyCase {
		prefix = strings.ToLower(prefix)
	}
	return dnsName(prefix, 253, true) && labelName(name)
}

// labelName reports whether s can be the name or the value of a label.
func labelName(s string) bool {
	alnum := func(c byte) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
	}
	if len(s) == 0 || len(s) > 63 || !alnum(s[0]) || !alnum(s[len(s)-1]) {
		return false
	}
	for i := range len(s) {
		if !alnum(s[i]) && strings.IndexByte("-_.", s[i]) < 0 {
			return false
		}
	}
	return true
}

// spec decodes the specification into message, strictly, and returns it as it was
// written, without nulls. A document without one has the empty one, as in Istio;
// so has one whose specification is refused, but for what says whom it is about.
func (r *report) spec(object map[string]any, message proto.Message, s *schema) tree {
	value, given := object["spec"]
	if !given {
		return nil
	}
	if value == nil {
		r.warn("null-field", "spec", "remove it, or write the value", "null is read as if the field were not there")
		return nil
	}
	r.conform(value, s, "spec")
	spec, _ := value.(map[string]any)
	// Of a field that is there twice nobody knows which is meant.
	r.anyone = slices.ContainsFunc(r.problems, func(p Problem) bool { return p.Field == "spec" })
	refused := r.refused("spec")
	err := unmarshalSpec(spec, message)
	if err == nil {
		return spec
	}
	if !refused {
		r.invalid("spec", "correct the field", "%s", clipPlain(err.Error()))
	}
	// Keep what says whom it is about, if that alone can be read.
	proto.Reset(message)
	kept := tree{}
	for _, field := range aboutFields {
		if v, given := spec[field]; given && !r.refused("spec."+field) {
			kept[field] = v
		}
	}
	if len(kept) == 0 || unmarshalSpec(kept, message) == nil {
		return kept
	}
	proto.Reset(message)
	r.anyone = true
	return nil
}

// aboutFields are the fields of a specification that say whom it is about.
var aboutFields = []string{"selector", "targetRef", "targetRefs"}

// unmarshalSpec decodes a specification whose unknown fields have been refused.
// Istio's reader takes times as Go writes them, such as 1m.
func unmarshalSpec(spec map[string]any, message proto.Message) error {
	for i, rule := range tree(spec).list("jwtRules") {
		s, ok := rule["timeout"].(string)
		if !ok {
			continue
		}
		d, err := time.ParseDuration(s)
		if err != nil {
			return fmt.Errorf("jwtRules[%d].timeout: %s is no duration, such as 5s", i, clip(s))
		}
		if d < time.Millisecond {
			return fmt.Errorf("jwtRules[%d].timeout: %s is less than 1ms", i, s)
		}
		rule["timeout"] = fmt.Sprintf("%d.%09ds", d/time.Second, d%time.Second)
	}
	j, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	return protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(j, message)
}

// clipPlain bounds an error's text in a message.
func clipPlain(s string) string {
	// protojson writes no-break spaces so that nobody relies on its texts.
	s = strings.ReplaceAll(s, "\u00a0", " ")
	s = strings.TrimPrefix(s, "proto: ")
	const most = 200
	if len(s) > most {
		s = s[:most] + "…"
	}
	if q := strconv.Quote(s); q != `"`+s+`"` {
		return q
	}
	return s
}

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
