package ca_test

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"

	"google.golang.org/protobuf/proto"
)

// BenchmarkRestart is the time from opening an authority with a million records of
// certificates that are all still valid, each of a key of its own, to serving.
func BenchmarkRestart(b *testing.B) {
	const records = 1_000_000
	w := newWorld(b)
	w.close()
	fill(b, w, records)
	b.ResetTimer()
	var took, cpu time.Duration
	for range b.N {
		start, used := time.Now(), cpuTime(b)
		a, err := ca.Open(b.Context(), w.cfg)
		took, cpu = took+time.Since(start), cpu+cpuTime(b)-used
		if err != nil {
			b.Fatal(err)
		}
		if n := a.CertifiedKeys(); n < records {
			b.Errorf("%d keys are remembered of %d", n, records)
		}
		b.StopTimer()
		if err := a.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(took.Seconds()/float64(b.N), "s-to-serving")
	// What it takes of the processors, also where others use them meanwhile.
	b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s-to-serving")
}

// fill appends records as a busy hour leaves them.
func fill(b *testing.B, w *world, n int) {
	b.Helper()
	l := must(storage.OpenLog(w.logDir(), storage.LogOptions{Instance: 1}))
	now := time.Now()
	for i := 0; i < n; {
		var batch [][]byte
		for ; i < n && len(batch) < 2048; i++ {
			serial, key := make([]byte, 17), make([]byte, 32)
			_, _ = rand.Read(serial[7:])
			_, _ = rand.Read(key)
			binary.BigEndian.PutUint64(serial, uint64(now.UnixMilli())<<8)
			copy(serial, append([]byte{1}, serial[1:7]...))
			batch = append(batch, must(proto.Marshal(&capb.IssuanceRecord{Kind: capb.IssuanceRecord_KIND_WORKLOAD, Serial: serial,
				SpiffeId: fmt.Sprintf("spiffe://cluster.local/ns/namespace-%d/sa/account-%d", i%200, i%5000), Node: fmt.Sprintf("node-%d", i%500),
				Evidence: capb.IssuanceRecord_EVIDENCE_POD_UID, PodUid: "6f2b8a0e-0000-4000-8000-000000000001", Requester: serial, Authority: key[:20],
				NotBefore: now.Unix() - 60, NotAfter: now.Unix() + 3600, KeyHash: key})))
		}
		if _, err := l.Append(b.Context(), batch); err != nil {
			b.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
}
