package istio_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	pb "istio.io/api/security/v1alpha1"
)

// BenchmarkCreateCertificate is what Istio's clients see: calls over TLS on
// loopback, each with a CSR, the log on a real disk, clients and authority on the
// same processors. It reports certificates a second; that as a ratio to what
// crypto/x509 alone can do here (check a CSR, make a certificate) in the same run,
// by the wall clock and by processor time, which stays the same on a busy machine
// but does not contain waiting; and the median time of a call.
func BenchmarkCreateCertificate(b *testing.B) {
	for _, c := range []struct {
		name        string
		inFlight    int
		connections int
		token       bool
	}{{"client-certificate", 32, 1, false}, {"client-certificate", 32, 32, false}, {"fresh-token", 8, 1, true}, {"fresh-token", 8, 8, true}} {
		b.Run(fmt.Sprintf("%s/in-flight=%d/connections=%d", c.name, c.inFlight, c.connections), func(b *testing.B) {
			w := newWorld(b, renewalFor("default/server"))
			l := newLoad(b, w, c.inFlight, c.connections, !c.token)
			var tokens []string
			if c.token {
				tokens = freshTokens(w, b.N)
			}
			limit, limitCPU := csrLimit(b, l.csr)
			b.ResetTimer()
			rate, cpu, took := l.run(b, b.N, tokens)
			b.StopTimer()
			b.ReportMetric(rate, "certificates/s")
			b.ReportMetric(rate/limit, "of-limit")
			b.ReportMetric(limitCPU.Seconds()/cpu.Seconds(), "of-limit-by-cpu")
			b.ReportMetric(float64(took.Microseconds())/1000, "ms-median")
		})
	}
}

// BenchmarkLogCost is what the durable log costs of the above: the same calls with
// the log on a disk and with one in memory, in turns.
func BenchmarkLogCost(b *testing.B) {
	loads := [2]*load{}
	for i := range loads {
		w := newWorld(b, renewalFor("default/server"), func(w *world) {
			if i == 1 {
				w.ca.LogOptions.FS = &memory{files: map[string]*memoryFile{}}
			}
		})
		loads[i] = newLoad(b, w, 32, 1, true)
	}
	var elapsed, cpu [2]float64
	n := 0
	b.ResetTimer()
	for range 8 {
		part := b.N/8 + 1
		for i, l := range loads {
			rate, c, _ := l.run(b, part, nil)
			elapsed[i] += float64(part) / rate
			cpu[i] += c.Seconds() * float64(part)
		}
		n += part
	}
	b.StopTimer()
	b.ReportMetric(float64(n)/elapsed[0], "certificates/s")
	b.ReportMetric(1-elapsed[1]/elapsed[0], "of-time-for-the-log")
	b.ReportMetric(1-cpu[1]/cpu[0], "of-cpu-for-the-log")
}

// load is clients of a door on a real port.
type load struct {
	clients []pb.IstioCertificateServiceClient
	csr     string
}

func newLoad(b *testing.B, w *world, inFlight, connections int, certificate bool) *load {
	b.Helper()
	// As cmd/ca does.
	old := debug.SetGCPercent(400)
	b.Cleanup(func() { debug.SetGCPercent(old) })
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	s := w.NewServer()
	go func() { _ = s.Serve(listener) }()
	b.Cleanup(s.Stop)
	l := &load{csr: csrPEM(b, newKey(b), &x509.CertificateRequest{})}
	cfg := &tls.Config{RootCAs: w.roots(), ServerName: dnsName}
	if certificate {
		cfg.Certificates = []tls.Certificate{*w.allow(b, serverID, w.token(server))}
	}
	for i := range inFlight {
		if i >= connections {
			l.clients = append(l.clients, l.clients[i%connections])
			continue
		}
		conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { conn.Close() })
		conn.Connect()
		l.clients = append(l.clients, pb.NewIstioCertificateServiceClient(conn))
	}
	return l
}

