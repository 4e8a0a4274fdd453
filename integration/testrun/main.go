// Command testrun runs `go test -json` with its arguments and prints what a
// person or a CI wants of it: a line for each package, everything of the tests
// that failed, each skip with its reason, the lines that a test logs with "note: "
// in front, and at the end
//
//	N passed, N failed, N skipped
//
// counting tests and subtests. It fails if a test or a build failed, if no test
// ran, and, where $CI is set, if one was skipped: a real part that is missing
// must not look like success.
//
//	go run ./integration/testrun -race ./...
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "testrun:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = stderr
	// An interrupt lets go test end its tests, and these their processes.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	r := newReport(stdout)
	readErr := r.read(out)
	if err := errors.Join(cmd.Wait(), readErr); err != nil && r.failed == 0 {
		// It failed and no event said of what, such as a bad flag.
		r.failed++
		fmt.Fprintln(stdout, "FAIL\tgo test:", err)
	}
	return r.close(os.Getenv("CI") != "")
}

// event is a line of go test -json; see `go doc test2json`.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build output
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

type test struct{ pkg, name string }

// report counts events and prints what matters of them.
type report struct {
	w                       io.Writer
	passed, failed, skipped int
	output                  map[test][]string // of tests that have not ended
	failedTests             map[string]int    // by package
	skips                   []string
}

func newReport(w io.Writer) *report {
	return &report{w: w, output: make(map[test][]string), failedTests: make(map[string]int)}
}

// read consumes events until the end. Lines that are no events are printed.
func (r *report) read(in io.Reader) error {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil && e.Action != "" {
				r.add(e)
			} else {
				r.w.Write(line)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the output of go test: %w", err)
		}
	}
}

func (r *report) add(e event) {
	key := test{e.Package, e.Test}
	switch e.Action {
	case "output", "build-output":
		if e.Action == "build-output" {
			key = test{e.ImportPath, ""}
		}
		r.output[key] = append(r.output[key], e.Output)
		return
	case "pass", "fail", "skip":
	default:
		return
	}
	if e.Test == "" {
		r.endPackage(e)
		return
	}
	switch e.Action {
	case "pass":
		r.passed++
		r.notes(r.output[key])
	case "skip":
		r.skipped++
		r.skips = append(r.skips, fmt.Sprintf("%s %s: %s", e.Package, e.Test, reason(r.output[key])))
	case "fail":
		r.failed++
		r.failedTests[e.Package]++
		fmt.Fprintf(r.w, "--- FAIL: %s %s\n%s", e.Package, e.Test, strings.Join(r.output[key], ""))
	}
	delete(r.output, key)
}

// notes prints what a test that passed wants to be read: tables of what it saw.
func (r *report) notes(output []string) {
	for _, o := range output {
		// t.Log says FILE:LINE first.
		if _, note, ok := strings.Cut(o, ": note: "); ok {
			fmt.Fprintf(r.w, "note\t%s\n", strings.TrimRight(note, "\n"))
		}
	}
}

func (r *report) endPackage(e event) {
	if e.Action == "fail" {
		if r.failedTests[e.Package] == 0 {
			// No test took the blame: a build, TestMain, a panic, a time-out.
			r.failed++
			for _, key := range slices.SortedFunc(maps.Keys(r.output), byName) {
				if key.pkg == e.Package || key.pkg == e.FailedBuild {
					io.WriteString(r.w, strings.Join(r.output[key], ""))
				}
			}
		}
		fmt.Fprintf(r.w, "FAIL\t%s\t%.3fs\n", e.Package, e.Elapsed)
	} else if e.Action == "pass" {
		fmt.Fprintf(r.w, "ok\t%s\t%.3fs\n", e.Package, e.Elapsed)
	}
	maps.DeleteFunc(r.output, func(key test, _ []string) bool { return key.pkg == e.Package })
}

func byName(a, b test) int { return strings.Compare(a.pkg+" "+a.name, b.pkg+" "+b.name) }

// reason is what a test printed when it skipped, without go test's own lines.
func reason(output []string) string {
	var lines []string
	for _, o := range output {
		if l := strings.TrimSpace(o); l != "" && !strings.HasPrefix(l, "=== ") && !strings.HasPrefix(l, "--- ") {
			lines = append(lines, l)
		}
	}
	if len(lines) == 0 {
		return "no reason given"
	}
	return strings.Join(lines, " ")
}

// close prints the end and says whether the run was a success.
func (r *report) close(noSkips bool) error {
	for _, s := range r.skips {
		fmt.Fprintln(r.w, "skipped:", s)
	}
	fmt.Fprintf(r.w, "%d passed, %d failed, %d skipped\n", r.passed, r.failed, r.skipped)
	switch {
	case r.failed > 0:
		return fmt.Errorf("%d failed", r.failed)
	case r.skipped > 0 && noSkips:
		return fmt.Errorf("%d skipped, and in CI nothing may be", r.skipped)
	case r.passed == 0:
		return errors.New("no test ran")
	}
	return nil
}
