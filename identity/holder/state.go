package holder

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/identity"
)

// ErrNoState says that this host offers no place at that path where keys would
// stay in memory. The error that wraps it says why and what to do; an agent can
// run without saved state, it then has to reach an authority after a restart
// before it can serve.
var ErrNoState = errors.New("agent state cannot be kept")

// ErrNewerState says that the state was saved by a newer version of Signet.
var ErrNewerState = errors.New("agent state has a newer format")

// ErrStateInUse says that another process has the folder of the state.
var ErrStateInUse = errors.New("another process has it")

// ErrStateRemoved says that a state that was saved is there no more.
var ErrStateRemoved = errors.New("the old state was removed")

// errSwap is the reason to remove a state that was saved already.
var errSwap = errors.New("this machine has swap")

const (
	stateName = "state"     // in the folder of the state
	stateTemp = "state.new" // until it is complete
	// maxState bounds the state file, in bytes, read or written.
	maxState = 64 << 20
)

// State is what an agent needs to serve at once after its own restart. It holds
// private keys; it prints and logs without them.
type State struct {
	// Saved is when the state was saved. Save sets it if it is zero.
	Saved time.Time
	// Agent is the agent's own SVID, nil if there is none that is valid;
	// AgentRenewAt is when to renew it, TokenBy when a renewal without a fresh
	// token will be refused.
	Agent        *x509svid.SVID
	AgentRenewAt time.Time
	TokenBy      time.Time
	// Trust is the state of trust; nil if none was known.
	Trust *identity.Trust
	// NodeUID is the UID of the node, empty if none was known.
	NodeUID string
	// Pods are the pods of the node.
	Pods []identity.Workload
	// SVIDs are those that a [Holder] had; Config.Saved takes them.
	SVIDs []Held
	// Extra is whatever else the agent keeps, by name.
	Extra map[string][]byte
}

// String says what the state holds, in numbers.
func (s State) String() string {
	return fmt.Sprintf("state of %s: %d pods, %d SVIDs", s.Saved.UTC().Format(time.RFC3339), len(s.Pods), len(s.SVIDs))
}

// LogValue implements slog.LogValuer.
func (s State) LogValue() slog.Value { return slog.StringValue(s.String()) }

// StateOptions say where state may be kept.
type StateOptions struct {
	// AllowSwap accepts a folder from which keys may be swapped out to a disk,
	// with a warning.
	AllowSwap bool
	// NotBelow are folders that others can read, such as the folder of the
	// agent's sockets, which every pod mounts: the state must be in none of
	// them.
	NotBelow []string
	// Wait is how long another process that has the folder may take to leave.
	Wait time.Duration
	// Log gets warnings; nil logs nothing.
	Log *slog.Logger
}

// StateFile is a file for a [State] on a file system that is only memory. Its
// methods are safe for concurrent use. One process at a time has it open: the folder,
// which nobody else can open, is locked (flock).
type StateFile struct {
	dir  string
	opt  StateOptions
	log  *slog.Logger
	host host

	mu   sync.Mutex // one Save or Load at a time
	root *os.Root   // of dir: what was checked is what is used
	lock *os.File   // the folder, locked
}

// host is what the checks need to know of the machine; tests have their own.
type host struct {
	fsType    func(dir *os.File) (int64, error) // magic number of the file system
	swaps     string                            // path of /proc/swaps
	mountinfo string                            // path of /proc/self/mountinfo
	euid      int
	fault     func(step string) error // fails a step of Save
}

func realHost() host {
	return host{
		fsType: func(dir *os.File) (int64, error) {
			var s unix.Statfs_t
			err := unix.Fstatfs(int(dir.Fd()), &s)
			return int64(s.Type), err
		},
		swaps:     "/proc/swaps",
		mountinfo: "/proc/self/mountinfo",
		euid:      os.Geteuid(),
		fault:     func(string) error { return nil },
	}
}

