package authz

// ParseIPv4 is how an entry of X-Forwarded-For is read.
var ParseIPv4 = parseIPv4

// Scan is p without its indexes: it goes through all rules.
func (p *Program) Scan() *Program {
	q := *p
	scan := func(s *ruleset) *ruleset {
		if s == nil {
			return nil
		}
		all := func(policies []*policy) *ruleset {
			var rules []*rule
			for _, p := range policies {
				rules = append(rules, p.rules...)
			}
			return unindexed(rules, s.language)
		}
		out := all(s.policies)
		out.tcp.Store(unindexed(forTCP(s.policies, s.language), s.language))
		return out
	}
	q.custom = nil
	for _, c := range p.custom {
		q.custom = append(q.custom, provider{c.name, scan(c.rules)})
	}
	q.audit, q.deny, q.allow = scan(p.audit), scan(p.deny), scan(p.allow)
	q.shadowDeny, q.shadowAllow = scan(p.shadowDeny), scan(p.shadowAllow)
	return &q
}

func unindexed(rules []*rule, l language) *ruleset {
	t := newTable(rules)
	t.index = &index{always: make([]int32, len(rules))}
	for i := range rules {
		t.index.always[i] = int32(i)
	}
	return &ruleset{language: l, base: t}
}
