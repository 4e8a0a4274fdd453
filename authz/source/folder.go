package source

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/authz"
)

const (
	// gather is how long renames are gathered after the first, so that several
	// make one snapshot.
	gather = 2 * time.Millisecond
	// gatherRemovals is how long after the last removal the folder is read: time
	// for a removal to turn out to be one half of a move, or of the removal of
	// the whole folder. maxGather bounds it all.
	gatherRemovals = 50 * time.Millisecond
	maxGather      = time.Second
	// maxRereads is how often the folder is read again, one gather apart, because
	// it changed meanwhile, before that is an error.
	maxRereads = 100

	defaultRecheck = 10 * time.Second
	minRecheck     = 10 * time.Millisecond
)

// Config is what [OpenFolder] needs.
type Config struct {
	// Dir is the folder. The path may go through symbolic links; a swap of one
	// is a change of all files.
	Dir string
	// Options are handed to [authz.Compile].
	Options authz.Options
	// Recheck is how often everything is compared with what was read, in case an
	// event was missed: 10 ms or longer, zero means 10 s.
	Recheck time.Duration
	// Log is told of new snapshots, and once of each problem; nil discards.
	Log *slog.Logger
	// Metrics is where metrics are registered; nil registers none.
	Metrics prometheus.Registerer
}

// Folder is the policies of a directory. Its methods are safe for concurrent use.
type Folder struct {
	dir     string // as configured, for messages
	abs     string
	options authz.Options
	recheck time.Duration
	log     *slog.Logger
	metrics *metrics
	watch   *watch
	running atomic.Bool

	// Owned by OpenFolder and then by Run.
	wd       int32            // watch descriptor of the folder that is adopted
	resolved string           // its path without links
	final    place            // the last element of that
	complete bool             // what is there counts, because the folder came as a whole
	happened happened         // events that no complete reading has used yet
	files    map[string]*file // by name
	set      authz.Set
	compiled []authz.Problem // of putting the files together
	// between is called by each reading after the files were read and before
	// they count, so that tests can change the folder just then. nil otherwise.
	between func()

	board
}

// OpenFolder reads the folder for the first time; all files in it must be
// complete. It fails if the folder is missing or cannot be read as a whole. Bad
// files are no failure: they deny as [authz.Set.Update] has it, and
// [Folder.Problems] tells of them.
//
// From here on the kernel notes changes; [Folder.Run] applies them. Without Run
// the folder stays as it was read.
func OpenFolder(cfg Config) (*Folder, error) {
	if cfg.Dir == "" {
		return nil, errors.New("opening the folder of policies: no folder is configured")
	}
	abs, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("opening the folder of policies %s: %w", cfg.Dir, err)
	}
	if cfg.Recheck == 0 {
		cfg.Recheck = defaultRecheck
	}
	if cfg.Recheck < minRecheck {
		return nil, fmt.Errorf("opening the folder of policies %s: it cannot be looked at every %v; the least is %v", cfg.Dir, cfg.Recheck, minRecheck)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	f := &Folder{
		dir: filepath.Clean(cfg.Dir), abs: abs, options: cfg.Options, recheck: cfg.Recheck, log: cfg.Log,
		wd: -1, files: map[string]*file{},
	}
	f.status.changed = make(chan struct{})
	if f.watch, err = newWatch(); err != nil {
		return nil, fmt.Errorf("opening the folder of policies %s: %w", cfg.Dir, err)
	}
	if f.metrics, err = newMetrics(cfg.Metrics, &f.board); err != nil {
		f.watch.close()
		return nil, fmt.Errorf("registering metrics of the folder of policies: %w", err)
	}
	for range maxRereads {
		if err = f.read(); !errors.Is(err, errChanging) {
			break
		}
		time.Sleep(gather)
	}
	if err != nil {
		f.watch.close()
		return nil, fmt.Errorf("reading the folder of policies %s: %w", cfg.Dir, err)
	}
	f.publish(nil)
	return f, nil
}

// Run applies changes until ctx ends, and returns its cause; or it returns why
// changes can no longer be seen. It can run once.
func (f *Folder) Run(ctx context.Context) error {
	if !f.running.CompareAndSwap(false, true) {
		return errors.New("running the folder of policies: it ran already")
	}
	events := make(chan error, 1)
	go func() { events <- f.watch.run() }()
	err := f.run(ctx, events)
	f.watch.close()
	if err == nil {
		<-events
		return context.Cause(ctx)
	}
	return fmt.Errorf("running the folder of policies %s: %w", f.dir, err)
}

// run returns nil when ctx ends, else what came from events.
func (f *Folder) run(ctx context.Context, events <-chan error) error {
	timer := time.NewTimer(f.recheck)
	defer timer.Stop()
	rereads := 0
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-events:
			return err
		case <-f.watch.wake:
			if some, _, _ := f.watch.pending(); !some {
				continue // nothing that matters, or an earlier reading saw to it
			}
		case <-timer.C:
		}
		// What a regular look meets may be as unfinished as what an event tells of. If
		// this fails, so does the reading, which says why.
		_ = f.watch.drain()
		if wait := f.gathering(time.Now()); wait > 0 {
			timer.Reset(wait)
			continue
		}
		err := f.read()
		if errors.Is(err, errChanging) && rereads < maxRereads {
			rereads++
			timer.Reset(gather)
			continue
		}
		rereads = 0
		f.publish(err)
		timer.Reset(f.recheck)
	}
}

// gathering is how long to wait for more events before the folder is read.
func (f *Folder) gathering(now time.Time) time.Duration {
	some, first, gone := f.watch.pending()
	if !some {
		return 0
	}
	until := first.Add(gather)
	if u := gone.Add(gatherRemovals); u.After(until) {
		until = u
	}
	if u := first.Add(maxGather); until.After(u) {
		until = u
	}
	return until.Sub(now)
}

