package authz

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	security "istio.io/api/security/v1beta1"
)

// pointer is the trust domain that, in a policy, always means the mesh's own.
const pointer = "cluster.local"

// domains are the mesh's trust domain and its aliases. A principal of one of
// them stands for the same name in all of them, as Istio's trust domain bundle
// has it: only values of exactly five segments (TD/ns/NAMESPACE/sa/ACCOUNT, stars
// included) have a trust domain to it, and "*" as the first is none.
type domains []string

func newDomains(o Options) domains {
	td := o.TrustDomain.Name()
	if td == "" {
		td = pointer
	}
	return append(domains{td}, o.TrustDomainAliases...)
}

// expand is the rule with its principals and trust domains in all of their trust
// domains, and the principals of foreign ones. A rule that stays as it is is not
// copied.
func (d domains) expand(r *security.Rule) (out *security.Rule, foreign []string) {
	out = r
	// replace changes a list if that makes a difference; to gives the list of
	// the copy.
	replace := func(list []string, expanded []string, to func() *[]string) {
		if slices.Equal(list, expanded) {
			return
		}
		if out == r {
			out = proto.CloneOf(r)
		}
		*to() = expanded
	}
	principals := func(list []string, to func() *[]string) {
		expanded, f := d.principals(list)
		foreign = append(foreign, f...)
		replace(list, expanded, to)
	}
	for i, from := range r.GetFrom() {
		s := from.GetSource()
		principals(s.GetPrincipals(), func() *[]string { return &out.From[i].Source.Principals })
		principals(s.GetNotPrincipals(), func() *[]string { return &out.From[i].Source.NotPrincipals })
		replace(s.GetTrustDomains(), d.names(s.GetTrustDomains()), func() *[]string { return &out.From[i].Source.TrustDomains })
		replace(s.GetNotTrustDomains(), d.names(s.GetNotTrustDomains()), func() *[]string { return &out.From[i].Source.NotTrustDomains })
	}
	for i, when := range r.GetWhen() {
		switch when.GetKey() {
		case "source.principal":
			principals(when.GetValues(), func() *[]string { return &out.When[i].Values })
			principals(when.GetNotValues(), func() *[]string { return &out.When[i].NotValues })
		case "source.trustDomain":
			replace(when.GetValues(), d.names(when.GetValues()), func() *[]string { return &out.When[i].Values })
			replace(when.GetNotValues(), d.names(when.GetNotValues()), func() *[]string { return &out.When[i].NotValues })
		}
	}
	return out, foreign
}

// names are trust domains with the mesh's own written out: unlike in principals,
// only a value that is exactly one of them stands for all, and cluster.local is
// no pointer.
func (d domains) names(list []string) (out []string) {
	for _, v := range list {
		more := []string{v}
		if slices.Contains(d, v) {
			more = d
		}
		for _, m := range more {
			if !slices.Contains(out, m) {
				out = append(out, m)
			}
		}
	}
	return out
}

func (d domains) principals(list []string) (out, foreign []string) {
	for _, v := range list {
		td, rest, _ := strings.Cut(v, "/")
		switch {
		case strings.Count(v, "/") != 4 || td == "*":
			out = append(out, v)
		case td != pointer && !d.has(td):
			foreign = append(foreign, v)
			out = append(out, v)
		default:
			at := len(out)
			for _, alias := range d {
				name := alias + "/" + rest
				if suffix, star := strings.CutPrefix(td, "*"); star && strings.HasSuffix(alias, suffix) {
					name = v // the pattern already covers this trust domain
				}
				if !slices.Contains(out[at:], name) {
					out = append(out, name)
				}
			}
		}
	}
	return out, foreign
}

// has reports whether a trust domain, which may have a star at its start or
// end, is one of the domains, which may have one too.
func (d domains) has(td string) bool {
	return slices.ContainsFunc(d, func(known string) bool {
		return td == known || known == "*" || covers(known, td) || covers(td, known)
	})
}

func covers(pattern, s string) bool {
	if suffix, ok := strings.CutPrefix(pattern, "*"); ok && strings.HasSuffix(s, suffix) {
		return true
	}
	prefix, ok := strings.CutSuffix(pattern, "*")
	return ok && strings.HasPrefix(s, prefix)
}