// OpenStateFile opens the folder dir, an absolute path, for a state file, and
// makes it (0700) if only its last element is missing. The folder must be ours,
// closed to group and others, not below a folder of opt.NotBelow, and on a tmpfs
// or ramfs. Where the machine has swap, a tmpfs must be mounted with noswap
// (Linux 6.4) unless opt.AllowSwap.
//
// The error wraps [ErrNoState] if the file system or swap is the reason, and
// [ErrStateInUse] if another process has the folder and did not leave in opt.Wait. Any
// other error is a mistake in the configuration, and says how to mend it.
func OpenStateFile(dir string, opt StateOptions) (*StateFile, error) {
	return openStateFile(dir, opt, realHost())
}

func openStateFile(dir string, opt StateOptions, host host) (f *StateFile, err error) {
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("opening state folder %q: it must be an absolute path", dir)
	}
	dir = filepath.Clean(dir)
	f = &StateFile{dir: dir, opt: opt, log: opt.Log, host: host}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	made := false
	defer func() {
		if err == nil {
			return
		}
		if f.lock != nil {
			err = errors.Join(err, f.lock.Close())
		}
		if f.root != nil {
			err = errors.Join(err, f.root.Close())
		}
		if made {
			// It is empty, and nobody has been told of it.
			_ = os.Remove(dir)
		}
		f, err = nil, fmt.Errorf("opening state folder %s: %w", dir, err)
	}()
	switch err := os.Mkdir(dir, 0o700); {
	case err == nil:
		made = true
	case !errors.Is(err, fs.ErrExist):
		return f, err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return f, err
	}
	if !info.IsDir() {
		return f, errors.New("it is not a folder; remove it or choose another path (a link to a folder is not followed)")
	}
	if f.root, err = os.OpenRoot(dir); err != nil {
		return f, err
	}
	opened, err := f.root.Stat(".")
	if err != nil {
		return f, err
	}
	if !os.SameFile(info, opened) {
		return f, errors.New("it was replaced while it was opened")
	}
	if err := notBelow(dir, opt.NotBelow); err != nil {
		return f, err
	}
	swap, err := f.check()
	if err != nil {
		return f, err
	}
	// Only now, when it is certain that nobody else can open the folder and hold the
	// lock; and before anything in it is touched, which may be a predecessor's.
	if err := f.take(opt.Wait); err != nil {
		made = false // somebody has it
		return f, err
	}
	// What a crash in the middle of Save left may hold keys.
	if err := f.discard(); err != nil {
		return f, err
	}
	if swap {
		f.log.Warn("keys of the agent's state may be swapped out to a disk, as allowSwap says", "dir", dir)
	}
	return f, nil
}

// Close releases the folder. The file stays.
func (f *StateFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return errors.Join(f.lock.Close(), f.root.Close())
}

// take locks the folder, until it is closed or the process ends.
func (f *StateFile) take(wait time.Duration) (err error) {
	if f.lock, err = f.root.Open("."); err != nil {
		return err
	}
	for deadline := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
		switch err := unix.Flock(int(f.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("locking it: %w", err)
		case !time.Now().Before(deadline):
			return fmt.Errorf("%w; stop that one first, or choose another folder", ErrStateInUse)
		}
	}
}

