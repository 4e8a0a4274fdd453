package ca_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"

	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// crashable puts the issuance log on a file system that loses what was not
// synced. The folder that a new authority is made in is renamed on the real file
// system only, so both names mean the same here.
type crashable struct{ *storagetest.CrashFS }

func same(name string) string { return strings.Replace(name, "/authority.new", "/authority", 1) }

func (c crashable) Lock(dir string, create bool) (io.Closer, error) {
	return c.CrashFS.Lock(same(dir), create)
}
func (c crashable) List(dir string) ([]string, error)        { return c.CrashFS.List(same(dir)) }
func (c crashable) Open(name string) (storage.File, error)   { return c.CrashFS.Open(same(name)) }
func (c crashable) Create(name string) (storage.File, error) { return c.CrashFS.Create(same(name)) }
func (c crashable) Rename(from, to string) error             { return c.CrashFS.Rename(same(from), same(to)) }
func (c crashable) Remove(name string) error                 { return c.CrashFS.Remove(same(name)) }
func (c crashable) SyncDir(dir string) error                 { return c.CrashFS.SyncDir(same(dir)) }

// witness is a key that looks at the disk at the moment it signs.
type witness struct {
	crypto.Signer
	sees func(tbs []byte)
}

// SignMessage implements crypto.MessageSigner: crypto/x509 hands it the whole
// TBSCertificate.
func (w witness) SignMessage(r io.Reader, tbs []byte, opts crypto.SignerOpts) ([]byte, error) {
	w.sees(tbs)
	h := opts.HashFunc().New()
	h.Write(tbs)
	return w.Signer.Sign(r, h.Sum(nil), opts)
}

// serialOf is the second element of a TBSCertificate (RFC 5280 §4.1).
func serialOf(t testing.TB, tbs []byte) []byte {
	t.Helper()
	in := cryptobyte.String(tbs)
	var serial big.Int
	if !in.ReadASN1(&in, cryptobyteasn1.SEQUENCE) ||
		!in.SkipOptionalASN1(cryptobyteasn1.Tag(0).Constructed().ContextSpecific()) ||
		!in.ReadASN1Integer(&serial) {
		t.Error("what is signed is no TBSCertificate")
	}
	return serial.FillBytes(make([]byte, 17))
}

// TestTheRecordIsOnDiskWhenTheKeySigns: at each signature the disk, as it would
// be found after a crash at that moment, holds the record of what is signed.
func TestTheRecordIsOnDiskWhenTheKeySigns(t *testing.T) {
	t.Parallel()
	fs := storagetest.NewCrashFS()
	w := newWorld(t, func(c *ca.Config) { c.LogOptions.FS = crashable{fs} })
	var mu sync.Mutex
	signed, missing := 0, 0
	w.WrapKeys(func(k crypto.Signer) crypto.Signer {
		return witness{k, func(tbs []byte) {
			mu.Lock()
			defer mu.Unlock()
			signed++
			if !fs.Durable(serialOf(t, tbs)) {
				missing++
			}
		}}
	})
	a, _ := w.attest(agentA)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 4 {
				var items []*capb.IssueItem
				for range 5 {
					items = append(items, item(t, byUID(server.PodUID)))
				}
				if _, err := issue(t, a, items...); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := w.RenewIntermediate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := 1 + 8*4*5 + 1; signed != want || missing != 0 {
		t.Errorf("%d signatures, want %d; %d of them before the record was durable", signed, want, missing)
	}
	syncs := 0
	for _, op := range fs.Ops() {
		if op.Kind == storagetest.Sync {
			syncs++
		}
	}
	t.Logf("%d signatures, %d fsyncs of the log", signed, syncs)
}

// TestNoLeafWithoutARecordAfterACrash issues under load, crashes at a random
// moment with every unsynced byte dropped, and looks for what clients had got.
func TestNoLeafWithoutARecordAfterACrash(t *testing.T) {
	t.Parallel()
	fs := storagetest.NewCrashFS()
	w := newWorld(t, func(c *ca.Config) { c.LogOptions.FS = crashable{fs} })
	a, _ := w.attest(agentA)
	var mu sync.Mutex
	got := map[string]bool{}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				rs, err := issue(t, a, item(t, byUID(server.PodUID)), item(t, byUID(client.PodUID)))
				if ctx.Err() != nil {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				for _, r := range rs {
					c, err := x509.ParseCertificate(r.GetX509().GetChain()[0])
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					got[string(c.SerialNumber.FillBytes(make([]byte, 17)))] = true
					mu.Unlock()
				}
			}
		})
	}
	for crash := range 10 {
		// Let some certificates out before each crash.
		for before := -1; ; {
			mu.Lock()
			n := len(got)
			mu.Unlock()
			if before < 0 {
				before = n
			}
			if n >= before+4 {
				break
			}
			select {
			case <-t.Context().Done():
				t.Fatal("no certificate came")
			case <-time.After(time.Millisecond):
			}
		}
		mu.Lock()
		have := make([]string, 0, len(got))
		for s := range got {
			have = append(have, s)
		}
		// Everything in have went out before this moment.
		after := fs.Crash(storagetest.Loss{})
		mu.Unlock()
		log, err := storage.OpenLog(same(w.cfg.DataDir+"/authority/log"), storage.LogOptions{FS: after, Instance: 1, MustExist: true})
		if err != nil {
			t.Fatalf("crash %d: %v", crash, err)
		}
		if err := log.Verify(t.Context()); err != nil {
			t.Errorf("crash %d: %v", crash, err)
		}
		for _, s := range have {
			if !after.Durable([]byte(s)) {
				t.Errorf("crash %d: certificate %x went out and has no record", crash, s)
			}
		}
		if err := log.Close(); err != nil {
			t.Error(err)
		}
	}
	cancel()
	wg.Wait()
	t.Logf("10 crashes, %d certificates", len(got))
}

