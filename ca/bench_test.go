package ca_test

import (
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
)

// BenchmarkIssue is what an agent sees: batches with bare keys over mutual TLS,
// the log on a real disk, client and authority on the same processors. It
// reports certificates a second, and as a ratio to what crypto/x509 signs alone.
func BenchmarkIssue(b *testing.B) {
	limit, limitCPU := signLimit(b)
	for _, batch := range []int{1, 16, 256} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			w := newWorld(b)
			a, _ := w.attest(agentA)
			items := make([]*capb.IssueItem, batch)
			for i := range items {
				items[i] = item(b, byUID(server.PodUID))
			}
			const streams = 8
			b.ResetTimer()
			start, before := time.Now(), cpuTime(b)
			var wg sync.WaitGroup
			work := make(chan struct{}, streams)
			for range streams {
				wg.Go(func() {
					s, err := a.Issue(b.Context())
					if err != nil {
						b.Error(err)
						return
					}
					for range work {
						if err := s.Send(&capb.IssueRequest{Items: items}); err != nil {
							b.Error(err)
							return
						}
						resp, err := s.Recv()
						if err != nil || resp.GetResults()[batch-1].GetX509() == nil {
							b.Errorf("%v, %v", resp, err)
							return
						}
					}
				})
			}
			for range b.N {
				work <- struct{}{}
			}
			close(work)
			wg.Wait()
			rate := float64(b.N*batch) / time.Since(start).Seconds()
			cpu := (cpuTime(b) - before) / time.Duration(b.N*batch)
			b.ReportMetric(rate, "certificates/s")
			b.ReportMetric(rate/limit, "of-limit")
			// By processor time it is the same on a busy machine, but waiting is not in it.
			b.ReportMetric(limitCPU.Seconds()/cpu.Seconds(), "of-limit-by-cpu")
			b.StopTimer()
		})
	}
}

// signLimit is how many certificates a second x509.CreateCertificate makes on all
// processors with a software P-256 key: the physical limit of issuance here. cpu is
// the processor time of one.
func signLimit(b *testing.B) (rate float64, cpu time.Duration) {
	b.Helper()
	key, _ := newKey(b)
	parent := &x509.Certificate{SerialNumber: big.NewInt(1), SubjectKeyId: []byte{1}}
	var n int
	var mu sync.Mutex
	before := cpuTime(b)
	end := time.Now().Add(500 * time.Millisecond)
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for time.Now().Before(end) {
				tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: end, NotAfter: end}
				if _, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), key); err != nil {
					b.Error(err)
					return
				}
				mu.Lock()
				n++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return float64(n) / 0.5, (cpuTime(b) - before) / time.Duration(n)
}

// cpuTime is what this process has used of the processors.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkAttest is a first contact: token, store and log commits, signature.
func BenchmarkAttest(b *testing.B) {
	w := newWorld(b)
	c := w.dial(nil)
	token := w.issuer.Token(agentA, "signet-ca")
	b.ResetTimer()
	for range b.N {
		if _, err := w.tryAttest(c, func(r *capb.AttestRequest) { r.Evidence = &capb.AttestRequest_Token{Token: token} }); err != nil {
			b.Fatal(err)
		}
	}
}
