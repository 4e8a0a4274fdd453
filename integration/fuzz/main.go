// Command fuzz runs the fuzz targets of the packages that it is given, one after
// the other, each for a time:
//
//	go run ./integration/fuzz -time 10s ./authz
//	go run ./integration/fuzz -time 10m ./...
//
// What a target finds is written below its package's testdata/fuzz, as always, and
// makes the run fail once all targets have had their time. Run it at the root of
// the repository.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("fuzz", flag.ContinueOnError)
	flags.SetOutput(stderr)
	each := flags.Duration("time", 10*time.Second, "how long each target runs")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var all []target
	for _, pattern := range flags.Args() {
		found, err := targets(pattern)
		if err != nil {
			return err
		}
		all = append(all, found...)
	}
	if len(all) == 0 {
		return fmt.Errorf("no fuzz target in %q; name folders, or a folder with /... behind it", flags.Args())
	}
	var failed []string
	for _, t := range all {
		start := time.Now()
		cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-fuzz", "^"+t.name+"$", "-fuzztime", each.String(), t.dir)
		cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
		cmd.WaitDelay = 30 * time.Second
		out, err := cmd.CombinedOutput()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil && !timeUp(t, string(out)) {
			failed = append(failed, t.String())
			fmt.Fprintf(stdout, "FAIL  %s: %v\n%s", t, err, out)
			continue
		}
		fmt.Fprintf(stdout, "ok    %-50s %6.1fs  %s\n", t, time.Since(start).Seconds(), last(string(out)))
	}
	if len(failed) > 0 {
		return errors.New("findings in " + strings.Join(failed, ", "))
	}
	return nil
}

// target is a fuzz target: a function of the package in a folder.
type target struct{ dir, name string }

func (t target) String() string { return t.dir + " " + t.name }

// targets finds the targets of a folder, and with /... of those below it, without
// compiling anything. Modules of their own below it are left out.
func targets(pattern string) (list []target, err error) {
	root, below := strings.CutSuffix(pattern, "/...")
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root:
			name := d.Name()
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil || !below || name == "testdata" || strings.HasPrefix(name, ".") {
				return filepath.SkipDir
			}
			return nil
		case d.IsDir() || !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, decl := range file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil && strings.HasPrefix(f.Name.Name, "Fuzz") && f.Name.Name != "Fuzz" {
				list = append(list, target{"./" + filepath.ToSlash(filepath.Dir(path)), f.Name.Name})
			}
		}
		return nil
	})
	return list, err
}

// timeUp reports whether all that go test has to say of a failure is that its time
// was up: internal/fuzz takes the end of -fuzztime for an error where its own deadline
// comes before that of the context it made of it. An error that anything else has
// takes the place of that one, so nothing was found.
func timeUp(t target, out string) bool {
	_, said, found := strings.Cut(out, "--- FAIL: "+t.name+" (")
	if !found {
		return false
	}
	lines := strings.Split(said, "\n")
	return len(lines) > 2 && strings.TrimSpace(lines[1]) == "context deadline exceeded" && lines[2] == "FAIL" &&
		!strings.Contains(out, "Failing input") && !strings.Contains(out, "panic:")
}

// last is how much was tried, from the last line that tells.
func last(out string) string {
	progress := ""
	for line := range strings.Lines(out) {
		if strings.Contains(line, "execs:") {
			progress = strings.TrimSpace(line[strings.Index(line, "execs:"):])
		}
	}
	return progress
}
