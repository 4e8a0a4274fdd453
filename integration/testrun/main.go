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
//
// Arguments after -- are another `go test`, which runs at the same time and has only
// the processors' time that those before it leave: tests of real programs, which mostly
// wait, stay as quick as if they ran alone, and nothing idles meanwhile.
//
//	go run ./integration/testrun -race ./integration -- -race ./authz/... ./ca/...
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
	"strconv"
	"strings"
	"sync"
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
	r := newReport(stdout)
	var group sync.WaitGroup
	for i, args := range split(args) {
		group.Go(func() {
			if err := goTest(ctx, i, args, r, stderr); err != nil {
				r.end(err)
			}
		})
	}
	group.Wait()
	return r.close(os.Getenv("CI") != "")
}

// split cuts arguments at each --.
func split(args []string) (all [][]string) {
	for {
		i := slices.Index(args, "--")
		if i < 0 {
			return append(all, args)
		}
		all, args = append(all, args[:i]), args[i+1:]
	}
}

// niceness is how much less each go test counts than the one before: so that the
// first one gets nine tenths of the time that both want.
const niceness = 10

// goTest runs the i-th go test.
func goTest(ctx context.Context, i int, args []string, r *report, stderr io.Writer) error {
	argv := append([]string{"go", "test", "-json"}, args...)
	if i > 0 {
		argv = append([]string{"nice", "-n", strconv.Itoa(min(i*niceness, 19))}, argv...)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
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
	tests, readErr := r.read(out)
	err = errors.Join(cmd.Wait(), readErr)
	if err == nil && tests == 0 {
		// Perhaps its packages were forgotten.
		err = fmt.Errorf("no test ran: %s", strings.Join(cmd.Args, " "))
	}
	return err
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

// report counts events and prints what matters of them. Its methods are safe for
// concurrent use.
type report struct {
	mu                      sync.Mutex // guards everything
	w                       io.Writer
	passed, failed, skipped int
	output                  map[test][]string // of tests that have not ended
	failedTests             map[string]int    // by package
	skips                   []string
}

func newReport(w io.Writer) *report {
	return &report{w: w, output: make(map[test][]string), failedTests: make(map[string]int)}
}

// read consumes events until the end, and returns how many tests ended. Lines that are
// no events are printed.
func (r *report) read(in io.Reader) (tests int, err error) {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			tests += r.line(line)
		}
		if err == io.EOF {
			return tests, nil
		}
		if err != nil {
			return tests, fmt.Errorf("reading the output of go test: %w", err)
		}
	}
}

// line counts a line, or prints it if it is no event, and returns how many tests it
// ends.
func (r *report) line(line []byte) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	var e event
	if json.Unmarshal(line, &e) != nil || e.Action == "" {
		r.w.Write(line)
		return 0
	}
	before := r.passed + r.failed + r.skipped
	r.add(e)
	return r.passed + r.failed + r.skipped - before
}

// end is told that a go test failed.
func (r *report) end(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed == 0 {
		// It failed and no event said of what, such as a bad flag.
		r.failed++
		fmt.Fprintln(r.w, "FAIL\tgo test:", err)
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
