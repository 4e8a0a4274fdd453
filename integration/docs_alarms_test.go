package integration_test

import (
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDocsNameEveryAlarm: the table of alarms in docs/authority.md has each alarm that the
// authority can raise, by its name, and no other.
func TestDocsNameEveryAlarm(t *testing.T) {
	t.Parallel()
	call, literal := regexp.MustCompile(`\.alarm\(`), regexp.MustCompile(`\.alarm\("([^"]+)"`)
	var raised []string
	err := filepath.WalkDir("../ca", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text := readText(t, path)
		names := literal.FindAllStringSubmatch(text, -1)
		if len(names) != len(call.FindAllString(text, -1)) {
			t.Errorf("%s raises an alarm whose name is not a literal, so that nobody can look it up", path)
		}
		for _, n := range names {
			raised = append(raised, n[1])
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(raised)
	raised = slices.Compact(raised)
	if len(raised) < 10 {
		t.Fatalf("only %q are found in the code", raised)
	}
	_, section, ok := strings.Cut(readText(t, "../docs/authority.md"), "\n## What needs an operator\n")
	if !ok {
		t.Fatal("docs/authority.md has no section on alarms")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var written []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| .+ \\| .+ \\|$").FindAllStringSubmatch(section, -1) {
		written = append(written, m[1])
	}
	slices.Sort(written)
	if !slices.Equal(raised, written) {
		t.Errorf("the code raises the alarms %q, and docs/authority.md explains %q", raised, written)
	}
}