// TestNothingIsSignedThatCannotBeRecorded fails each operation on the log's file
// system in turn, in every way, under one batch.
func TestNothingIsSignedThatCannotBeRecorded(t *testing.T) {
	t.Parallel()
	runs := 0
	for _, fault := range []storagetest.Fault{storagetest.NotPersisted, storagetest.Persisted, storagetest.Partial, storagetest.Forgotten} {
		for n := 0; ; n++ {
			fs := storagetest.NewCrashFS()
			w := newWorld(t, func(c *ca.Config) { c.LogOptions.FS = crashable{fs} })
			a, _ := w.attest(agentA)
			signed := 0
			var mu sync.Mutex
			w.WrapKeys(func(k crypto.Signer) crypto.Signer {
				return witness{k, func([]byte) { mu.Lock(); signed++; mu.Unlock() }}
			})
			failed := false
			first := len(fs.Ops())
			fs.Fail(func(op storagetest.Op) storagetest.Fault {
				if op.N == first+n {
					failed = true
					return fault
				}
				return storagetest.NoFault
			})
			rs, err := issue(t, a, item(t, byUID(server.PodUID)), item(t, byUID(client.PodUID)))
			if err != nil {
				t.Fatal(err)
			}
			fs.Fail(nil)
			if !failed {
				w.close()
				break // the batch has no n-th operation
			}
			runs++
			for _, r := range rs {
				if r.GetRefusal().GetCode() != capb.Refusal_CODE_UNAVAILABLE || r.GetRefusal().GetRetryAfter() == nil {
					t.Errorf("fault %v at %d: got %v", fault, n, r)
				}
			}
			if signed != 0 {
				t.Errorf("fault %v at %d: %d signatures", fault, n, signed)
			}
			if w.Ready() == nil {
				t.Errorf("fault %v at %d: still ready", fault, n)
			}
			// Nothing more is signed until the log was opened again, and then it is.
			if _, err := issue(t, a, item(t, byUID(server.PodUID))); err != nil || signed != 0 {
				t.Errorf("fault %v at %d: %v, %d signatures", fault, n, err, signed)
			}
			w.close()
			w.open()
			a, _ = w.attest(agentA)
			rs, err = issue(t, a, item(t, byUID(server.PodUID)))
			if err != nil || rs[0].GetX509() == nil {
				t.Errorf("fault %v at %d: after opening again: %v, %v", fault, n, rs, err)
			}
			w.close()
		}
	}
	if runs < 8 {
		t.Errorf("only %d faults were injected", runs)
	}
	t.Logf("%d faults", runs)
}

// TestAnAgentSVIDIsWorthNothingUntilItIsOnRecord fails the store under Attest.
func TestAnAgentSVIDIsWorthNothingUntilItIsOnRecord(t *testing.T) {
	t.Parallel()
	for _, landed := range []bool{false, true} {
		t.Run(fmt.Sprintf("landed=%v", landed), func(t *testing.T) {
			var armed bool
			w := newWorld(t, func(c *ca.Config) {
				c.StoreOptions.Hook = func(l bool) error {
					if armed && l == landed {
						return errors.New("injected failure")
					}
					return nil
				}
			})
			armed = true
			_, err := w.tryAttest(w.dial(nil), func(r *capb.AttestRequest) {
				r.Evidence = &capb.AttestRequest_Token{Token: w.issuer.Token(agentA, "signet-ca")}
			})
			if status.Code(err) != codes.Unavailable {
				t.Errorf("got %v, want Unavailable", err)
			}
			armed = false
			w.close()
			w.open()
			w.attest(agentA)
		})
	}
}

