package authz_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/signet-mesh/signet/authz"
)

// TestLint runs the cases in testdata/lint: YAML files, perhaps options, and the
// findings on them, a line each. A case is named by the code that it is about and
// has it; every code in the source has a case.
func TestLint(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/lint/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	cases := make(map[string]bool)
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".txtar")
		cases[name] = true
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var texts []authz.Text
			var opts authz.Options
			findings := -1
			for i, f := range a.Files {
				switch {
				case strings.HasSuffix(f.Name, ".yaml"):
					texts = append(texts, authz.Text{Origin: f.Name, Data: f.Data})
				case f.Name == "options":
					opts = parseOptions(t, string(f.Data))
				case f.Name == "findings":
					findings = i
				default:
					t.Fatalf("file %q: no such part of a case", f.Name)
				}
			}
			if findings < 0 {
				t.Fatal("no findings")
			}
			var got strings.Builder
			found := false
			for _, p := range authz.Lint(texts, opts) {
				if p.Fix == "" || p.Line == 0 || p.Severity != authz.SeverityError && p.Code == "" {
					t.Errorf("without a fix, a line or a code: %+v", p)
				}
				found = found || p.Code == name
				fmt.Fprintf(&got, "%s %s: %s; %s\n", p.Severity, p.Code, strings.TrimSuffix(p.Error(), "; "+p.Fix), p.Fix)
			}
			if !found && regexp.MustCompile(`"`+name+`"`).Match(lintSource(t)) {
				t.Error("the case does not have the finding that it is about")
			}
			if name == "quiet" && got.Len() > 0 {
				t.Error("good policies have findings")
			}
			if want := string(a.Files[findings].Data); got.String() != want {
				if *update {
					a.Files[findings].Data = []byte(got.String())
					if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
						t.Fatal(err)
					}
				} else {
					t.Errorf("findings (-want +got):\n%s", cmp.Diff(want, got.String()))
				}
			}
		})
	}
	for _, m := range regexp.MustCompile(`(?:warn|danger)\((?:r, [^"]*)?"([a-z0-9-]+)"|r\.line, "", "([a-z-]+)"|r\.tokenField, "([a-z-]+)"|spec\.provider\.name", "([a-z-]+)"`).FindAllSubmatch(lintSource(t), -1) {
		if code := string(bytes.Join(m[1:], nil)); !cases[code] {
			t.Errorf("no case for %s", code)
		}
	}
}

// lintSource is the source that has the codes.
func lintSource(t *testing.T) []byte {
	t.Helper()
	var all []byte
	for _, name := range []string{"lint.go", "lint_rules.go", "schema.go", "object.go"} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b...)
	}
	return all
}

// TestLintRefusesWhatParseRefuses: warnings take nothing from errors, and add none,
// whatever is linted.
func TestLintRefusesWhatParseRefuses(t *testing.T) {
	t.Parallel()
	var texts []authz.Text
	for _, pattern := range []string{"testdata/admission/*.txt", "testdata/corpus/*.txtar", "testdata/lint/*.txtar"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v", pattern, err)
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(file, ".txtar") {
				for _, f := range txtar.Parse(b).Files {
					texts = append(texts, authz.Text{Origin: file + f.Name, Data: f.Data})
				}
				continue
			}
			for n, line := range strings.Split(string(b), "\n") {
				_, document, _ := strings.Cut(line, " ")
				for _, kind := range []string{"AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication"} {
					texts = append(texts, authz.Text{Origin: fmt.Sprintf("%s:%d", file, n), Data: []byte("{apiVersion: security.istio.io/v1, kind: " + kind + ", metadata: {name: p, namespace: istio-system}, spec: " + document + "}")})
				}
			}
		}
	}
	errorsOf := func(problems []authz.Problem) (errs []string) {
		for _, p := range problems {
			if p.Severity == authz.SeverityError {
				errs = append(errs, p.Error())
			}
		}
		slices.Sort(errs)
		return errs
	}
	for i, text := range texts {
		if raceEnabled && i%8 != 0 {
			continue
		}
		_, problems := authz.Parse(text.Origin, text.Data)
		if diff := cmp.Diff(errorsOf(problems), errorsOf(authz.Lint([]authz.Text{text}, authz.Options{}))); diff != "" {
			t.Errorf("%s (-Parse +Lint):\n%s", text.Data, diff)
		}
	}
	authz.Lint(texts, authz.Options{})
}

// FuzzLint: whatever is linted, nothing panics, and errors are Parse's.
func FuzzLint(f *testing.F) {
	files, err := filepath.Glob("testdata/lint/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(a.Files[0].Data)
	}
	f.Add([]byte(head + "metadata: {name: p}\nspec: {<<: {rules: [&r {<<: [*r]}]}}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, problems := authz.Parse("f", data)
		findings := authz.Lint([]authz.Text{{Origin: "f", Data: data}}, authz.Options{})
		refused := func(p authz.Problem) bool { return p.Severity == authz.SeverityError }
		if got, want := slices.ContainsFunc(findings, refused), slices.ContainsFunc(problems, refused); got != want {
			t.Errorf("Lint refuses: %v, Parse: %v", got, want)
		}
		for _, p := range findings {
			if p.Fix == "" || strings.ContainsAny(p.Error(), "\r\n") {
				t.Errorf("finding %q", p)
			}
		}
	})
}
