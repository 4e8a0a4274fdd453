package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestTargetsAreFoundWithoutCompiling(t *testing.T) {
	t.Chdir(t.TempDir())
	for name, text := range map[string]string{
		"a/a_test.go":          "package a\nfunc FuzzA(f *testing.F) {}\nfunc fuzzed() {}\nfunc (x) FuzzMethod() {}\n",
		"a/a.go":               "package a\nfunc FuzzNo() {}\n",
		"a/b/b_test.go":        "package b\nfunc FuzzB(f *testing.F) {}\n",
		"a/testdata/t_test.go": "package t\nfunc FuzzT(f *testing.F) {}\n",
		"a/mod/m_test.go":      "package m\nfunc FuzzM(f *testing.F) {}\n",
		"a/mod/go.mod":         "module m\n",
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for pattern, want := range map[string][]target{
		"./a":     {{"./a", "FuzzA"}},
		"./a/...": {{"./a", "FuzzA"}, {"./a/b", "FuzzB"}},
	} {
		if got, err := targets(pattern); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v; want %v", pattern, got, err, want)
		}
	}
	if _, err := targets("./none"); err == nil {
		t.Error("a folder that is not there is no error")
	}
	if err := run(t.Context(), []string{"./a/mod/none"}, t.Output(), t.Output()); err == nil {
		t.Error("a folder that is not there is no error of run")
	}
	if err := run(t.Context(), []string{"-time", "1s"}, t.Output(), t.Output()); err == nil || !strings.Contains(err.Error(), "no fuzz target") {
		t.Errorf("nothing to fuzz: %v", err)
	}
}
