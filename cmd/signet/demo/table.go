package demo

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// outcome is a whole run.
type outcome struct {
	Held    bool     `json:"held"`
	Seconds float64  `json:"seconds"`
	Rows    []result `json:"rows"`
}

// notHeld are the names of the rows that ran and did not hold.
func (o outcome) notHeld() (names []string) {
	for _, r := range o.Rows {
		if r.Outcome == failed {
			names = append(names, r.Row)
		}
	}
	return names
}

// printJSON writes the run for programs.
func (o outcome) printJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(o)
}

// printTable writes the run for people.
func (o outcome) printTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ROW\tOUTCOME\tTOOK\tCLAIM, AND WHAT WAS OBSERVED")
	for _, r := range o.Rows {
		took := fmt.Sprintf("%.1f s", r.Seconds)
		if r.Outcome == notRun {
			took = "-"
		}
		claim := r.Claim
		if r.Sabotaged {
			claim += " (sabotaged)"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", r.Row, r.Outcome, took, claim)
		for _, line := range r.Observed {
			fmt.Fprintf(t, "\t\t\t  %s\n", line)
		}
		for line := range strings.Lines(r.Problem) {
			fmt.Fprintf(t, "\t\t\t  ! %s\n", strings.TrimSpace(line))
		}
	}
	return t.Flush()
}
