// Command bench runs Go benchmarks and writes every metric of every one, also
// those that a benchmark reports itself (testing.B.ReportMetric), as JSON:
//
//	go run ./integration/bench -o bin/bench.json -also integration/peers ./...
//
// The file is an array of {"name", "value", "unit"}, sorted by name and unit.
// Benchmarks whose names say engine=NAME are compared with the one that says
// engine=signet and otherwise the same: how many times its time they take is a
// metric of the unit "x-signet", and printed as a table.
// What else is measured (memory of a daemon, time to the first secret) is a
// benchmark as well, in the package that can measure it.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	output := flags.String("o", "bin/bench.json", "write the JSON to this `file`")
	match := flags.String("bench", ".", "run benchmarks that match this `regexp`")
	benchtime := flags.String("benchtime", "1s", "run each for this `time`")
	count := flags.Int("count", 1, "run each so many times and keep the fastest `run`: others slow it down, nothing speeds it up")
	var also []string
	flags.Func("also", "run the benchmarks of the module in this `folder` as well; can be repeated", func(dir string) error {
		also = append(also, dir)
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return err
	}
	var out bytes.Buffer
	// One package at a time, or they would disturb one another.
	test := []string{"test", "-p", "1", "-run", "^$", "-bench", *match, "-benchmem", "-benchtime", *benchtime, "-count", strconv.Itoa(*count), "-timeout", "60m"}
	if err := goTest(ctx, "", append(test, flags.Args()...), io.MultiWriter(&out, stdout), stderr); err != nil {
		return err
	}
	// Their go.mod follows the product's, which -mod=mod lets it do.
	for _, dir := range also {
		if err := goTest(ctx, dir, append(test, "-mod=mod", "./..."), io.MultiWriter(&out, stdout), stderr); err != nil {
			return err
		}
	}
	metrics, err := parse(&out)
	if err != nil {
		return err
	}
	if len(metrics) == 0 {
		return errors.New("no benchmark ran")
	}
	ratios := compare(metrics)
	metrics = sorted(append(metrics, ratios...))
	b, err := json.MarshalIndent(metrics, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(*output), 0o755); err != nil {
		return fmt.Errorf("writing the metrics: %w", err)
	}
	if err := os.WriteFile(*output, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("writing the metrics: %w", err)
	}
	if len(ratios) > 0 {
		fmt.Fprintln(stdout, "\ntimes that of Signet:")
	}
	for _, r := range ratios {
		fmt.Fprintf(stdout, "%10.1f  %s\n", r.Value, r.Name)
	}
	fmt.Fprintf(stdout, "%d metrics in %s\n", len(metrics), *output)
	return nil
}

func goTest(ctx context.Context, dir string, args []string, stdout, stderr io.Writer) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, stdout, stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	return nil
}

// engine is the part of a name that says which engine was measured.
var engine = regexp.MustCompile(`engine=[^/]+`)

// compare is the time of each engine in that of Signet's on the same benchmark.
func compare(metrics []metric) (ratios []metric) {
	own := make(map[string]float64)
	for _, m := range metrics {
		if m.Unit == "ns/op" && engine.FindString(m.Name) == "engine=signet" {
			own[m.Name] = m.Value
		}
	}
	for _, m := range metrics {
		e := engine.FindString(m.Name)
		base, ok := own[engine.ReplaceAllString(m.Name, "engine=signet")]
		if m.Unit == "ns/op" && e != "" && e != "engine=signet" && ok && base > 0 {
			ratios = append(ratios, metric{m.Name, m.Value / base, "x-signet"})
		}
	}
	return ratios
}

// metric is one number.
type metric struct {
	// Name is the package below the module and the benchmark, such as
	// "authz.Decide/policies=100".
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
}

// procs is what go test puts after a name: GOMAXPROCS, where it is not 1.
var procs = regexp.MustCompile(`-\d+$`)

// parse reads what `go test -bench` prints.
func parse(r io.Reader) ([]metric, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	// fastest is the run of each benchmark that is kept.
	fastest := make(map[string][]metric)
	pkg := ""
	for line := range strings.Lines(string(b)) {
		if p, ok := strings.CutPrefix(line, "pkg: "); ok {
			_, pkg, _ = strings.Cut(strings.TrimSpace(p), "/signet/")
			continue
		}
		name, ok := strings.CutPrefix(line, "Benchmark")
		fields := strings.Fields(name)
		// A name, a count, and pairs of value and unit; other lines are logs.
		if !ok || len(fields) < 4 || len(fields)%2 != 0 {
			continue
		}
		name = pkg + "." + procs.ReplaceAllString(fields[0], "")
		var run []metric
		for i := 2; i < len(fields); i += 2 {
			value, err := strconv.ParseFloat(fields[i], 64)
			if err != nil {
				return nil, fmt.Errorf("benchmark line %q: %w", strings.TrimSpace(line), err)
			}
			run = append(run, metric{name, value, fields[i+1]})
		}
		if before := fastest[name]; before == nil || nanoseconds(run) < nanoseconds(before) {
			fastest[name] = run
		}
	}
	var metrics []metric
	for _, run := range fastest {
		metrics = append(metrics, run...)
	}
	return sorted(metrics), nil
}

// nanoseconds is the time of a run.
func nanoseconds(run []metric) float64 {
	for _, m := range run {
		if m.Unit == "ns/op" {
			return m.Value
		}
	}
	return 0
}

func sorted(metrics []metric) []metric {
	slices.SortFunc(metrics, func(a, b metric) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return strings.Compare(a.Unit, b.Unit)
	})
	return metrics
}