// run makes n calls. cpu is the processor time of one, median the time it takes.
func (l *load) run(b *testing.B, n int, tokens []string) (rate float64, cpu, median time.Duration) {
	b.Helper()
	var next atomic.Int64
	took := make([][]time.Duration, len(l.clients))
	start, before := time.Now(), cpuTime(b)
	var wg sync.WaitGroup
	for g, client := range l.clients {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				ctx := context.Background()
				if tokens != nil {
					ctx = metadata.AppendToOutgoingContext(ctx, "authorization", tokens[i], "clusterid", "Kubernetes")
				}
				begin := time.Now()
				resp, err := client.CreateCertificate(ctx, &pb.IstioCertificateRequest{Csr: l.csr, ValidityDuration: 3600})
				if err != nil || len(resp.GetCertChain()) != 3 {
					b.Errorf("%v, %v", resp, err)
					return
				}
				took[g] = append(took[g], time.Since(begin))
			}
		})
	}
	wg.Wait()
	elapsed, used := time.Since(start), cpuTime(b)-before
	all := slices.Sorted(slices.Values(slices.Concat(took...)))
	return float64(n) / elapsed.Seconds(), used / time.Duration(n), all[len(all)/2]
}

// freshTokens are n distinct tokens, made before the clock runs.
func freshTokens(w *world, n int) []string {
	tokens := make([]string, n)
	var wg sync.WaitGroup
	for g := range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := g; i < n; i += runtime.GOMAXPROCS(0) {
				tokens[i] = "Bearer " + w.issuer.Token(server, "istio-ca")
			}
		})
	}
	wg.Wait()
	return tokens
}

// csrLimit is how often a second crypto/x509 can parse and check that CSR and make
// a certificate with a software P-256 key, on all processors: the physical limit of
// this door. cpu is the processor time of one.
func csrLimit(b *testing.B, text string) (rate float64, cpu time.Duration) {
	b.Helper()
	key := newKey(b)
	parent := &x509.Certificate{SerialNumber: big.NewInt(1), SubjectKeyId: []byte{1}}
	block, _ := pem.Decode([]byte(text))
	id, err := identity.WorkloadID(td, "default", "server")
	if err != nil {
		b.Fatal(err)
	}
	var n atomic.Int64
	start, before := time.Now(), cpuTime(b)
	end := start.Add(time.Second)
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for time.Now().Before(end) {
				csr, err := x509.ParseCertificateRequest(block.Bytes)
				if err == nil {
					err = csr.CheckSignature()
				}
				if err == nil {
					tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: start, NotAfter: end, KeyUsage: x509.KeyUsageDigitalSignature,
						BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
					tmpl.URIs = append(tmpl.URIs, id.URL())
					_, err = x509.CreateCertificate(rand.Reader, tmpl, parent, csr.PublicKey, key)
				}
				if err != nil {
					b.Error(err)
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(n.Load()) / time.Since(start).Seconds(), (cpuTime(b) - before) / time.Duration(n.Load())
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

// memory is a storage.FS that makes nothing durable.
type memory struct {
	mu    sync.Mutex
	files map[string]*memoryFile // guarded by mu
}

type memoryFile struct {
	mu sync.RWMutex
	b  []byte // guarded by mu
}

// A new authority is made in a folder of another name, which is renamed.
func same(name string) string {
	return filepath.Join(filepath.Base(filepath.Dir(name)), filepath.Base(name))
}

func (m *memory) Lock(string, bool) (io.Closer, error) { return io.NopCloser(nil), nil }
func (m *memory) SyncDir(string) error                 { return nil }

func (m *memory) List(string) (names []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.files {
		names = append(names, filepath.Base(name))
	}
	return names, nil
}

func (m *memory) Open(name string) (storage.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f, ok := m.files[same(name)]; ok {
		return f, nil
	}
	return nil, fs.ErrNotExist
}

func (m *memory) Create(name string) (storage.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := &memoryFile{}
	m.files[same(name)] = f
	return f, nil
}

func (m *memory) Rename(from, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.files[same(to)] = m.files[same(from)]
	delete(m.files, same(from))
	return nil
}

func (m *memory) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.files, same(name))
	return nil
}

func (f *memoryFile) ReadAt(p []byte, off int64) (int, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if off >= int64(len(f.b)) {
		return 0, io.EOF
	}
	n := copy(p, f.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memoryFile) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if need := int(off) + len(p); need > len(f.b) {
		f.b = slices.Grow(f.b, need-len(f.b))[:need]
	}
	return copy(f.b[off:], p), nil
}

func (f *memoryFile) Size() (int64, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return int64(len(f.b)), nil
}

func (f *memoryFile) Truncate(n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if int(n) < len(f.b) {
		f.b = f.b[:n]
	} else {
		f.b = append(f.b, make([]byte, int(n)-len(f.b))...)
	}
	return nil
}

func (f *memoryFile) Sync() error  { return nil }
func (f *memoryFile) Close() error { return nil }
