package authz

import (
	"fmt"
	"strings"
)

// Severity says what a [Problem] does to decisions.
type Severity uint8

const (
	// SeverityError: the resource is not enforced as written. Its last good
	// version goes on, or the workloads that it selects are denied.
	SeverityError Severity = iota
	// SeverityWarning: enforced as written, but it may not do what its author
	// meant.
	SeverityWarning
	// SeverityDanger: a warning of what crashes Envoy, or what Envoy refuses to
	// load, if Istio hands it on. It is decided as written and cannot be exported
	// to a proxy; see [Resource.Loadable].
	SeverityDanger
	// SeverityInfo: nothing that concerns decisions, such as a document of
	// another kind that was skipped.
	SeverityInfo
)

// String is "error", "warning", "danger" or "info".
func (s Severity) String() string {
	switch s {
	case SeverityWarning:
		return "warning"
	case SeverityDanger:
		return "danger"
	case SeverityInfo:
		return "info"
	}
	return "error"
}

// Problem is one finding about policy text: where, in what, what is wrong and
// what to do. It is an error, so that it can be wrapped and joined.
type Problem struct {
	// Origin is what was read, usually a file name; Line is the line in it that
	// the finding is about, from 1, or 0 where there is none.
	Origin string
	Line   int
	// Resource is "KIND NAMESPACE/NAME", or empty where that cannot be read.
	Resource string
	// Field is the path of the field, as in
	// spec.rules[0].to[0].operation.paths[1]; empty for the whole resource.
	Field string
	// Message says what is wrong, Fix what to do about it.
	Message string
	Fix     string
	// Severity says what it does to decisions; the zero value is an error.
	Severity Severity
	// Reason is, for an error, the reason that decisions give which rest on it:
	// [ReasonInvalid], [ReasonDuplicate] or
	// [ReasonUnreadable]. Empty otherwise.
	Reason Reason
	// Code names the rule of [Lint] that a warning comes from, and is stable;
	// empty otherwise.
	Code string
}

// Error renders the problem on one line:
//
//	FILE:LINE: KIND NAMESPACE/NAME: FIELD: MESSAGE; FIX
func (p Problem) Error() string {
	var b strings.Builder
	if p.Origin != "" {
		b.WriteString(p.Origin)
		if p.Line > 0 {
			fmt.Fprintf(&b, ":%d", p.Line)
		}
		b.WriteString(": ")
	}
	for _, part := range []string{p.Resource, p.Field} {
		if part != "" {
			b.WriteString(part)
			b.WriteString(": ")
		}
	}
	b.WriteString(p.Message)
	if p.Fix != "" {
		b.WriteString("; ")
		b.WriteString(p.Fix)
	}
	return b.String()
}

// String is [Problem.Error].
func (p Problem) String() string { return p.Error() }
