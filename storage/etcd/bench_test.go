package etcd_test

import (
	"bytes"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/etcdtest"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/etcd"
)

// used is what a cluster's data takes on a member.
func used(b *testing.B, c *etcdtest.Cluster) int64 {
	b.Helper()
	time.Sleep(300 * time.Millisecond) // members write what they have in memory every 100 ms
	s, err := c.Client().Status(b.Context(), c.Members[0].Endpoint)
	if err != nil {
		b.Fatal(err)
	}
	return s.DbSizeInUse
}

// BenchmarkAppend: records of a certificate's size, by callers who wait for each, and
// what each takes in etcd. Members do not fsync, so it is the cost of everything else.
func BenchmarkAppend(b *testing.B) {
	for _, members := range []int{1, 3} {
		c := etcdtest.Start(b, etcdtest.Options{Members: members})
		s, err := etcd.Open(b.Context(), etcd.Options{Endpoints: c.Endpoints(), Prefix: newPrefix()})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { s.Close() })
		for i, callers := range []int{1, 32} {
			b.Run(fmt.Sprintf("members=%d/callers=%d", members, callers), func(b *testing.B) {
				l, err := storage.OpenLog(fmt.Sprintf("log/%03d", i+1), storage.LogOptions{Instance: uint32(i + 1), FS: s.Files(), Remote: true})
				if err != nil {
					b.Fatal(err)
				}
				defer l.Close()
				record := bytes.Repeat([]byte{7}, 200)
				before, first := used(b, c), l.Head().Sequence
				b.ResetTimer()
				var left atomic.Int64
				left.Store(int64(b.N))
				done := make(chan error, callers)
				for range callers {
					go func() {
						for left.Add(-1) >= 0 {
							if _, err := l.Append(b.Context(), [][]byte{record}); err != nil {
								done <- err
								return
							}
						}
						done <- nil
					}()
				}
				for range callers {
					if err := <-done; err != nil {
						b.Fatal(err)
					}
				}
				b.StopTimer()
				n := l.Head().Sequence - first
				b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "records/s")
				b.ReportMetric(float64(used(b, c)-before)/float64(n), "etcd-bytes/record")
			})
		}
	}
}

// BenchmarkCommit: a change of one entry on its revision.
func BenchmarkCommit(b *testing.B) {
	c := etcdtest.Start(b, etcdtest.Options{})
	s, err := etcd.Open(b.Context(), etcd.Options{Endpoints: c.Endpoints(), Prefix: newPrefix()})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	rev := uint64(0)
	for b.Loop() {
		rev, err = s.Commit(b.Context(), []storage.Cond{{Key: "a", Revision: rev}}, []storage.Op{{Key: "a", Value: make([]byte, 200)}})
		if err != nil {
			b.Fatal(err)
		}
	}
}
