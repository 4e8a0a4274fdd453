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

func TestTheEndOfTimeIsNoFinding(t *testing.T) {
	const progress = "fuzz: elapsed: 11s, execs: 4906 (0/sec), new interesting: 17 (total: 103)\n"
	for _, c := range []struct {
		name, out string
		want      bool
	}{
		{"time was up", progress + "--- FAIL: FuzzA (11.08s)\n    context deadline exceeded\nFAIL\nexit status 1\nFAIL\tx/a\t11.1s\n", true},
		{"it found something", progress + "--- FAIL: FuzzA (0.08s)\n    --- FAIL: FuzzA (0.00s)\n        a_test.go:9: context deadline exceeded\n    \n    Failing input written to testdata/fuzz/FuzzA/1\n    To re-run:\n    go test -run=FuzzA/1\nFAIL\n", false},
		{"it hung", progress + "--- FAIL: FuzzA (11.08s)\n    fuzzing process hung or terminated unexpectedly: exit status 2\n    Failing input written to testdata/fuzz/FuzzA/1\nFAIL\n", false},
		{"a seed says so", "--- FAIL: FuzzA (0.01s)\n    --- FAIL: FuzzA/seed#0 (0.00s)\n        a_test.go:9: context deadline exceeded\nFAIL\n", false},
		{"it is another target's", "--- FAIL: FuzzB (11.08s)\n    context deadline exceeded\nFAIL\n", false},
		{"something follows", "--- FAIL: FuzzA (11.08s)\n    context deadline exceeded\n    and more\nFAIL\n", false},
		{"it did not build", "FAIL\tx/a [build failed]\n", false},
	} {
		if got := timeUp(target{"./a", "FuzzA"}, c.out); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}
