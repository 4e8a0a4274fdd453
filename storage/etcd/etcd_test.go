package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/etcdtest"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/etcd"
	"github.com/signet-mesh/signet/storage/storagetest"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// prefixes gives each test a place of its own in a cluster that it shares.
var prefixes atomic.Int64

func newPrefix() string { return fmt.Sprintf("/test/%d/", prefixes.Add(1)) }

// timeout is short: a test that has no answer waits for three times as long.
const timeout = time.Second

// linked is a store with a connection of its own, which can be cut.
type linked struct {
	*etcd.Store
	link *etcdtest.Link
}

// open connects through a link. Every connection is to one member, so that a cut has no
// way around it.
func open(t *testing.T, c *etcdtest.Cluster, opt etcd.Options) (*linked, error) {
	link := c.NewLink(t, c.Members[0])
	opt.Endpoints, opt.TLS, opt.Name = []string{link.Endpoint}, c.TLS(), t.Name()
	if opt.Timeout == 0 {
		opt.Timeout = timeout
	}
	s, err := etcd.Open(t.Context(), opt)
	if err != nil {
		return nil, err
	}
	return &linked{s, link}, nil
}

func mustOpen(t *testing.T, c *etcdtest.Cluster, opt etcd.Options) *linked {
	t.Helper()
	s, err := open(t, c, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func (l *linked) fail(landed bool) (heal func()) {
	if landed {
		l.link.LoseAnswers()
	} else {
		l.link.HoldRequests()
	}
	return l.link.Heal
}

func TestStoreIsAStore(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Options{TLS: true})
	storagetest.Store(t, func(t *testing.T) storagetest.StorePlace {
		prefix := newPrefix()
		return storagetest.StorePlace{
			Open: func() (storagetest.ClosableStore, error) {
				s, err := open(t, c, etcd.Options{Prefix: prefix})
				if err != nil {
					return nil, err
				}
				return s, nil
			},
			Shared: true,
			Fail:   func(s storagetest.ClosableStore, landed bool) func() { return s.(*linked).fail(landed) },
			Forget: func(t *testing.T, _ storage.Store) { c.Compact(t) },
		}
	})
}

// ownedLog is a log with the store that holds it.
type ownedLog struct {
	*storage.FileLog
	store *linked
}

func (l *ownedLog) Close() error { return errors.Join(l.FileLog.Close(), l.store.Close()) }

func openLog(t *testing.T, c *etcdtest.Cluster, prefix string, segment int64) (*ownedLog, error) {
	s, err := open(t, c, etcd.Options{Prefix: prefix, OwnerTTL: 4 * time.Second})
	if err != nil {
		return nil, err
	}
	l, err := storage.OpenLog("log/001", storage.LogOptions{Instance: 1, FS: s.Files(), Remote: true, SegmentSize: segment, LockTimeout: 50 * time.Millisecond})
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return &ownedLog{l, s}, nil
}

func TestFilesHoldALog(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Options{})
	for name, segment := range map[string]int64{"in one segment": 0, "in many segments": 4096} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			storagetest.Log(t, func(t *testing.T) storagetest.LogPlace {
				prefix := newPrefix()
				return storagetest.LogPlace{
					Open: func() (storagetest.ClosableLog, error) {
						l, err := openLog(t, c, prefix, segment)
						if err != nil {
							return nil, err
						}
						return l, nil
					},
					Fail: func(l storagetest.ClosableLog, landed bool) func() { return l.(*ownedLog).store.fail(landed) },
					Steal: func(l storagetest.ClosableLog) (storagetest.ClosableLog, func(), error) {
						heal := l.(*ownedLog).store.fail(false)
						// When its lease has ended another process gets the folder.
						deadline := time.Now().Add(time.Minute)
						for {
							other, err := openLog(t, c, prefix, segment)
							if err == nil {
								return other, heal, nil
							}
							if !errors.Is(err, storage.ErrLocked) || time.Now().After(deadline) {
								return nil, nil, err
							}
							time.Sleep(50 * time.Millisecond)
						}
					},
				}
			})
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for name, opt := range map[string]etcd.Options{
		"no endpoint":                 {},
		"an endpoint without scheme":  {Endpoints: []string{"127.0.0.1:2379"}},
		"http beside https":           {Endpoints: []string{"https://127.0.0.1:1", "http://127.0.0.1:1"}},
		"a password over http":        {Endpoints: []string{"http://127.0.0.1:1"}, Username: "signet", Password: "p"},
		"a prefix without slash":      {Endpoints: []string{"http://127.0.0.1:1"}, Prefix: "/signet"},
		"a prefix that is no key":     {Endpoints: []string{"http://127.0.0.1:1"}, Prefix: "/signet é/"},
		"a timeout too short":         {Endpoints: []string{"http://127.0.0.1:1"}, Timeout: time.Millisecond},
		"an owner's time too short":   {Endpoints: []string{"http://127.0.0.1:1"}, OwnerTTL: time.Second},
		"a cluster that is not there": {Endpoints: []string{"http://127.0.0.1:1"}, Timeout: 100 * time.Millisecond},
	} {
		if s, err := etcd.Open(t.Context(), opt); err == nil {
			s.Close()
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestOpenLooksBeforeItWrites(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Options{})
	prefix := newPrefix()
	if _, err := open(t, c, etcd.Options{Prefix: prefix, MustExist: true}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a store that must exist and does not: %v", err)
	}
	put := func(key, value string) {
		t.Helper()
		if _, err := c.Client().Put(t.Context(), prefix+key, value); err != nil {
			t.Fatal(err)
		}
	}
	put("format", "2")
	put("revision", "")
	if _, err := open(t, c, etcd.Options{Prefix: prefix}); !errors.Is(err, storage.ErrNewerFormat) {
		t.Errorf("a newer format: %v", err)
	}
	put("format", "one")
	if _, err := open(t, c, etcd.Options{Prefix: prefix}); !errors.Is(err, storage.ErrCorrupt) {
		t.Errorf("a format that is none: %v", err)
	}
	put("format", "1")
	s := mustOpen(t, c, etcd.Options{Prefix: prefix, MustExist: true})
	put("s/by-hand", "a value")
	if _, err := s.Get(t.Context(), "by-hand"); !errors.Is(err, storage.ErrCorrupt) {
		t.Errorf("an entry that somebody wrote by hand: %v", err)
	}
	if _, _, err := s.List(t.Context(), ""); !errors.Is(err, storage.ErrCorrupt) {
		t.Errorf("a list with an entry that somebody wrote by hand: %v", err)
	}
}

// Others may use the same cluster: what they write must not look like changes, and what
// etcd forgets of them not like a gap.
func TestOthersInTheClusterDoNotCount(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Options{})
	s := mustOpen(t, c, etcd.Options{Prefix: newPrefix()})
	other := mustOpen(t, c, etcd.Options{Prefix: newPrefix()})
	rev, err := s.Commit(t.Context(), nil, []storage.Op{{Key: "a", Value: []byte("1")}})
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if _, err := other.Commit(t.Context(), nil, []storage.Op{{Key: "a"}}); err != nil {
			t.Fatal(err)
		}
	}
	c.Compact(t)
	if _, now, err := s.List(t.Context(), ""); err != nil || now != rev {
		t.Errorf("revision %d, %v; want %d", now, err, rev)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	for e, err := range s.Watch(ctx, "", rev) {
		t.Errorf("nothing has changed, and the watch yields %v, %v", e, err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if rev, err = s.Commit(ctx, nil, []storage.Op{{Key: "a", Value: []byte("2")}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(ctx, nil, []storage.Op{{Key: "a", Value: []byte("3")}}); err != nil {
		t.Fatal(err)
	}
	for e, err := range s.Watch(ctx, "", rev) {
		if err != nil || string(e.Value) != "3" {
			t.Errorf("got %q, %v; want the change", e.Value, err)
		}
		break
	}
	// A revision that the cluster never had is of another one.
	for _, err := range s.Watch(ctx, "", rev+1<<40) {
		if !errors.Is(err, storage.ErrCompacted) {
			t.Errorf("a watch from the future: %v, want ErrCompacted", err)
		}
	}
}

func TestUserAndPrefix(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Options{TLS: true})
	admin, ctx := c.Client(), t.Context()
	prefix := newPrefix()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(admin.UserAddWithOptions(ctx, "root", "", &clientv3.UserAddOptions{NoPassword: true}))
	must(admin.UserGrantRole(ctx, "root", "root"))
	must(admin.RoleAdd(ctx, "signet"))
	must(admin.RoleGrantPermission(ctx, "signet", prefix, clientv3.GetPrefixRangeEnd(prefix), clientv3.PermissionType(clientv3.PermReadWrite)))
	must(admin.UserAdd(ctx, "signet", "secret"))
	must(admin.UserGrantRole(ctx, "signet", "signet"))
	must(admin.AuthEnable(ctx))
	s, err := etcd.Open(ctx, etcd.Options{Endpoints: c.Endpoints(), TLS: c.TLS(), Username: "signet", Password: "secret", Prefix: prefix})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Commit(ctx, []storage.Cond{{Key: "a"}}, []storage.Op{{Key: "a", Value: []byte("1")}}); err != nil {
		t.Error(err)
	}
	l, err := s.Lease(ctx, "job", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Release(ctx); err != nil {
		t.Error(err)
	}
	if other, err := etcd.Open(ctx, etcd.Options{Endpoints: c.Endpoints(), TLS: c.TLS(), Username: "signet", Password: "secret", Prefix: "/elsewhere/"}); err == nil {
		other.Close()
		t.Error("a user wrote where it may not")
	}
	if other, err := etcd.Open(ctx, etcd.Options{Endpoints: c.Endpoints(), TLS: c.TLS(), Username: "signet", Password: "wrong", Prefix: prefix, Timeout: timeout}); err == nil {
		other.Close()
		t.Error("a wrong password was accepted")
	}
}

func TestErrSaysThatEtcdIsAway(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Options{})
	s := mustOpen(t, c, etcd.Options{Prefix: newPrefix()})
	wait := func(what string, ok func(error) bool) {
		t.Helper()
		deadline := time.Now().Add(time.Minute)
		for !ok(s.Err()) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: Err is %v", what, s.Err())
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	before, err := s.Commit(t.Context(), nil, []storage.Op{{Key: "a"}})
	if err != nil {
		t.Fatal(err)
	}
	wait("at first", func(err error) bool { return err == nil })
	c.Members[0].Freeze(t)
	wait("etcd is frozen", func(err error) bool { return err != nil })
	// It may fail before it is sent, if what commits need has expired meanwhile.
	_, err = s.Commit(t.Context(), nil, []storage.Op{{Key: "a"}})
	if err == nil {
		t.Error("a commit succeeded while etcd was away")
	}
	c.Members[0].Thaw(t)
	wait("etcd is back", func(err error) bool { return err == nil })
	if e, getErr := s.Get(t.Context(), "a"); getErr != nil || e.Revision != before && !errors.Is(err, storage.ErrUnknown) {
		t.Errorf("the commit failed (%v), and there is %+v, %v; it was at revision %d before", err, e, getErr, before)
	}
	s.Close()
	if err := s.Err(); !errors.Is(err, storage.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// files of a store, directly: what storage.OpenLog relies on.
func TestFiles(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Options{})
	s := mustOpen(t, c, etcd.Options{Prefix: newPrefix()})
	f := s.Files()
	for _, dir := range []string{"", "/abs", "..", "../up", "with space"} {
		if lock, err := f.Lock(dir, true); err == nil {
			lock.Close()
			t.Errorf("folder %q was locked", dir)
		}
	}
	lock, err := f.Lock("d", true)
	if err != nil {
		t.Fatal(err)
	}
	write := func(file storage.File, text string, offset int64) {
		t.Helper()
		if _, err := file.WriteAt([]byte(text), offset); err != nil {
			t.Fatal(err)
		}
		if err := file.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) string {
		t.Helper()
		file, err := f.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		size, err := file.Size()
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, size)
		if _, err := file.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	a, err := f.Create("d/a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Open("d/a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that was not synced: %v", err)
	}
	big := strings.Repeat("0123456789", 250_000)
	write(a, "head", 0)
	write(a, big, 4)
	write(a, "tail", 4+int64(len(big)))
	write(a, "head", 0) // what is there already
	if read("d/a") != "head"+big+"tail" {
		t.Error("the file is not what was written")
	}
	if _, err := a.WriteAt([]byte("HEAD"), 0); err != nil {
		t.Fatal(err)
	}
	if err := a.Sync(); err == nil {
		t.Error("what is there was overwritten")
	}
	if _, err := f.Create("d/a"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("creating what is there: %v", err)
	}
	// Two who believe that the end is theirs.
	b, err := f.Open("d/a")
	if err != nil {
		t.Fatal(err)
	}
	size, _ := b.Size()
	write(b, "one", size)
	if _, err := a.WriteAt([]byte("two"), size); err != nil {
		t.Fatal(err)
	}
	if err := a.Sync(); !errors.Is(err, storage.ErrCorrupt) {
		t.Errorf("writing where somebody else wrote: %v", err)
	}
	for _, size := range []int64{4 + int64(len(big)) - 1, 1<<20 + 10, 6, 4, 2, 0} {
		file, err := f.Open("d/a")
		if err == nil {
			err = file.Truncate(size)
		}
		if err != nil {
			t.Fatal(err)
		}
		if size == 0 {
			break
		}
		if got := read("d/a"); got != ("head" + big)[:size] {
			t.Errorf("cut to %d: %d bytes", size, len(got))
		}
	}
	for _, name := range []string{"d/x", "d/xy", "d/z"} {
		file, err := f.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		write(file, name, 0)
	}
	if err := f.Rename("d/x", "d/z"); err != nil {
		t.Fatal(err)
	}
	if err := f.Rename("d/x", "d/z"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("renaming what is not there: %v", err)
	}
	if got := read("d/z"); got != "d/x" {
		t.Errorf("the renamed file holds %q", got)
	}
	if names, err := f.List("d"); err != nil || fmt.Sprint(names) != "[xy z]" {
		t.Errorf("the folder has %v, %v", names, err)
	}
	if err := f.Remove("d/xy"); err != nil {
		t.Error(err)
	}
	if err := f.Remove("d/xy"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removing what is not there: %v", err)
	}
	file, err := f.Open("d/z")
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Close(); err != nil {
		t.Error(err)
	}
	if _, err := file.WriteAt([]byte("more"), 3); err != nil {
		t.Fatal(err)
	}
	if err := file.Sync(); !errors.Is(err, etcd.ErrLost) {
		t.Errorf("writing without the lock: %v", err)
	}
	if err := f.Remove("d/z"); !errors.Is(err, etcd.ErrLost) {
		t.Errorf("removing without the lock: %v", err)
	}
}
