package storage_test

import (
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// benchLog is a log on the real disk, below the folder for temporary files.
func benchLog(b *testing.B, opt storage.LogOptions) (*storage.FileLog, string) {
	dir := filepath.Join(privateDir(b), "log")
	opt.Instance = 1
	l, err := storage.OpenLog(dir, opt)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	return l, dir
}

// benchRecord is about what the authority records of a leaf.
var benchRecord = make([]byte, 120)

func batchOf(n int) [][]byte {
	records := make([][]byte, n)
	for i := range records {
		records[i] = benchRecord
	}
	return records
}

func BenchmarkAppend(b *testing.B) {
	for _, n := range []int{1, 64, 1024} {
		b.Run(fmt.Sprintf("records=%d", n), func(b *testing.B) {
			l, _ := benchLog(b, storage.LogOptions{})
			records := batchOf(n)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := l.Append(context.Background(), records); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)*float64(n)/b.Elapsed().Seconds(), "records/s")
		})
	}
}

func BenchmarkAppendConcurrent(b *testing.B) {
	for _, callers := range []int{1, 16, 64, 1024} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			l, _ := benchLog(b, storage.LogOptions{})
			records := batchOf(1)
			b.SetParallelism(max(1, callers/2)) // times GOMAXPROCS, 2 where this was measured
			var failed atomic.Pointer[error]
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := l.Append(context.Background(), records); err != nil {
						failed.Store(&err)
						return
					}
				}
			})
			if err := failed.Load(); err != nil {
				b.Fatal(*err)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
		})
	}
}

func BenchmarkOpenLog(b *testing.B) {
	const records = 1_000_000
	l, dir := benchLog(b, storage.LogOptions{})
	for range records / 1000 {
		if _, err := l.Append(context.Background(), batchOf(1000)); err != nil {
			b.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	b.Run("records=1000000", func(b *testing.B) {
		for b.Loop() {
			l, err := storage.OpenLog(dir, storage.LogOptions{Instance: 1, MustExist: true})
			if err != nil || l.Head().Sequence != records {
				b.Fatal(err)
			}
			l.Close()
		}
	})
	b.Run("verify=1000000", func(b *testing.B) {
		l, err := storage.OpenLog(dir, storage.LogOptions{Instance: 1, MustExist: true})
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		for b.Loop() {
			if err := l.Verify(context.Background()); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkCommit(b *testing.B) {
	for _, entries := range []int{10, 10_000} {
		b.Run(fmt.Sprintf("entries=%d", entries), func(b *testing.B) {
			s, path := newBolt(b, storage.BoltOptions{})
			for i := 0; i < entries; i += 100 {
				var ops []storage.Op
				for j := range min(100, entries) {
					ops = append(ops, put(fmt.Sprintf("key/%d", i+j), string(benchRecord))...)
				}
				mustCommit(b, s, ops)
			}
			i := 0
			for b.Loop() {
				mustCommit(b, s, put(fmt.Sprintf("key/%d", i%entries), string(benchRecord)))
				i++
			}
			b.StopTimer()
			closeBolt(b, s)
			start := time.Now()
			s = openBolt(b, path, storage.BoltOptions{})
			b.ReportMetric(float64(time.Since(start).Microseconds()), "µs/open")
			closeBolt(b, s)
		})
	}
}
