package integration_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/signet-mesh/signet/"

// allowed is who may import whom. A package that is not here may not exist, and
// an import that is not here may not either: add it when DESIGN.md says why.
var allowed = map[string]string{
	"identity":                   "",
	"identity/attest":            "identity",
	"identity/attest/attesttest": "identity identity/attest/devissuer",
	"identity/attest/devissuer":  "",
	"identity/holder":            "identity",
	"storage":                    "",
	"storage/etcd":               "storage",
	"storage/storagetest":        "storage",
	"ca/capb":                    "",
	"ca/caclient":                "ca/capb identity",
	"ca/external":                "identity",
	"ca/external/externaltest":   "",
	"ca/journal":                 "ca/rotation storage",
	"ca/keys":                    "",
	"ca/limit":                   "",
	"ca/profile":                 "ca/capb",
	"ca/replica":                 "storage",
	"ca/revocation":              "identity storage",
	"ca/rotation":                "",
	"ca":                         "ca/capb ca/external ca/journal ca/keys ca/limit ca/profile ca/replica ca/revocation ca/rotation identity identity/attest storage",
	"ca/istio":                   "ca ca/capb ca/limit identity identity/attest",
	"ca/kube":                    "identity identity/attest",
	"sds":                        "identity identity/holder",
	"authz":                      "identity",
	"authz/token":                "authz",
	"authz/source":               "authz authz/token identity",
	"authz/extauthz":             "authz identity identity/attest",
	"authz/provider":             "authz/extauthz",
	"authz/record":               "authz authz/extauthz identity",
	"authz/explain":              "authz identity",
	"cmd/internal/issuancelog":   "ca/capb",
	"cmd/internal/run":           "",
	"cmd/internal/run/runtest":   "identity/attest/attesttest",
	"cmd/internal/version":       "",
	"cmd/ca":                     "authz ca ca/capb ca/external ca/istio ca/keys ca/kube ca/profile ca/replica identity identity/attest storage storage/etcd cmd/internal/issuancelog cmd/internal/run cmd/internal/version",
	"cmd/agent":                  "authz authz/extauthz authz/provider authz/record authz/source authz/token ca/caclient identity identity/attest identity/holder sds cmd/internal/run cmd/internal/version",
	"cmd/signet":                 "authz authz/explain authz/extauthz authz/record authz/source ca/caclient ca/capb identity identity/attest/devissuer cmd/signet/demo cmd/internal/issuancelog cmd/internal/version",
	"cmd/signet/demo":            "ca/caclient ca/capb identity identity/attest/devissuer",
	"integration/oracle":         "",
	"integration/parts":          "",
	"integration/envoytest":      "integration/parts integration/process",
	"integration/kubetest":       "integration/parts integration/process",
	"integration/etcdtest":       "integration/parts integration/process",
	"integration/process":        "",
	"integration/leaktest":       "integration/process",
	"integration/fuzz":           "",
	"integration/mutate":         "",
	"integration/fetch":          "integration/parts",
	"integration/bench":          "",
	"integration/testrun":        "",
	"integration/mutants":        "",
}

// binaries are the programs, and what they must not be able to do.
var binaries = map[string]struct {
	never []string // prefixes of import paths
}{
	"cmd/ca": {},
	// An agent that is taken over has nothing in it that could sign. Of client-go it
	// has the bare protocol: no client for pods, secrets or nodes.
	"cmd/agent": {never: []string{module + "ca", module + "ca/kube", "go.step.sm/crypto/kms",
		"k8s.io/api/", "k8s.io/client-go/kubernetes", "k8s.io/client-go/informers", "k8s.io/client-go/listers", "istio.io/client-go", "go.etcd.io/"}},
	"cmd/signet": {never: []string{module + "ca", "go.etcd.io/"}},
}

// Limits of a program's first-party packages and of its longest chain of imports,
// main included in both.
const (
	maxPackages = 22
	maxChain    = 5
)

// homeless are names of packages that have not found out what they are about.
var homeless = []string{"util", "utils", "common", "types", "manager", "helpers", "misc", "shared", "base", "lib"}

type goPackage struct {
	ImportPath string
	Name       string
	Imports    []string
	Deps       []string
}

// listPackages returns the packages of the product's module by their path in it.
func listPackages(t *testing.T) map[string]goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Name,Imports,Deps", "./...")
	cmd.Dir = ".."
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	packages := make(map[string]goPackage)
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := d.Decode(&p); err == io.EOF {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		name, ok := strings.CutPrefix(p.ImportPath, module)
		if !ok {
			t.Fatalf("package %s is not below %s", p.ImportPath, module)
		}
		packages[name] = p
	}
}

// ours are the first-party packages of a list, by their path in the module.
func ours(importPaths []string) (names []string) {
	for _, p := range importPaths {
		if name, ok := strings.CutPrefix(p, module); ok {
			names = append(names, name)
		}
	}
	return names
}

