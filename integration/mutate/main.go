// Command mutate changes what a package decides in one place at a time, runs that
// package's short tests on each change, and expects them to fail:
//
//	go run ./integration/mutate                     all mutants of authz's decision path
//	go run ./integration/mutate -package ca/rotation    those of another package that it knows
//	go run ./integration/mutate -sample 40          one in forty, always the same
//	go run ./integration/mutate -files nets.go      those of some files
//	go run ./integration/mutate -survivors          those that survived when they were last run
//	go run ./integration/mutate -list               what would be changed
//
// All mutants are compiled into one test program, in which $MUTANT chooses one, so
// that a mutant costs a run and no build. A mutant that no test notices must stand
// in survivors.txt with the reason why it is harmless; one that stands there and is
// noticed, or does not exist any more, must be removed from it. Each package has a list
// of its own.
//
// What was found is kept in the folder for temporary files, under a digest of the
// code and the tests, so that a run that was interrupted goes on where it was.
//
// # Trust
//
// It compiles and runs changed copies of this repository's own code, through an
// overlay of the go command; the files themselves stay as they are.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// target is a package that can be mutated.
type target struct {
	dir   string
	files []string // those that decide
	// stages are the tests that are run on a mutant, the quick ones first: most mutants
	// do not live to see the others.
	stages []stage
	// survivors is the list of mutants that no test notices.
	survivors string
	// reads are what its tests read beside it: the packages of this repository.
	reads []string
}

var targets = map[string]target{
	"authz": {dir: "authz", stages: authzStages, survivors: "integration/mutate/survivors.txt", reads: []string{"identity", "authz/record", "authz/extauthz"}, files: []string{
		"again.go", "changes.go", "claims.go", "domains.go", "header.go", "index.go", "jwt.go", "match.go", "nets.go", "peer.go",
		"program.go", "radix.go", "rule.go", "search.go", "snapshot.go", "table.go", "target.go", "template.go",
	}},
	"ca/rotation": {dir: "ca/rotation", files: []string{"schedule.go", "state.go", "transition.go"}, survivors: "integration/mutate/survivors-rotation.txt",
		stages: []stage{{10 * time.Second, []string{"-test.run", "TestTransitions|TestDue"}}, {time.Minute, []string{"-test.run", "."}}}},
}

// Tests that hang have noticed the mutant, too. A stage may take ten times of the
// processor what it takes without a mutant, which does not depend on who else wants
// it; deadline is for tests that only wait.
const deadline = 15 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("mutate", flag.ContinueOnError)
	sample := flags.Int("sample", 1, "take one mutant in so many")
	keep := flags.String("keep", "", "leave the test program here, and run nothing")
	list := flags.Bool("list", false, "list the mutants and run nothing")
	parallel := flags.Int("j", 2, "how many to run at a time")
	name := flags.String("package", "authz", "mutate this package, out of "+strings.Join(slices.Sorted(maps.Keys(targets)), ", "))
	only := flags.String("files", "", "mutate these of the package's files, separated by commas")
	again := flags.Bool("survivors", false, "run what survived when it was last run, under whichever tests")
	if err := flags.Parse(args); err != nil {
		return err
	}
	of, ok := targets[*name]
	if !ok {
		return fmt.Errorf("-package %q: one of %s", *name, strings.Join(slices.Sorted(maps.Keys(targets)), ", "))
	}
	dir, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "mutants.test")
	mutants, err := of.build(ctx, dir, program)
	if err != nil {
		return err
	}
	if *keep != "" {
		return os.Rename(program, *keep)
	}
	excused, err := readSurvivors(of.survivors)
	if err != nil {
		return err
	}
	known, err := openCache(of)
	if err != nil {
		return err
	}
	defer known.close()
	var chosen []mutant
	for i, m := range mutants {
		file, _, _ := strings.Cut(m.at, ":")
		if i%*sample == 0 && (*only == "" || slices.Contains(strings.Split(*only, ","), file)) && (!*again || known.survived[m.key]) {
			chosen = append(chosen, m)
		}
	}
	all := len(chosen) == len(mutants)
	if *list {
		for _, m := range chosen {
			fmt.Println(m.id, m)
		}
		return nil
	}
	if why, err := of.try(ctx, program, 0); err != nil {
		return err
	} else if why != "" {
		return fmt.Errorf("the tests fail without a mutant: %s", why)
	}
	began := time.Now()
	caught, survived := of.tryAll(ctx, program, chosen, *parallel, known)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var unexcused []string
	seen := map[string]bool{}
	for _, m := range survived {
		seen[m.key] = true
		if excused[m.key] == "" {
			unexcused = append(unexcused, m.key)
			fmt.Printf("SURVIVED %s\n", m)
		}
	}
	var stale []string
	for k := range excused {
		if exists := slices.ContainsFunc(chosen, func(m mutant) bool { return m.key == k }); !seen[k] && (exists || all) {
			stale = append(stale, k)
		}
	}
	slices.Sort(stale)
	for _, k := range stale {
		fmt.Printf("EXCUSED FOR NOTHING %s\n", k)
	}
	fmt.Printf("%d mutants: %d caught, %d survived, of which %d are justified; %s\n",
		len(chosen), caught, len(survived), len(survived)-len(unexcused), time.Since(began).Round(time.Second))
	if len(unexcused)+len(stale) > 0 {
		return fmt.Errorf("%d survivors without a reason, %d reasons without a survivor: write a test, or the reason into survivors.txt", len(unexcused), len(stale))
	}
	return nil
}

