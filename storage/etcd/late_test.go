package etcd_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/etcdtest"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/etcd"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// late keeps transactions that a store sends, as a network would that delivers them when
// nobody waits for them any more.
type late struct {
	mu      sync.Mutex
	keeping bool
	kept    []func() error
}

func (l *late) intercept(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.keeping || method != "/etcdserverpb.KV/Txn" {
		l.mu.Unlock()
		defer l.mu.Lock()
		return invoke(ctx, method, req, reply, cc, opts...)
	}
	l.kept = append(l.kept, func() error { return invoke(context.Background(), method, req, reply, cc, opts...) })
	return status.Error(codes.DeadlineExceeded, "kept")
}

func (l *late) keep(keeping bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keeping = keeping
}

// deliver sends what was kept, and says how much that is.
func (l *late) deliver(t *testing.T) int {
	t.Helper()
	l.mu.Lock()
	kept := l.kept
	l.kept = nil
	l.mu.Unlock()
	for _, send := range kept {
		if err := send(); err != nil {
			t.Errorf("delivering a request late: %v", err)
		}
	}
	return len(kept)
}

func TestALateCommitChangesNothing(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Options{})
	var l late
	opt := etcd.Options{Prefix: newPrefix()}
	opt.Intercept(l.intercept)
	s := mustOpen(t, c, opt)
	for name, ops := range map[string][]storage.Op{
		"a change":            {{Key: "a", Value: []byte("late")}},
		"a deletion":          {{Key: "a", Delete: true}},
		"without a condition": {{Key: "b", Value: []byte("late")}},
	} {
		rev, err := s.Commit(t.Context(), nil, []storage.Op{{Key: "a", Value: []byte(name)}, {Key: "b", Value: []byte(name)}})
		if err != nil {
			t.Fatal(err)
		}
		conds := []storage.Cond{{Key: "a", Revision: rev}}
		if ops[0].Key == "b" {
			conds = nil
		}
		l.keep(true)
		if _, err := s.Commit(t.Context(), conds, ops); !errors.Is(err, storage.ErrUnknown) && !ops[0].Delete {
			t.Fatalf("%s: %v, want ErrUnknown", name, err)
		}
		l.keep(false)
		for _, key := range []string{"a", "b"} {
			if e, err := s.Get(t.Context(), key); err != nil || string(e.Value) != name {
				t.Fatalf("%s: %s is %q, %v", name, key, e.Value, err)
			}
		}
		n := l.deliver(t)
		if n == 0 {
			t.Errorf("%s: nothing was under way", name)
		}
		for _, key := range []string{"a", "b"} {
			if e, err := s.Get(t.Context(), key); err != nil || string(e.Value) != name || e.Revision != rev {
				t.Errorf("%s: after %d late requests %s is %q, %v", name, n, key, e.Value, err)
			}
		}
	}
}

func TestALateAppendChangesNothing(t *testing.T) {
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Options{})
	var l late
	opt := etcd.Options{Prefix: newPrefix(), OwnerTTL: 2 * time.Second}
	opt.Intercept(l.intercept)
	s := mustOpen(t, c, opt)
	log, err := storage.OpenLog("log/001", storage.LogOptions{Instance: 1, FS: s.Files(), Remote: true})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if _, err := log.Append(t.Context(), [][]byte{[]byte("first")}); err != nil {
		t.Fatal(err)
	}
	l.keep(true)
	if _, err := log.Append(t.Context(), [][]byte{[]byte("late")}); !errors.Is(err, storage.ErrNotDurable) {
		t.Fatalf("an append without an answer: %v", err)
	}
	l.keep(false)
	deadline := time.Now().Add(time.Minute)
	for log.Err() != nil {
		if time.Now().After(deadline) {
			t.Fatalf("the log does not open itself anew: %v", log.Err())
		}
		time.Sleep(5 * time.Millisecond)
	}
	if h := log.Head(); h.Sequence != 1 {
		t.Fatalf("the log ends at record %d", h.Sequence)
	}
	if l.deliver(t) == 0 {
		t.Error("nothing was under way")
	}
	if last, err := log.Append(t.Context(), [][]byte{[]byte("second")}); err != nil || last != 2 {
		t.Fatalf("after a late request: record %d, %v", last, err)
	}
	var got []string
	for r, err := range log.Scan(t.Context(), 1) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, string(r.Data))
	}
	if len(got) != 2 || got[0] != "first" || got[1] != "second" {
		t.Errorf("the log has %q", got)
	}
}