// check verifies that keys are safe in the folder at this moment. swap says that
// they may be swapped out, and that this is allowed.
func (f *StateFile) check() (swap bool, err error) {
	d, err := f.root.Open(".")
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	info, err := d.Stat()
	if err != nil {
		return false, err
	}
	if err := f.private(info, f.dir, 0o700); err != nil {
		return false, err
	}
	magic, err := f.host.fsType(d)
	switch {
	case err != nil:
		return false, fmt.Errorf("%w: the type of its file system is unknown: %w", ErrNoState, err)
	case magic == unix.RAMFS_MAGIC:
		return false, nil // never swapped
	case magic != unix.TMPFS_MAGIC:
		return false, fmt.Errorf("%w: keys must stay in memory, and this folder is not on a tmpfs (file system type %#x); choose a folder below /run, or mount one with: mount -t tmpfs -o noswap,mode=0700,size=64m tmpfs %s", ErrNoState, magic, f.dir)
	}
	active, err := f.swapActive()
	if err != nil {
		return false, fmt.Errorf("%w: whether this machine swaps is unknown: %w", ErrNoState, err)
	}
	if !active {
		return false, nil
	}
	safe, err := f.mountedNoswap(info)
	switch {
	case err != nil && !f.opt.AllowSwap:
		return false, fmt.Errorf("%w: whether its mount has the option noswap is unknown: %w", ErrNoState, err)
	case safe:
		return false, nil
	case f.opt.AllowSwap:
		return true, nil
	}
	return false, fmt.Errorf("%w: %w, and a tmpfs without the option noswap may be written to it; mount one with: mount -t tmpfs -o noswap,mode=0700,size=64m tmpfs %s (Linux 6.4 or later), or turn swap off, or set allowSwap: true", ErrNoState, errSwap, f.dir)
}

// private verifies that we own a file or folder and nobody else may open it.
func (f *StateFile) private(info fs.FileInfo, path string, mode fs.FileMode) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("the owner of %s is unknown", path)
	}
	if int(st.Uid) != f.host.euid {
		return fmt.Errorf("%s belongs to user %d, and this process is user %d; remove it", path, st.Uid, f.host.euid)
	}
	if p := info.Mode().Perm(); p&0o077 != 0 {
		return fmt.Errorf("%s is open to others (mode %04o) and holds keys; run: chmod %04o %s", path, p, mode, path)
	}
	return nil
}

