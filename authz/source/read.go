package source

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/authz"
)

const (
	// maxFileBytes is the largest file that is read, maxFiles how many policy
	// files a folder may have, maxBytes what they may add up to.
	maxFileBytes = 16 << 20
	maxFiles     = 10_000
	maxBytes     = 64 << 20

	// dataLink is the link that kubelet swaps to change a volume as a whole, and
	// that its user-visible links go through.
	dataLink = "..data"
)

// errChanging means that the folder changed so that what was read does not belong
// together; it is read again.
var errChanging = errors.New("it keeps changing while it is read")

var errNoData = errors.New(`"..data" does not lead to a folder, but links refer to it; restore it`)

// stamp is what tells one state of a file from another without reading it.
type stamp struct {
	link string // what the name is a link to, empty: not a link
	data string // what ..data led to, where the link goes through it

	device, inode uint64
	size          int64
	modified      unix.Timespec
	mode          uint32 // type only
	err           string // why there is no more than this
}

func stampOf(st *unix.Stat_t) stamp {
	return stamp{device: uint64(st.Dev), inode: st.Ino, size: st.Size, modified: st.Mtim, mode: st.Mode & unix.S_IFMT}
}

// file is what is known of one name. It is not changed once it is in
// Folder.files.
type file struct {
	// counted says that contents of this name came into force; the fields up to
	// problems are about those.
	counted   bool
	at        stamp
	sum       [sha256.Size]byte
	failed    string // why it could not be read; resources then stands for that
	resources []authz.Resource
	problems  []authz.Problem

	// seen is what was last looked at; deviation is set if that is not what
	// counted.
	seen      stamp
	deviation *authz.Problem
}

// reading is one look at the folder.
type reading struct {
	dir      *os.File
	path     string
	data     string // what ..data leads to, empty: nowhere
	complete bool   // all that is there counts
	between  func() // see Folder.between; may be nil
	swapped  bool   // ..data was renamed into place
	fates    map[string]fate
	before   map[string]*file

	after map[string]*file
	buf   []byte
}

// read looks at everything in the folder. It sets r.after and nothing else that
// lasts.
func (r *reading) read() error {
	names, err := r.names()
	if err != nil {
		return err
	}
	if err := r.resolveData(); err != nil {
		return err
	}
	if err := r.weigh(names); err != nil {
		return err
	}
	r.after = make(map[string]*file, len(names))
	for _, name := range names {
		before := r.before[name]
		now, err := r.look(name, before)
		if err != nil {
			return err
		}
		if now == nil {
			continue
		}
		r.after[name] = now
	}
	if r.between != nil {
		r.between()
	}
	// The names and the swap of ..data belong together: kubelet removes what an
	// old ..data led to right after the swap.
	if data, err := r.readLink(dataLink); (err == nil || r.data != "") && data != r.data {
		return errChanging
	}
	return nil
}