// read reads the folder and puts what counts into force. On an error nothing
// changes, and the events are kept for the next time.
func (f *Folder) read() error {
	h, err := f.watch.take()
	if err != nil {
		return err
	}
	f.happened = f.happened.then(h)
	dir, err := f.open()
	if err != nil {
		return err
	}
	defer dir.Close()
	r := reading{
		dir: dir, path: f.dir, complete: f.complete, between: f.between, before: f.files,
		fates: f.happened.files, swapped: f.happened.files[dataLink] == renamed,
	}
	if err := r.read(); err != nil {
		return cause(err)
	}
	if err := f.veto(&r); err != nil {
		return err
	}
	if err := f.stillThere(dir); err != nil {
		return err
	}
	f.adopt(&r)
	return nil
}

// open opens the folder if it is the one that is adopted, or one that may be
// adopted now.
func (f *Folder) open() (*os.File, error) {
	resolved, err := filepath.EvalSymlinks(f.abs)
	if err != nil {
		return nil, cause(err)
	}
	dir, err := os.OpenFile(resolved, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, cause(err)
	}
	wd, err := f.watch.descriptor(dir)
	if err != nil {
		dir.Close()
		return nil, err
	}
	if wd == f.wd && resolved == f.resolved {
		return dir, nil
	}
	switch {
	case f.wd == -1, wd == f.wd, resolved != f.resolved, f.happened.places[f.final] == renamed:
	default:
		f.watch.forget(wd)
		dir.Close()
		return nil, errors.New("it was created anew and may be incomplete; fill a folder of another name and rename it, or start again when this one is complete")
	}
	if wd != f.wd {
		f.complete = true
		f.happened.files = nil
	}
	f.wd, f.resolved = wd, resolved
	f.final = f.watch.follow(wd, f.abs, resolved)
	return dir, nil
}

// veto takes back what counted in this reading and was written to meanwhile: it
// may have been read half-written. A file that went meanwhile was not waited for.
func (f *Folder) veto(r *reading) error {
	if err := f.watch.drain(); err != nil {
		return err
	}
	if r.complete {
		return nil // complete by contract
	}
	if _, _, gone := f.watch.pending(); !gone.IsZero() {
		for name := range r.before {
			if _, ok := r.after[name]; !ok {
				return errChanging
			}
		}
	}
	written, lost := f.watch.writtenNow()
	for name, how := range r.fates {
		if how != renamed || !lost && !written[name] {
			continue
		}
		if before := r.before[name]; before != nil {
			r.after[name] = before
		} else {
			delete(r.after, name)
		}
	}
	return nil
}

// stillThere makes sure that the path leads to the folder that was read, after it
// was read: a folder that is being deleted looks like one without policies.
func (f *Folder) stillThere(dir *os.File) error {
	was, err := dir.Stat()
	if err != nil {
		return cause(err)
	}
	is, err := os.Stat(f.abs)
	if errors.Is(err, fs.ErrNotExist) {
		return cause(err)
	}
	if err != nil || !os.SameFile(was, is) {
		return errChanging
	}
	return nil
}

// adopt makes a reading the state of the folder, and a new snapshot of it if
// something that counts is different.
func (f *Folder) adopt(r *reading) {
	changed := f.snapshot.Load() == nil
	for name, now := range r.after {
		before := f.files[name]
		changed = changed || !now.sameForce(before)
		if now.deviation != nil && (before == nil || before.deviation == nil) {
			f.metrics.inPlace.Inc()
		}
	}
	for name, before := range f.files {
		changed = changed || !before.sameForce(r.after[name])
	}
	f.files, f.complete, f.happened = r.after, false, happened{}
	if !changed {
		return
	}
	var all []authz.Resource
	for _, name := range slices.Sorted(maps.Keys(f.files)) {
		all = append(all, f.files[name].resources...)
	}
	var together, compiled []authz.Problem
	f.set, together = f.set.Update(all)
	snapshot, compiled := f.follow(f.set, f.options)
	f.compiled = slices.Concat(together, compiled)
	generation := f.replace(snapshot, f.set)
	f.log.Info("policies loaded", "dir", f.dir, "generation", generation, "files", len(f.files), "resources", f.set.Len())
}

// publish makes the outcome of a reading known: err is why there was none.
func (f *Folder) publish(err error) {
	problems := f.problems()
	if err != nil {
		problems = append(problems, authz.Problem{
			Origin: f.dir, Message: "the folder of policies cannot be read: " + err.Error(),
			Fix: "the last snapshot stays in force until the folder is back",
		})
	}
	was := f.tell(f.log, problems, err, time.Now())
	if err != nil && (was == nil || was.Error() != err.Error()) {
		f.metrics.failed.Inc()
	}
	if err == nil && was != nil {
		f.log.Info("folder of policies can be read again", "dir", f.dir)
	}
}

// problems is those of the files, by name, and of putting them together.
func (f *Folder) problems() []authz.Problem {
	var all []authz.Problem
	for _, name := range slices.Sorted(maps.Keys(f.files)) {
		file := f.files[name]
		if file.deviation != nil {
			all = append(all, *file.deviation)
		}
		all = append(all, file.problems...)
	}
	return append(all, f.compiled...)
}

// Ready is nil if the snapshot is what the folder says, as far as that counts, or
// why the folder cannot be read. Decisions go on with the last snapshot in either
// case. Bad files do not make it unready: what they deny is denied on purpose.
func (f *Folder) Ready() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.status.err == nil {
		return nil
	}
	return fmt.Errorf("reading the folder of policies %s: %w; the snapshot of %s stays in force",
		f.dir, f.status.err, f.status.good.UTC().Format(time.RFC3339))
}
