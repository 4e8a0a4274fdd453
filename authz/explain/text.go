package explain

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/signet-mesh/signet/authz"
)

// Write writes the explanation for people.
func (e *Explanation) Write(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintln(&b, e.Summary)
	for _, line := range e.Because {
		fmt.Fprintf(&b, "  %s\n", line)
	}
	e.writeMisses(&b)
	e.writeSuggestions(&b)
	if len(e.Stages) > 0 {
		fmt.Fprint(&b, "\nconsidered, in the order of evaluation:\n")
	}
	for _, s := range e.Stages {
		fmt.Fprintf(&b, "  %s", s.Name)
		if !s.Reached {
			fmt.Fprint(&b, " (not looked at: it was decided before)")
		}
		fmt.Fprintln(&b)
		for _, p := range s.Policies {
			p.write(&b)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// maxMisses is how many rules that did not match are shown; all are among the stages.
const maxMisses = 5

func (e *Explanation) writeMisses(b *strings.Builder) {
	if len(e.Misses) == 0 {
		return
	}
	fmt.Fprint(b, "\nnearest to allowing it:\n")
	for i, m := range e.Misses {
		if i == maxMisses {
			fmt.Fprintf(b, "  and %d more rules, further off\n", len(e.Misses)-i)
			break
		}
		at := fmt.Sprintf("  %s (%s:%d)", m.Policy, m.Origin, m.Line)
		if m.Rule >= 0 {
			at = fmt.Sprintf("  rule %d of %s (%s:%d)", m.Rule, m.Policy, m.Origin, m.Line)
		}
		switch {
		case m.Note != "":
			fmt.Fprintf(b, "%s: %s\n", at, m.Note)
		case len(m.But) == 1:
			fmt.Fprintf(b, "%s matches but for %s\n", at, m.But[0].Text)
		default:
			fmt.Fprintf(b, "%s matches but for\n", at)
			for _, c := range m.But {
				fmt.Fprintf(b, "    %s\n", c.Text)
			}
		}
	}
}

func (e *Explanation) writeSuggestions(b *strings.Builder) {
	want := "to have it allowed"
	if e.Decision != "deny" {
		want = "to have it denied"
	}
	if len(e.Suggestions) == 0 {
		if e.Decision == "deny" && len(e.Stages) > 0 {
			fmt.Fprint(b, "\nno small change was found that would have it allowed\n")
		}
		return
	}
	about := ""
	for i, s := range e.Suggestions {
		if s.About != about {
			about = s.About
			fmt.Fprintf(b, "\n%s, change the %s:\n", want, about)
		}
		for k, p := range s.Parts {
			if k == 0 {
				fmt.Fprintf(b, "  %d. %s\n", i+1, p.Text)
			} else {
				fmt.Fprintf(b, "     and %s\n", p.Text)
			}
			for line := range strings.Lines(p.YAML) {
				fmt.Fprintf(b, "         %s", line)
			}
		}
		if s.Note != "" {
			fmt.Fprintf(b, "     note: %s\n", s.Note)
		}
		if len(s.Asks) > 0 {
			fmt.Fprintf(b, "     if provider %s allows it\n", strings.Join(s.Asks, ", "))
		}
	}
}

func (p *Policy) write(b *strings.Builder) {
	name := p.Policy
	if name == "" {
		name = "a document"
	}
	fmt.Fprintf(b, "    %s (%s:%d)", name, p.Origin, p.Line)
	if p.DryRun {
		fmt.Fprint(b, ", dry run")
	}
	switch {
	case !p.Selected:
		fmt.Fprintf(b, ": not for this workload: %s\n", p.Why)
		return
	case p.Why != "":
		fmt.Fprintf(b, ": %s\n", p.Why)
	default:
		fmt.Fprintln(b)
	}
	for _, r := range p.Rules {
		if p.Kind == authz.KindRequestAuthentication {
			fmt.Fprintf(b, "      rule %d: %s\n", r.Index, r.Note)
			continue
		}
		matches := map[string]string{"yes": "matches", "no": "does not match", "unknown": "may match"}[r.Matches]
		if r.Index < 0 {
			fmt.Fprintf(b, "      %s\n", r.Note)
			continue
		}
		fmt.Fprintf(b, "      rule %d %s", r.Index, matches)
		if r.Note != "" {
			fmt.Fprintf(b, ": %s", r.Note)
		}
		fmt.Fprintln(b)
		width := 0
		for _, c := range r.Clauses {
			width = max(width, utf8.RuneCountInString(c.Field))
		}
		for _, c := range r.Clauses {
			mark := map[string]string{"yes": "+", "no": "-", "unknown": "?"}[c.Holds]
			fmt.Fprintf(b, "        %s %-*s  %s\n", mark, width, c.Field, c.Text)
		}
	}
}
