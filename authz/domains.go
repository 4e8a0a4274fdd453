package authz

import (
	"slices"
	"strings"

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

// expand gives the rule its principals and trust domains in all of their trust
// domains. It returns the principals of foreign ones.
func (d domains) expand(r *security.Rule) (foreign []string) {
	principals := func(list *[]string) {
		var f []string
		*list, f = d.principals(*list)
		foreign = append(foreign, f...)
	}
	for _, from := range r.GetFrom() {
		if s := from.GetSource(); s != nil {
			principals(&s.Principals)
			principals(&s.NotPrincipals)
			s.TrustDomains, s.NotTrustDomains = d.names(s.TrustDomains), d.names(s.NotTrustDomains)
		}
	}
	for _, when := range r.GetWhen() {
		switch when.GetKey() {
		case "source.principal":
			principals(&when.Values)
			principals(&when.NotValues)
		case "source.trustDomain":
			when.Values, when.NotValues = d.names(when.Values), d.names(when.NotValues)
		}
	}
	return foreign
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
