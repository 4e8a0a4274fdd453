package authz_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// TestIndexesHaveTheirShape holds indexes against testdata/index. What an index
// finds is evaluated, so that one which finds too much decides right and is
// slow, which no decision shows. In a case a line of "rules" is a rule of a DENY
// policy, or as many as a number before it says, each with its own number for #.
func TestIndexesHaveTheirShape(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/index/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			t.Parallel()
			a, err := txtar.ParseFile(file)
			if err != nil || len(a.Files) != 2 || a.Files[0].Name != "rules" || a.Files[1].Name != "index" {
				t.Fatalf("not a case: %v", err)
			}
			text := policyYAML("p", "\n  action: DENY\n  rules:")
			for line := range strings.Lines(string(a.Files[0].Data)) {
				n, rule, _ := strings.Cut(line, " ")
				times, err := strconv.Atoi(n)
				if err != nil {
					times, rule = 1, line
				}
				for i := range times {
					text += "  - " + strings.ReplaceAll(rule, "#", fmt.Sprint(i))
				}
			}
			p := compile(t, text, authz.Options{}).For(identity.Workload{Namespace: "default"})
			got, want := p.Shape(), string(a.Files[1].Data)
			if got == want {
				return
			}
			if !*update {
				t.Errorf("(-want +got):\n%s", cmp.Diff(want, got))
				return
			}
			a.Files[1].Data = []byte(got)
			if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
				t.Fatal(err)
			}
		})
	}
}