func TestTheClock(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, _ := w.attest(agentA)
	now := time.Now()
	// What a stepped clock returns: the wall time moves, the monotonic reading not.
	at := func(d time.Duration) { w.SetClock(func() time.Time { return now.Round(0).Add(d) }, now.Round(0)) }

	at(-4 * time.Minute)
	rs, err := issue(t, a, item(t, byUID(server.PodUID)))
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(rs[0].GetX509().GetChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	if want := now.Add(time.Hour).Truncate(time.Second); c.NotAfter.Before(want) {
		t.Errorf("a small step back: the certificate ends at %s, before %s: time did not go on from the newest record", c.NotAfter, want)
	}
	before := w.Log().Head().Sequence
	at(-6 * time.Minute)
	rs, err = issue(t, a, item(t, byUID(server.PodUID)))
	if err != nil || rs[0].GetRefusal().GetCode() != capb.Refusal_CODE_UNAVAILABLE {
		t.Errorf("a large step back: %v, %v", rs, err)
	}
	if w.Log().Head().Sequence != before || !errors.Is(w.Ready(), ca.ErrClock) {
		t.Errorf("a large step back: recorded, or ready: %v", w.Ready())
	}
	at(0)
	if w.Ready() != nil {
		t.Error(w.Ready())
	}
}

// TestAKeyStaysWhileNobodyKnowsWhetherItIsNeeded fails the journal's commit after
// it landed: the next start finds the new intermediate in the journal, and its key.
func TestAKeyStaysWhileNobodyKnowsWhetherItIsNeeded(t *testing.T) {
	t.Parallel()
	for _, landed := range []bool{false, true} {
		var armed bool
		w := newWorld(t, func(c *ca.Config) {
			c.StoreOptions.Hook = func(l bool) error {
				if armed && l == landed {
					return errors.New("injected failure")
				}
				return nil
			}
		})
		before := w.Intermediate()
		armed = true
		if err := w.RenewIntermediate(t.Context()); err == nil {
			t.Error("a failed commit was taken for a good one")
		}
		armed = false
		w.close()
		w.open()
		if renewed := !w.Intermediate().Equal(before); renewed != landed {
			t.Errorf("landed=%v: renewed=%v", landed, renewed)
		}
		a, _ := w.attest(agentA)
		if rs, err := issue(t, a, item(t, byUID(server.PodUID))); err != nil || rs[0].GetX509() == nil {
			t.Errorf("landed=%v: %v, %v", landed, rs, err)
		}
	}
}

// TestHalfCloseStillGetsItsAnswers: an agent that says that no more batches come
// waits for those that it sent.
func TestHalfCloseStillGetsItsAnswers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, _ := w.attest(agentA)
	for range 10 {
		s, err := a.Issue(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for id := range uint64(3) {
			if err := s.Send(&capb.IssueRequest{Id: id, Items: []*capb.IssueItem{item(t, byUID(server.PodUID))}}); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		got := 0
		for {
			m, err := s.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil || m.GetResults()[0].GetX509() == nil {
				t.Fatal(m, err)
			}
			got++
		}
		if got != 3 {
			t.Fatalf("%d of 3 answers came", got)
		}
	}
}

// TestStrangersHoldLittle: who has no certificate gets a few places for first
// attestations, for some seconds, and no other method is even read.
func TestStrangersHoldLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		stalled := func(method string) (grpc.ClientStream, error) {
			return w.conn(nil).NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, method)
		}
		var open []grpc.ClientStream
		for range 100 {
			s, err := stalled(capb.Authority_Attest_FullMethodName)
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, s)
		}
		synctest.Wait()
		refused := 0
		deadline := time.After(time.Second)
		results := make(chan error, len(open))
		for _, s := range open {
			go func() { results <- s.RecvMsg(&capb.AttestResponse{}) }()
		}
	count:
		for {
			select {
			case err := <-results:
				if status.Code(err) != codes.ResourceExhausted {
					t.Errorf("refused with %v", err)
				}
				refused++
			case <-deadline:
				break count
			}
		}
		if refused != 100-32 {
			t.Errorf("%d of 100 stalled attestations were refused", refused)
		}
		time.Sleep(20 * time.Second)
		synctest.Wait()
		w.attest(agentA) // the places are free again
		s, err := stalled(capb.Authority_Issue_FullMethodName)
		if err == nil {
			err = s.RecvMsg(&capb.IssueResponse{})
		}
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("Issue without a certificate: %v", err)
		}
		for range 100 - refused {
			<-results
		}
		w.close()
	})
}
