package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// options are the flags.
type options struct {
	broken string   // the row to sabotage; empty: none
	only   []string // the rows to run; empty: all
	keep   bool
	dir    string
	output string
}

// Command is `signet demo`. It runs programs that it finds beside the running one
// or on PATH, and ends with an error unless every row held.
func Command() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole product at work on this machine",
		Long:  longHelp(),
		Example: `  signet demo                       # under a minute; exit status 0 only if every row held
  signet demo --break strict        # one thing sabotaged: exit status 1, naming it
  signet demo --keep --dir ./demo   # stays, and says how to try it by hand`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := o.check(c); err != nil {
				return err
			}
			// SIGHUP is what a closed terminal sends. Signals are caught until
			// everything is gone, so a second Ctrl-C changes nothing.
			ctx, stop := signal.NotifyContext(c.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			// Where the output is a pipe that was closed, by default the program
			// would end before it has cleaned up; so it gets an error instead.
			pipe := make(chan os.Signal, 1)
			signal.Notify(pipe, syscall.SIGPIPE)
			defer signal.Stop(pipe)
			return o.run(ctx, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	f := c.Flags()
	f.SortFlags = false
	f.StringVar(&o.broken, "break", "", "sabotage what this `ROW` looks at, which must then fail")
	f.StringSliceVar(&o.only, "only", nil, "run only these `ROWS`, after "+rowIdentity)
	f.StringVarP(&o.output, "output", "o", "table", "`FORMAT` of the result: table or json")
	f.BoolVar(&o.keep, "keep", false, "start everything, say how to try it by hand, and stay until Ctrl-C; the files stay")
	f.StringVar(&o.dir, "dir", "", "`FOLDER` for the files, new or empty; goes with --keep (default: a temporary one)")
	return c
}

func longHelp() string {
	var b strings.Builder
	b.WriteString(`Starts signet-ca, signet-agent and two Envoys on loopback, without root and
without a cluster, and checks one claim after the other by what is really
observed. Everything is gone when it ends.

Envoy is the one in $ENVOY, on PATH, or that "make tools" has fetched.

Each row can be sabotaged with --break:

`)
	for _, r := range rows {
		fmt.Fprintf(&b, "  %-15s %s\n  %-15s   --break %s: %s\n", r.name, r.claim, "", r.name, r.sabotage)
	}
	return strings.TrimRight(b.String(), "\n")
}

// check refuses flags that make no sense, alone or together.
func (o *options) check(c *cobra.Command) error {
	if c.Flags().Changed("break") {
		if err := checkName(o.broken); err != nil {
			return fmt.Errorf("--break: %w", err)
		}
	}
	for _, name := range o.only {
		if err := checkName(name); err != nil {
			return fmt.Errorf("--only: %w", err)
		}
	}
	if c.Flags().Changed("break") && len(o.only) > 0 && !slices.Contains(o.only, o.broken) {
		return fmt.Errorf("--break %s: --only leaves this row out", o.broken)
	}
	if o.output != "table" && o.output != "json" {
		return fmt.Errorf("--output %q: must be table or json", o.output)
	}
	if o.keep {
		for _, name := range []string{"break", "only", "output"} {
			if c.Flags().Changed(name) {
				return fmt.Errorf("--keep and --%s contradict each other: with --keep no rows run", name)
			}
		}
	} else if o.dir != "" {
		return errors.New("--dir goes with --keep: without it no file stays")
	}
	return nil
}

// run sets the stage, runs the rows or waits, and clears up.
func (o *options) run(ctx context.Context, stdout, stderr io.Writer) (err error) {
	began := time.Now()
	found, err := findPrograms(ctx)
	if err != nil {
		return err
	}
	dir, err := o.folder()
	if err != nil {
		return err
	}
	signalled := ctx
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	s := &stage{dir: dir, keep: o.keep, programs: found, fail: fail}
	defer func() { err = errors.Join(err, s.close()) }()

	fmt.Fprintf(stderr, "starting signet-ca, signet-agent and two Envoys in %s\n", dir)
	if err := s.open(ctx, *o); err != nil {
		if signalled.Err() != nil {
			return interrupted(signalled)
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		s.printLogs(stderr)
		return err
	}
	if o.keep {
		err := s.stay(ctx, stdout)
		if signalled.Err() != nil {
			fmt.Fprintf(stderr, "stopped; the files stay in %s\n", dir)
			return nil
		}
		s.printLogs(stderr)
		return err
	}
	all := outcome{Rows: o.perform(ctx, s, stderr), Seconds: time.Since(began).Seconds()}
	if signalled.Err() != nil {
		return interrupted(signalled)
	}
	all.Held = len(all.notHeld()) == 0 && ctx.Err() == nil
	if !all.Held {
		s.printLogs(stderr)
	}
	print := all.printTable
	if o.output == "json" {
		print = all.printJSON
	}
	if err := print(stdout); err != nil {
		return fmt.Errorf("printing the result: %w", err)
	}
	switch names := all.notHeld(); {
	case ctx.Err() != nil:
		return interrupted(ctx)
	case o.broken != "" && !slices.Contains(names, o.broken):
		return fmt.Errorf("row %s held although it was sabotaged: it shows nothing", o.broken)
	case len(names) > 0:
		return fmt.Errorf("these rows did not hold: %s", strings.Join(names, ", "))
	}
	if o.output == "table" {
		fmt.Fprintf(stdout, "\nAll %d rows held, in %.0f s.\n", len(all.Rows), all.Seconds)
	}
	return nil
}

func interrupted(ctx context.Context) error {
	return fmt.Errorf("the demo was not finished: %w", context.Cause(ctx))
}

// perform runs the rows. After identity has failed, or the stage fell down, there
// is nothing to look at.
func (o *options) perform(ctx context.Context, s *stage, progress io.Writer) (results []result) {
	skip := ""
	for _, r := range rows {
		if len(o.only) > 0 && r.name != rowIdentity && !slices.Contains(o.only, r.name) {
			continue
		}
		if skip != "" {
			results = append(results, result{Row: r.name, Claim: r.claim, Outcome: notRun, Observed: []string{}, Problem: skip})
			continue
		}
		fmt.Fprintf(progress, "%s: %s … ", r.name, r.claim)
		res := perform(ctx, s, r, r.name == o.broken)
		fmt.Fprintf(progress, "%s\n", res.Outcome)
		results = append(results, res)
		switch {
		case ctx.Err() != nil:
			skip = context.Cause(ctx).Error()
		case r.name == rowIdentity && res.Outcome != held:
			skip = "the proxies are not ready"
		}
	}
	return results
}

// folder is D, which is empty.
func (o *options) folder() (string, error) {
	if o.dir == "" {
		dir, err := os.MkdirTemp("", "signet-demo-")
		if err != nil {
			return "", fmt.Errorf("making a temporary folder: %w", err)
		}
		if len(dir) > maxDir {
			err := fmt.Errorf("the path of the temporary folder %s has more than %d bytes, too many for sockets in it; set TMPDIR to a shorter one", dir, maxDir)
			return "", errors.Join(err, os.Remove(dir))
		}
		return dir, nil
	}
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return "", fmt.Errorf("--dir: %w", err)
	}
	if len(dir) > maxDir {
		return "", fmt.Errorf("--dir %s: the path has more than %d bytes, too many for sockets in it; choose a shorter one", dir, maxDir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("--dir: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("--dir: %w", err)
	}
	if len(entries) > 0 {
		return "", fmt.Errorf("--dir %s: the folder is not empty (it holds %s); choose another one, or remove it", dir, entries[0].Name())
	}
	return dir, nil
}
