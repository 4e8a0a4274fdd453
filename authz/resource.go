package authz

import (
	"cmp"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	security "istio.io/api/security/v1beta1"
)

// Resource is one policy resource as it stands in its origin: usable, or not,
// and then with what it would have selected. It is immutable; the zero Resource
// is none.
type Resource struct{ r *resource }

// Kind is the resource's kind; empty for a document that could not be read.
func (r Resource) Kind() string { return r.r.kind }

// Namespace is where the resource lives. It is "default" where the document
// does not say, which is where kubectl would put it.
func (r Resource) Namespace() string { return r.r.namespace }

// Name is the resource's name.
func (r Resource) Name() string { return r.r.name }

// Origin is the text that the resource was read from, and the line in it at
// which its document begins.
func (r Resource) Origin() (name string, line int) { return r.r.origin, r.r.line }

// Reason is why the resource cannot be enforced as it stands, or empty if it
// can.
func (r Resource) Reason() Reason { return r.r.reason }

// Loadable reports whether a proxy can load what Istio makes of the resource.
// Istio's admission accepts a few that crash Envoy or that it refuses; they are
// decided as written, and must not be handed to a proxy.
func (r Resource) Loadable() bool { return !r.r.unloadable }

// String is "KIND NAMESPACE/NAME".
func (r Resource) String() string { return r.r.id() }

// resource is what a Resource points to. Once Parse has returned it, nobody
// writes to it, but for compiled.
type resource struct {
	key
	origin  string
	line    int
	created time.Time

	// selector are the labels that a workload must have, sorted by name. Empty
	// selects all of the namespace: also where the selector could not be read,
	// because then it could have been any.
	selector []label

	// targets are what the policy is attached to instead of having a selector.
	targets []target
	// dryRun says that the policy only reports what it would do.
	dryRun bool

	// reason is empty for a usable resource; detail is then empty too, else the
	// first of its problems, for the text of decisions.
	reason Reason
	detail string

	// Exactly one of the three is set in a usable resource; an AuthorizationPolicy is
	// kept in its wire form, which takes a fraction of the space, and is empty if
	// its specification is.
	policy []byte
	peer   *security.PeerAuthentication
	token  *security.RequestAuthentication
	// unloadable says that Envoy cannot load what Istio makes of the resource.
	unloadable bool
	// ruleLines are the lines of the resource's rules.
	ruleLines []int

	// compiled is what a compiler has made of the resource last.
	compiled atomic.Pointer[policy]
}

// key names a resource.
type key struct{ kind, namespace, name string }

func (k key) id() string {
	if k.name == "" {
		return plain(k.kind)
	}
	return plain(k.kind) + " " + k.policy()
}

// policy is "NAMESPACE/NAME", printable and bounded whatever was written there.
func (k key) policy() string { return plain(k.namespace) + "/" + plain(k.name) }

func (k key) compare(o key) int {
	return cmp.Or(cmp.Compare(k.kind, o.kind), cmp.Compare(k.namespace, o.namespace), cmp.Compare(k.name, o.name))
}

// place is where the resource stands, for messages.
func (r *resource) place() string {
	if r.line == 0 {
		return r.origin
	}
	return fmt.Sprintf("%s:%d", r.origin, r.line)
}

// label is one pair of a selector.
type label struct{ name, value string }

// selectorOf is the sorted form of matchLabels.
func selectorOf(match map[string]string) []label {
	if len(match) == 0 {
		return nil
	}
	ls := make([]label, 0, len(match))
	for n, v := range match {
		ls = append(ls, label{n, v})
	}
	slices.SortFunc(ls, func(a, b label) int { return cmp.Compare(a.name, b.name) })
	return ls
}

// selects reports whether the labels hold all of the selector's.
func selects(selector []label, labels map[string]string) bool {
	for _, l := range selector {
		if v, ok := labels[l.name]; !ok || v != l.value {
			return false
		}
	}
	return true
}

// Unreadable stands for an origin that exists and could not be read at all, so
// that a [Set] keeps what it had from there or else denies.
func Unreadable(origin string, err error) (Resource, Problem) {
	return unreadable(origin, 0, err.Error(), "make it readable")
}

func unreadable(origin string, line int, message, fix string) (Resource, Problem) {
	p := Problem{Origin: origin, Line: line, Message: message, Fix: fix, Reason: ReasonUnreadable}
	return Resource{&resource{origin: origin, line: line, reason: ReasonUnreadable, detail: message}}, p
}