func (f *StateFile) swapActive() (bool, error) {
	r, err := os.Open(f.host.swaps)
	if errors.Is(err, fs.ErrNotExist) {
		// A kernel without swap has no such file; but without /proc nothing is
		// known.
		if _, err := os.Stat(f.host.mountinfo); err != nil {
			return false, err
		}
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer r.Close()
	return anySwap(r)
}

func (f *StateFile) mountedNoswap(dir fs.FileInfo) (bool, error) {
	st, ok := dir.Sys().(*syscall.Stat_t)
	if !ok {
		return false, errors.New("the device of the folder is unknown")
	}
	r, err := os.Open(f.host.mountinfo)
	if err != nil {
		return false, err
	}
	defer r.Close()
	return noswap(r, fmt.Sprintf("%d:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev))))
}

// anySwap reports whether /proc/swaps, as r has it, lists a device: any line
// after the heading.
func anySwap(r io.Reader) (bool, error) {
	s := bufio.NewScanner(r)
	for n := 0; s.Scan(); n++ {
		if n > 0 && strings.TrimSpace(s.Text()) != "" {
			return true, nil
		}
	}
	return false, s.Err()
}

// noswap reports whether the file system of a device (MAJOR:MINOR) is mounted
// with noswap, according to /proc/self/mountinfo, as r has it (proc(5)). It goes
// by the device and not by the path: noswap belongs to the file system, and
// every mount of it, bind mounts too, shows the same options there.
func noswap(r io.Reader, device string) (bool, error) {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		// 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
		before, after, ok := strings.Cut(s.Text(), " - ")
		fields, super := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 6 || fields[2] != device || len(super) < 3 {
			continue
		}
		return slices.Contains(strings.Split(super[2], ","), "noswap"), nil
	}
	if err := s.Err(); err != nil {
		return false, err
	}
	return false, fmt.Errorf("no mount of device %s is listed", device)
}

// notBelow refuses dir, which exists, if it is one of the folders or below it,
// whatever the path that leads there: links and bind mounts are seen through.
func notBelow(dir string, folders []string) error {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	for _, folder := range folders {
		public, err := os.Stat(folder)
		if errors.Is(err, fs.ErrNotExist) {
			continue // nothing that exists is below it
		}
		if err != nil {
			return err
		}
		for p := real; ; p = filepath.Dir(p) {
			info, err := os.Stat(p)
			if err != nil {
				return err
			}
			if os.SameFile(info, public) {
				return fmt.Errorf("it is in %s, which others can read; choose a folder elsewhere, such as /run/signet-agent", folder)
			}
			if p == filepath.Dir(p) {
				break
			}
		}
	}
	return nil
}

// Load reads the state. SVIDs that have expired are left out. The error wraps
// fs.ErrNotExist if nothing was saved and [ErrNewerState] if a newer version
// saved it; any other error says that the file is damaged or not private. In
// each case the agent starts without saved state, and the next Save replaces it.
func (f *StateFile) Load() (State, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, err := f.load(time.Now())
	if err != nil {
		return State{}, fmt.Errorf("loading agent state from %s: %w", filepath.Join(f.dir, stateName), err)
	}
	return s, nil
}

func (f *StateFile) load(now time.Time) (s State, err error) {
	if _, err := f.check(); err != nil {
		return State{}, err
	}
	// A pipe in its place must not block us.
	r, err := f.root.OpenFile(stateName, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return State{}, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	info, err := r.Stat()
	if err != nil {
		return State{}, err
	}
	switch {
	case !info.Mode().IsRegular():
		return State{}, errors.New("it is not a regular file; remove it")
	case info.Size() > maxState:
		return State{}, fmt.Errorf("it has %d bytes; at most %d are allowed", info.Size(), maxState)
	}
	if err := f.private(info, filepath.Join(f.dir, stateName), 0o600); err != nil {
		return State{}, err
	}
	data := make([]byte, info.Size())
	defer clear(data)
	if _, err := io.ReadFull(r, data); err != nil {
		return State{}, err
	}
	return decodeState(data, now)
}

// Save replaces the state by s. When it fails the old state is what Load finds,
// with one exception: if swap was turned on meanwhile and may not be used, the
// old state is removed and the error, an [ErrNoState] and [ErrStateRemoved], says so.
func (f *StateFile) Save(s State) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.Saved.IsZero() {
		s.Saved = time.Now()
	}
	if err := f.save(s); err != nil {
		return fmt.Errorf("saving agent state to %s: %w", filepath.Join(f.dir, stateName), err)
	}
	return nil
}

func (f *StateFile) save(s State) error {
	switch _, err := f.check(); {
	case errors.Is(err, errSwap):
		if gone := f.root.Remove(stateName); gone != nil && !errors.Is(gone, fs.ErrNotExist) {
			return fmt.Errorf("%w; the old state could not be removed: %w", err, gone)
		}
		return fmt.Errorf("%w; %w", err, ErrStateRemoved)
	case err != nil:
		return err
	}
	data, err := encodeState(s)
	defer clear(data)
	if err != nil {
		return err
	}
	if err := f.discard(); err != nil {
		return err
	}
	if err := f.write(data); err != nil {
		return errors.Join(err, f.discard())
	}
	if err := f.host.fault("rename"); err != nil {
		return errors.Join(err, f.discard())
	}
	if err := f.root.Rename(stateTemp, stateName); err != nil {
		return errors.Join(err, f.discard())
	}
	return nil
}

// write makes a complete temporary file.
func (f *StateFile) write(data []byte) (err error) {
	if err := f.host.fault("create"); err != nil {
		return err
	}
	w, err := f.root.OpenFile(stateTemp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.host.fault("close"), w.Close())
	}()
	// In two parts, so that a test can fail between them as a full tmpfs would.
	half := len(data) / 2
	if _, err := w.Write(data[:half]); err != nil {
		return err
	}
	if err := f.host.fault("write"); err != nil {
		return err
	}
	if _, err := w.Write(data[half:]); err != nil {
		return err
	}
	if err := f.host.fault("sync"); err != nil {
		return err
	}
	return w.Sync()
}

// discard removes a temporary file that was not finished, if there is one.
func (f *StateFile) discard() error {
	if err := f.root.Remove(stateTemp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
