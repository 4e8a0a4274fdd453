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
	// first is the first problem of the gravest reason so far.
	reason Reason
	first  string
}

// invalid records that Istio's admission refuses the resource.
func (r *report) invalid(path, fix, format string, args ...any) {
	r.add(ReasonInvalid, path, fix, fmt.Sprintf(format, args...))
}

// unsupported records that Istio takes the resource and this version cannot
// enforce it.
func (r *report) unsupported(path, what string) {
	r.add(ReasonUnsupported, path, "leave it out; until then the workloads that the resource selects are denied",
		what+" is valid in Istio and not yet enforced here")
}

func (r *report) add(reason Reason, path, fix, message string) {
	if r.reason == "" || r.reason == ReasonUnsupported && reason == ReasonInvalid {
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
	if v, given := metadata["namespace"]; given && ok {
		k.namespace, ok = v.(string)
	}
	if !ok || name == "" || k.namespace == "" {
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
		res.policy = &security.AuthorizationPolicy{}
		message = res.policy
	case KindPeerAuthentication:
		res.peer = &security.PeerAuthentication{}
		message = res.peer
	case KindRequestAuthentication:
		message = &security.RequestAuthentication{}
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
	if message != nil {
		r.spec(object, message)
	}
	switch m := message.(type) {
	case *security.AuthorizationPolicy:
		r.authorizationPolicy(m, metadata)
		res.selector = selectorOf(m.GetSelector().GetMatchLabels())
		for i := range m.GetRules() {
			res.ruleLines = append(res.ruleLines, at.line(fmt.Sprintf("spec.rules[%d]", i)))
		}
	case *security.PeerAuthentication:
		r.peerAuthentication(m)
		res.selector = selectorOf(m.GetSelector().GetMatchLabels())
	case *security.RequestAuthentication:
		r.requestAuthentication(m)
		res.selector = selectorOf(m.GetSelector().GetMatchLabels())
	}
	if r.refused("spec.selector") {
		res.selector = nil
	}
	if r.reason != "" {
		res.reason, res.detail = r.reason, r.first
		res.policy, res.peer, res.ruleLines = nil, nil, nil
	}
	p.resources = append(p.resources, Resource{res})
	p.problems = append(p.problems, r.problems...)
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
			if _, ok := m[k].(string); !ok {
				r.invalid(keyPath("metadata."+f, k), "quote it", "is not a string")
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

// spec decodes the specification into message, strictly. A document without one
// has the empty one, as in Istio.
func (r *report) spec(object map[string]any, message proto.Message) {
	spec, given := object["spec"]
	if !given {
		return
	}
	r.schema(spec, message.ProtoReflect().Descriptor(), "spec")
	j, err := json.Marshal(spec)
	if err == nil {
		err = protojson.Unmarshal(j, message)
	}
	// Most of what protojson refuses, schema has refused with a place before.
	if err != nil && r.reason != ReasonInvalid {
		r.invalid("spec", "correct the field", "%s", clipPlain(err.Error()))
	}
	if err != nil {
		// Keep the selector, if that alone can be read.
		proto.Reset(message)
		if s, ok := spec.(map[string]any); ok && s["selector"] != nil && !r.refused("spec.selector") {
			if j, err := json.Marshal(map[string]any{"selector": s["selector"]}); err == nil {
				if protojson.Unmarshal(j, message) != nil {
					proto.Reset(message)
				}
			}
		}
	}
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