// tryAll runs the tests on each mutant.
func (of target) tryAll(ctx context.Context, program string, chosen []mutant, parallel int, known *cache) (caught int, survived []mutant) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	next := 0
	for range parallel {
		wg.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				if i >= len(chosen) || ctx.Err() != nil {
					return
				}
				mu.Lock()
				why, remembered := known.why[chosen[i].key]
				mu.Unlock()
				var err error
				if !remembered {
					why, err = of.try(ctx, program, chosen[i].id)
				}
				mu.Lock()
				if err != nil {
					fmt.Fprintf(os.Stderr, "mutate: %s: %v\n", chosen[i], err)
				} else if !remembered && ctx.Err() == nil {
					known.add(chosen[i].key, why)
				}
				if err != nil || why == "" {
					survived = append(survived, chosen[i])
					fmt.Fprintf(os.Stderr, "%4d/%d survived: %s\n", i, len(chosen), chosen[i])
				} else {
					caught++
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	slices.SortFunc(survived, func(a, b mutant) int { return a.id - b.id })
	return caught, survived
}

// stage is some of the tests, and how much of the processor they may take.
type stage struct {
	patience time.Duration
	args     []string
}

// authzStages leave out what reads policies and complains about them: that is no
// decision.
var authzStages = []stage{
	{10 * time.Second, []string{"-test.run", quick}},
	{10 * time.Second, []string{"-test.run", "TestDecideAgrees"}},
	{60 * time.Second, []string{"-test.run", "^(Test|Fuzz)", "-test.skip", quick + "|Admission|Lint|Schema|Parse(Problems|Reads|IsBounded)|FuzzParse|TestDecideAgrees|TestUpdateDecides|TestForStays"}},
	{20 * time.Second, []string{"-test.run", "TestUpdateDecides|TestForStays"}},
}

// quick are the tests that take less than a tenth of a second each.
const quick = "TestCorpus|InEveryShape|TestPeerMode|TestTemplatesTake|TestParseIPv4|TestForShares|TestAfter|TestNothingDenies|TestAsEnvoy|" +
	"TestWhatChanged|TestIndexesHave|TestAThousand|^TestUpdate$|TestUpdateKeeps|FuzzHeaders|FuzzTemplates|" +
	"TestForwardedFor|TestJoin|TestClean|TestFolding|TestTextSets|TestManyValues|TestConditionsAre|TestWhatNobody|TestUpdateMakes|TestClassesAre|TestProblemsAre|TestTokenRules|TestHiddenClaims|TestADecisionByNo|" +
	"TestATable|TestChanges|TestAProgramReads|TestATarget|TestADecisionThat"

// try says why the tests fail on a mutant, or nothing if they pass.
func (of target) try(ctx context.Context, program string, id int) (why string, err error) {
	for _, st := range of.stages {
		if why, err = st.try(ctx, of.dir, program, id); why != "" || err != nil {
			return why, err
		}
	}
	return "", nil
}

func (st stage) try(ctx context.Context, dir, program string, id int) (why string, err error) {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	// A mutant may ask for memory without end, and for time.
	limits := fmt.Sprintf(`ulimit -v 8000000; ulimit -t %d; exec "$0" "$@"`, int(st.patience.Seconds()))
	args := append([]string{"-c", limits, program, "-test.short", "-test.failfast", "-test.timeout", deadline.String()}, st.args...)
	cmd := exec.CommandContext(ctx, "sh", args...)
	cmd.Dir = dir
	// The same random pairs for every mutant.
	cmd.Env = append(os.Environ(), fmt.Sprintf("MUTANT=%d", id), "SIGNET_SEED=1")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return "", nil
	// What is killed before its limit, which the kernel holds loosely, was killed by somebody.
	case ctx.Err() == context.DeadlineExceeded, cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime() > st.patience/2:
		return "the tests hang", nil
	case errors.As(err, &exit) && exit.Exited(): // one that somebody killed has noticed nothing
		return firstFailure(string(out)), nil
	}
	return "", err
}

func firstFailure(out string) string {
	for line := range strings.Lines(out) {
		if strings.Contains(line, "--- FAIL") || strings.HasPrefix(line, "panic") || strings.HasPrefix(line, "fatal error") {
			return strings.TrimSpace(line)
		}
	}
	return "they fail"
}

// readSurvivors reads lines "KEY<tab>REASON"; those that begin with # are remarks.
func readSurvivors(file string) (map[string]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	excused := map[string]string{}
	for s := bufio.NewScanner(f); s.Scan(); {
		line := s.Text()
		if line == "" || line[0] == '#' {
			continue
		}
		key, reason, ok := strings.Cut(line, "\t")
		if !ok || strings.TrimSpace(reason) == "" {
			return nil, fmt.Errorf("%s: no reason behind a tab: %s", file, line)
		}
		excused[key] = reason
	}
	return excused, nil
}