func TestImportTable(t *testing.T) {
	t.Parallel()
	packages := listPackages(t)
	for name, p := range packages {
		row, ok := allowed[name]
		if !ok {
			// A folder that holds nothing but tests imports nothing.
			if len(p.Imports) > 0 || p.Name != "integration_test" && name != "integration" {
				t.Errorf("package %s is not in the import table", name)
			}
			continue
		}
		for _, imported := range ours(p.Imports) {
			if !slices.Contains(strings.Fields(row), imported) {
				t.Errorf("%s imports %s, which the import table does not allow", name, imported)
			}
		}
		if slices.Contains(homeless, path.Base(name)) || slices.Contains(homeless, p.Name) {
			t.Errorf("package %s: a name that says nothing; what is it about?", name)
		}
	}
	for name := range allowed {
		if _, ok := packages[name]; !ok {
			t.Errorf("the import table has a row for %s, which does not exist", name)
		}
	}
}

func TestProgramsStaySmall(t *testing.T) {
	t.Parallel()
	packages := listPackages(t)
	// chain is the longest chain of imports that begins with a package.
	var chain func(name string) []string
	chain = func(name string) (longest []string) {
		for _, next := range ours(packages[name].Imports) {
			if c := chain(next); len(c) > len(longest) {
				longest = c
			}
		}
		return append([]string{name}, longest...)
	}
	for name, binary := range binaries {
		p, ok := packages[name]
		if !ok || p.Name != "main" {
			t.Errorf("%s is not a program", name)
			continue
		}
		reached, longest := append(ours(p.Deps), name), chain(name)
		t.Logf("%s: %d packages of ours; longest chain %d: %s", name, len(reached), len(longest), strings.Join(longest, " → "))
		if len(reached) > maxPackages {
			t.Errorf("%s reaches %d packages of ours, more than %d: %s", name, len(reached), maxPackages, strings.Join(reached, " "))
		}
		if len(longest) > maxChain {
			t.Errorf("%s: a chain of %d imports, more than %d: %s", name, len(longest), maxChain, strings.Join(longest, " → "))
		}
		for _, never := range binary.never {
			for _, dep := range p.Deps {
				// Of ours the package itself; of others also everything below.
				if dep == never || !strings.HasPrefix(never, module) && strings.HasPrefix(dep, never) {
					t.Errorf("%s reaches %s", name, dep)
				}
			}
		}
	}
}

// TestSweepsRunWhole: what is shorter with the race detector runs whole without, in
// make test.
func TestSweepsRunWhole(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	makefile := string(b)
	_, recipe, _ := strings.Cut(makefile, "\ntest: ")
	recipe, _, _ = strings.Cut(recipe, "\n\n")
	_, sweeps, _ := strings.Cut(makefile, "\nSWEEPS := ")
	sweeps, _, _ = strings.Cut(sweeps, "\n")
	named, whole := strings.Split(sweeps, "|"), map[string]string{}
	for run := range strings.SplitSeq(strings.Join(strings.Fields(recipe), " "), " -- ") {
		if strings.Contains(run, "-race") {
			continue
		}
		for f := range strings.FieldsSeq(run) {
			if strings.HasPrefix(f, "./") {
				whole[f] = run
			}
		}
	}
	files, err := filepath.Glob("../*/race_test.go")
	for _, pattern := range []string{"../*/*/race_test.go", "../*/*/*/race_test.go"} {
		more, errMore := filepath.Glob(pattern)
		files, err = append(files, more...), errors.Join(err, errMore)
	}
	if err != nil {
		t.Fatal(err)
	}
	shorter := 0
	test := regexp.MustCompile(`(?ms)^func (Test\w+)\(.*?^}`)
	for _, f := range files {
		if b, err := os.ReadFile(f); err != nil || !strings.Contains(string(b), "raceEnabled") && !strings.Contains(string(b), "func whole(") {
			continue
		}
		shorter++
		dir := filepath.Dir(f)
		run, ok := whole["."+strings.TrimPrefix(dir, "..")]
		if !ok {
			t.Errorf("%s: its tests know of the race detector, and make test does not run them without", dir)
			continue
		}
		if !strings.Contains(run, "-run") {
			continue
		}
		sources, err := filepath.Glob(dir + "/*_test.go")
		if err != nil {
			t.Fatal(err)
		}
		for _, source := range sources {
			b, err := os.ReadFile(source)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range test.FindAllStringSubmatch(string(b), -1) {
				if (strings.Contains(m[0], "whole(") || strings.Contains(m[0], "raceEnabled") || strings.Contains(m[0], "*worlds")) && !slices.Contains(named, m[1]) {
					t.Errorf("%s: %s is shorter with the race detector; add it to SWEEPS in the Makefile", dir, m[1])
				}
			}
		}
	}
	files, err = filepath.Glob("../ca/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(string(b), "//go:build !race\n") {
			continue
		}
		for _, m := range test.FindAllStringSubmatch(string(b), -1) {
			if !slices.Contains(named, m[1]) || whole["./ca"] == "" {
				t.Errorf("%s: %s is not run with the race detector, and not without it: add it to SWEEPS in the Makefile", f, m[1])
			}
		}
	}
	if shorter < 5 {
		t.Errorf("%d packages know of the race detector; are they looked for in the right place?", shorter)
	}
}