// names is the policy files in the folder, sorted.
func (r *reading) names() ([]string, error) {
	var names []string
	for {
		some, err := r.dir.Readdirnames(1024)
		for _, name := range some {
			if isPolicy(name) {
				names = append(names, name)
			}
		}
		if len(names) > maxFiles {
			return nil, fmt.Errorf("there are more than %d files; join them or take some away", maxFiles)
		}
		if errors.Is(err, io.EOF) {
			slices.Sort(names)
			return names, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// weigh adds up the files before any is read.
func (r *reading) weigh(names []string) error {
	bytes := int64(0)
	for _, name := range names {
		var st unix.Stat_t
		// What cannot be looked at, or is too large for itself, will not be read.
		if unix.Fstatat(int(r.dir.Fd()), name, &st, 0) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size <= maxFileBytes {
			bytes += st.Size
		}
		if bytes > maxBytes {
			return fmt.Errorf("the files have more than %d bytes together; take some away", maxBytes)
		}
	}
	return nil
}

func (r *reading) resolveData() error {
	link, err := r.readLink(dataLink)
	if err != nil {
		return nil // no such volume; links that go through it say so
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(r.dir.Fd()), link, &st, 0); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return errNoData
	}
	r.data = link
	return nil
}

// look decides what a name stands for now. nil means that it is not there.
func (r *reading) look(name string, before *file) (*file, error) {
	link, err := r.readLink(name)
	isLink := err == nil
	target := name
	var now stamp
	viaData := false
	if isLink {
		var rest string
		if rest, viaData = strings.CutPrefix(link, dataLink+"/"); viaData {
			if r.data == "" {
				return nil, errNoData
			}
			// Not through ..data again: all files are read from the same side of
			// a swap.
			target = filepath.Join(r.data, rest)
		}
	}
	var st unix.Stat_t
	switch err := unix.Fstatat(int(r.dir.Fd()), target, &st, 0); {
	case errors.Is(err, unix.ENOENT) && (viaData || !isLink):
		// Gone since the names were listed; or a link of a volume whose file the
		// last swap took away, or the next one brings.
		return nil, nil
	case err != nil:
		now.err = err.Error()
	default:
		now = stampOf(&st)
	}
	now.link = link
	if viaData {
		now.data = r.data
	}

	fate := r.fates[name]
	counts := r.complete || fate == renamed
	switch {
	case counts:
	case viaData:
		// A swap counts, and so does a new link to what an earlier one brought.
		counts = r.swapped || before == nil || before.at.data != r.data
	case before != nil && before.counted && before.failed != "" && fate != written:
		// The same file that counted: maybe it can be read now.
		counts = now == before.at
	}
	if counts {
		return r.count(name, target, now, before), nil
	}
	if before != nil && before.seen == now && fate != written {
		return before, nil
	}
	next := file{}
	if before != nil {
		next = *before
	}
	next.seen = now
	if next.counted && next.failed == "" {
		if content, _, err := r.contents(target); err == nil && sha256.Sum256(content) == next.sum {
			next.deviation = nil
			return &next, nil
		}
	}
	if next.deviation == nil {
		next.deviation = r.inPlace(name, fate, next.counted)
	}
	return &next, nil
}

// count makes what is there now what counts.
func (r *reading) count(name, target string, now stamp, before *file) *file {
	origin := filepath.Join(r.path, name)
	content, got, err := r.contents(target)
	got.link, got.data = now.link, now.data
	next := &file{counted: true, at: got, seen: got}
	if err != nil {
		next.at, next.seen = now, now
		next.failed = err.Error()
		if before != nil && before.counted && before.failed == next.failed {
			next.resources, next.problems = before.resources, before.problems
			return next
		}
		res, p := authz.Unreadable(origin, err)
		next.resources, next.problems = []authz.Resource{res}, []authz.Problem{p}
		return next
	}
	next.sum = sha256.Sum256(content)
	if before != nil && before.counted && before.failed == "" && before.sum == next.sum {
		next.resources, next.problems = before.resources, before.problems
		return next
	}
	next.resources, next.problems = authz.Parse(origin, content)
	return next
}

// sameForce reports whether f and o put the same into force; nil puts nothing.
func (f *file) sameForce(o *file) bool {
	if f == nil || !f.counted || o == nil || !o.counted {
		return (f != nil && f.counted) == (o != nil && o.counted)
	}
	return f.sum == o.sum && f.failed == o.failed
}

// inPlace is the report on contents that do not count.
func (r *reading) inPlace(name string, f fate, counted bool) *authz.Problem {
	p := &authz.Problem{Origin: filepath.Join(r.path, name)}
	switch {
	case f == written && counted:
		p.Message = "it was written in place, so it may be half of something and is not applied; the contents before that go on"
	case f == written:
		p.Message = "it was created in place, so it may be half of something and is not applied"
	case counted:
		p.Message = "it is different, but was not seen to be renamed into place, and is not applied; the contents before that go on"
	default:
		p.Message = "it is new, but was not seen to be renamed into place, and is not applied"
	}
	p.Fix = fmt.Sprintf("write to a name that begins with a dot and rename it; to apply what is there now: mv %[1]s .%[1]s && mv .%[1]s %[1]s", name)
	return p
}

// contents reads a regular file. Other things are not opened, so nothing blocks.
func (r *reading) contents(target string) ([]byte, stamp, error) {
	// O_PATH names the file without opening it: what is checked is what is read.
	fd, err := unix.Openat(int(r.dir.Fd()), target, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, stamp{}, fmt.Errorf("opening it: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, stamp{}, fmt.Errorf("looking at it: %w", err)
	}
	at := stampOf(&st)
	switch {
	case at.mode != unix.S_IFREG:
		return nil, at, errors.New("it is not a regular file")
	case st.Size > maxFileBytes:
		return nil, at, errTooLarge
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, at, fmt.Errorf("opening it: %w", cause(err))
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, at, fmt.Errorf("reading it: %w", cause(err))
	}
	if len(content) > maxFileBytes {
		return nil, at, errTooLarge
	}
	return content, at, nil
}

var errTooLarge = fmt.Errorf("it has more than %d bytes; split it", maxFileBytes)

// cause takes the path away: it would be that of a file descriptor.
func cause(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

// readLink is what a name in the folder is a link to; an error if it is no link.
func (r *reading) readLink(name string) (string, error) {
	if r.buf == nil {
		r.buf = make([]byte, unix.PathMax)
	}
	n, err := unix.Readlinkat(int(r.dir.Fd()), name, r.buf)
	if err != nil {
		return "", err
	}
	return string(r.buf[:n]), nil
}
