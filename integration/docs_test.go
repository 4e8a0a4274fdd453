package integration_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
)

var (
	fence = regexp.MustCompile("(?ms)^ *```.*?^ *```")
	span  = regexp.MustCompile("`[^`\n]+`")
	link  = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	head  = regexp.MustCompile(`(?m)^#{1,6} +(.+?) *$`)
	// A code span that looks like a file or folder of the repository.
	pathLike = regexp.MustCompile(`^(\./)?[A-Za-z0-9_.][A-Za-z0-9_./-]*/[A-Za-z0-9_./-]*$`)
	makeCall = regexp.MustCompile(`\bmake ([a-z][a-z-]*)`)
	makeRule = regexp.MustCompile(`(?m)^([a-z][a-z-]*):`)
)

// TestDocsNameRealTests: each test and each case that the page on policies names as
// its proof exists.
func TestDocsNameRealTests(t *testing.T) {
	t.Parallel()
	var source []byte
	for _, dir := range []string{"../authz", "oracle"} {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err == nil && strings.HasSuffix(path, "_test.go") {
				var b []byte
				b, err = os.ReadFile(path)
				source = append(source, b...)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	names := 0
	for _, m := range regexp.MustCompile("`((?:corpus|lint)/[a-z0-9-]+|Test[A-Za-z]+)`").FindAllStringSubmatch(readText(t, "../docs/policies.md"), -1) {
		names++
		if strings.HasPrefix(m[1], "Test") {
			if !strings.Contains(string(source), "func "+m[1]+"(") {
				t.Errorf("there is no %s", m[1])
			}
		} else if _, err := os.Stat("../authz/testdata/" + m[1] + ".txtar"); err != nil {
			t.Errorf("there is no case %s: %v", m[1], err)
		}
	}
	if names < 10 {
		t.Errorf("only %d tests are named", names)
	}
}

// TestDocLinks: in every Markdown file each relative link leads to a file, each
// anchor to a heading, each path in a code span exists, and each `make` target too.
func TestDocLinks(t *testing.T) {
	t.Parallel()
	makefile, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	targets := make(map[string]bool)
	for _, m := range makeRule.FindAllSubmatch(makefile, -1) {
		targets[string(m[1])] = true
	}
	files, links := markdown(t), 0
	for _, file := range files {
		text := readText(t, file)
		prose := fence.ReplaceAllString(text, "")
		for _, m := range link.FindAllStringSubmatch(span.ReplaceAllString(prose, ""), -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			links++
			checkLink(t, file, m[1])
		}
		for _, s := range span.FindAllString(prose, -1) {
			checkPath(t, file, strings.Trim(s, "`"))
		}
		// Only in code: prose may make sense.
		code := strings.Join(append(fence.FindAllString(text, -1), span.FindAllString(prose, -1)...), "\n")
		for _, m := range makeCall.FindAllStringSubmatch(code, -1) {
			if !targets[m[1]] {
				t.Errorf("%s: the Makefile has no target %q", file, m[1])
			}
		}
	}
	t.Logf("%d links in %d files", links, len(files))
}

// markdown returns the Markdown files of the repository, relative to this folder.
func markdown(t *testing.T) (files []string) {
	t.Helper()
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != ".." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if filepath.Ext(path) == ".md" {
			files = append(files, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatal("there are no documents")
	}
	return files
}

func readText(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func checkLink(t *testing.T, file, target string) {
	t.Helper()
	path, anchor, _ := strings.Cut(target, "#")
	to := file
	if path != "" {
		to = filepath.Join(filepath.Dir(file), path)
		if _, err := os.Stat(to); err != nil {
			t.Errorf("%s: link to %s: %v", file, target, err)
			return
		}
	}
	if anchor == "" || filepath.Ext(to) != ".md" {
		return
	}
	for _, m := range head.FindAllStringSubmatch(fence.ReplaceAllString(readText(t, to), ""), -1) {
		if slug(m[1]) == anchor {
			return
		}
	}
	t.Errorf("%s: link to %s: no such heading", file, target)
}

// slug is the anchor that a heading gets where Markdown is rendered.
func slug(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case unicode.IsLetter(r) || unicode.IsNumber(r) || r == '-' || r == '_':
			return unicode.ToLower(r)
		}
		return -1
	}, heading)
}

// checkPath checks a code span that names something in the repository: its first
// part is a folder at the root.
func checkPath(t *testing.T, file, s string) {
	t.Helper()
	first, _, ok := strings.Cut(strings.TrimPrefix(s, "./"), "/")
	// bin is made by the build.
	if !ok || first == "bin" || !pathLike.MatchString(s) {
		return
	}
	if info, err := os.Stat(filepath.Join("..", first)); err != nil || !info.IsDir() {
		return
	}
	if _, err := os.Stat(filepath.Join("..", s)); err != nil {
		t.Errorf("%s: mentions %s, which does not exist", file, s)
	}
}
