package holder_test

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/holder"
)

// reviewed is a holder of one identity whose SVIDs are reviewed as an agent does it:
// when trust, bans or what is held has changed.
type reviewed struct {
	*holder.Holder
	a     *authority
	w     identity.Caller
	trust identity.Watched[*identity.Trust]
	bans  identity.Watched[*identity.Bans]
}

func review(t *testing.T, a *authority) *reviewed {
	t.Helper()
	r := &reviewed{a: a, w: caller(pod("web", "web-1"))}
	a.pods.Set(r.w.Workload)
	r.trust.Store(a.trust)
	cfg := config(a)
	cfg.Trust = r.trust.Value
	r.Holder = start(t, cfg)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	t.Cleanup(func() { stop(); <-done })
	go func() {
		defer close(done)
		for {
			_, trust := r.trust.Load()
			b, bans := r.bans.Load()
			held := r.Changed()
			r.Review(b)
			select {
			case <-ctx.Done():
				return
			case <-trust:
			case <-bans:
			case <-held:
			}
		}
	}()
	return r
}

// now is the SVID that is served.
func (r *reviewed) now(t *testing.T) *x509svid.SVID {
	t.Helper()
	synctest.Wait()
	svid, _ := ask(t, r.Holder, r.w)
	return svid
}

// another is trust of the next sequence, with roots of several authorities.
func (r *reviewed) another(t *testing.T, of ...*authority) *identity.Trust {
	t.Helper()
	var roots []*x509.Certificate
	for _, a := range of {
		roots = append(roots, a.root.cert)
	}
	next, err := identity.NewTrust(r.trust.Value().Sequence()+1, td, roots)
	if err != nil {
		t.Fatal(err)
	}
	return next
}

// crl is what an authority revokes.
func crl(t *testing.T, a *ca, serials ...*big.Int) *x509.RevocationList {
	t.Helper()
	tmpl := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}
	for _, s := range serials {
		tmpl.RevokedCertificateEntries = append(tmpl.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: s, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, tmpl, a.cert, a.key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := x509.ParseRevocationList(der)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func banned(t *testing.T, svid *x509svid.SVID) *identity.Bans {
	t.Helper()
	s, err := identity.ParseBanSubject(fmt.Sprintf("serial/%x", svid.Certificates[0].SerialNumber))
	if err != nil {
		t.Fatal(err)
	}
	return identity.NewBans([]identity.Ban{{Subject: s}})
}

// TestWhatIsGoodNoMoreIsReplacedAtOnce: an SVID whose root has left the bundle, which is
// revoked or banned, is replaced within seconds, once, and served until then. Nothing
// else is a reason.
func TestWhatIsGoodNoMoreIsReplacedAtOnce(t *testing.T) {
	for _, c := range []struct {
		name     string
		change   func(t *testing.T, r *reviewed, svid *x509svid.SVID)
		replaced bool
	}{
		{"its root has left the bundle", func(t *testing.T, r *reviewed, _ *x509svid.SVID) {
			b := newAuthority()
			r.a.set(func() { r.a.root, r.a.inter = b.root, b.inter })
			r.trust.Store(r.another(t, b))
		}, true},
		{"its root has left, two bundles on", func(t *testing.T, r *reviewed, _ *x509svid.SVID) {
			b := newAuthority()
			r.trust.Store(r.another(t, r.a, b))
			synctest.Wait()
			r.a.set(func() { r.a.root, r.a.inter = b.root, b.inter })
			r.trust.Store(r.another(t, b))
		}, true},
		{"it is revoked", func(t *testing.T, r *reviewed, svid *x509svid.SVID) {
			next, err := r.another(t, r.a).WithCRLs([]*x509.RevocationList{crl(t, r.a.inter, svid.Certificates[0].SerialNumber)})
			must(t, err)
			r.trust.Store(next)
		}, true},
		{"its intermediate is revoked", func(t *testing.T, r *reviewed, svid *x509svid.SVID) {
			next, err := r.another(t, r.a).WithCRLs([]*x509.RevocationList{crl(t, r.a.root, svid.Certificates[1].SerialNumber)})
			must(t, err)
			r.a.set(func() { r.a.inter = newCA("next", r.a.root, time.Hour*24) })
			r.trust.Store(next)
		}, true},
		{"it is banned", func(t *testing.T, r *reviewed, svid *x509svid.SVID) { r.bans.Store(banned(t, svid)) }, true},
		{"its authority is tainted", func(t *testing.T, r *reviewed, svid *x509svid.SVID) {
			r.a.set(func() { r.a.inter = newCA("next", r.a.root, time.Hour*24) })
			r.trust.Store(r.another(t, r.a).WithTainted([][]byte{svid.Certificates[0].AuthorityKeyId}, 2*time.Second))
		}, true},
		{"tainted for long, and then out of the bundle", func(t *testing.T, r *reviewed, svid *x509svid.SVID) {
			b := newAuthority()
			tainted := [][]byte{svid.Certificates[0].AuthorityKeyId}
			r.a.set(func() { r.a.root, r.a.inter = b.root, b.inter })
			r.trust.Store(r.another(t, &authority{root: r.a.root}, b).WithTainted(tainted, 24*time.Hour))
			synctest.Wait()
			r.trust.Store(r.another(t, b).WithTainted(tainted, 24*time.Hour))
		}, true},
		{"another root comes", func(t *testing.T, r *reviewed, _ *x509svid.SVID) { r.trust.Store(r.another(t, r.a, newAuthority())) }, false},
		{"the serial of another authority is revoked", func(t *testing.T, r *reviewed, svid *x509svid.SVID) {
			next, err := r.another(t, r.a).WithCRLs([]*x509.RevocationList{crl(t, newAuthority().inter, svid.Certificates[0].SerialNumber), crl(t, r.a.inter)})
			must(t, err)
			r.trust.Store(next)
		}, false},
		{"another serial is banned", func(t *testing.T, r *reviewed, svid *x509svid.SVID) {
			r.bans.Store(banned(t, &x509svid.SVID{Certificates: svid.Certificates[1:]}))
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := review(t, newAuthority())
				ask(t, r.Holder, r.w)
				time.Sleep(11 * time.Second)
				svid := r.now(t)
				c.change(t, r, svid)
				if r.now(t) == nil {
					t.Fatal("nothing is served meanwhile")
				}
				time.Sleep(3 * time.Second)
				next := r.now(t)
				if replaced := next != svid; replaced != c.replaced {
					t.Fatalf("replaced: %v", replaced)
				}
				if c.replaced {
					if _, _, err := x509svid.Verify(next.Certificates, r.trust.Value(), x509svid.WithTime(time.Now())); err != nil {
						t.Error(err)
					}
				}
				// That was it.
				calls := r.a.callCount()
				for range 100 {
					r.Review(r.bans.Value())
				}
				time.Sleep(20 * time.Minute)
				if r.now(t) != next || r.a.callCount() != calls {
					t.Errorf("%d more calls for the same reason", r.a.callCount()-calls)
				}
			})
		})
	}
}

// TestAReasonThatStaysIsNoLoop: an authority that has nothing better, or refuses, is asked
// at a pace.
func TestAReasonThatStaysIsNoLoop(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(t *testing.T, r *reviewed, svid *x509svid.SVID)
	}{
		{"whatever comes is tainted", func(t *testing.T, r *reviewed, svid *x509svid.SVID) {
			r.trust.Store(r.another(t, r.a).WithTainted([][]byte{svid.Certificates[0].AuthorityKeyId}, 0))
		}},
		{"its intermediate is revoked and signs on", func(t *testing.T, r *reviewed, svid *x509svid.SVID) {
			next, err := r.another(t, r.a).WithCRLs([]*x509.RevocationList{crl(t, r.a.root, svid.Certificates[1].SerialNumber)})
			must(t, err)
			r.trust.Store(next)
		}},
		{"whatever comes does not verify", func(t *testing.T, r *reviewed, svid *x509svid.SVID) { r.trust.Store(r.another(t, newAuthority())) }},
		{"banned, and refused", func(t *testing.T, r *reviewed, svid *x509svid.SVID) {
			r.a.set(func() {
				r.a.before = func(context.Context, []identity.Request) error { return errRefused }
			})
			r.bans.Store(banned(t, svid))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := review(t, newAuthority())
				ask(t, r.Holder, r.w)
				synctest.Wait()
				c.change(t, r, r.now(t))
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				if n := r.a.callCount(); n < 5 || n > 80 {
					t.Errorf("%d calls in ten minutes", n)
				}
				if r.now(t) == nil {
					t.Error("nothing is served")
				}
			})
		})
	}
}

// TestWhatIsUnderWayCountsAsHeld: an attempt that began before an authority was tainted
// may bring an SVID of it, so nobody may be told that all are replaced.
func TestWhatIsUnderWayCountsAsHeld(t *testing.T) {
	for _, lands := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			a := newAuthority()
			var trust identity.Watched[*identity.Trust]
			trust.Store(a.trust)
			cfg := config(a)
			cfg.Trust = trust.Value
			w := caller(pod("web", "web-1"))
			a.pods.Set(w.Workload)
			release := make(chan error, 1)
			a.before = func(ctx context.Context, _ []identity.Request) error {
				select {
				case err := <-release:
					return err
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			h := start(t, cfg)
			ask(t, h, w)
			synctest.Wait()
			if h.Holds(a.trust) {
				t.Error("an attempt that began under a trust is no reason to wait")
			}
			next, err := identity.NewTrust(2, td, []*x509.Certificate{a.root.cert})
			must(t, err)
			next = next.WithTainted([][]byte{a.inter.cert.SubjectKeyId}, 0)
			trust.Store(next)
			changed := h.Changed()
			if !h.Holds(next) {
				t.Error("what is under way may be of the tainted authority")
			}
			if lands {
				release <- nil
			} else {
				release <- errors.New("lost")
			}
			synctest.Wait()
			if !closed(changed) {
				t.Error("nobody was told that the attempt has ended")
			}
			if h.Holds(next) != lands {
				t.Errorf("lands: %v; held: %v", lands, !lands)
			}
		})
	}
}
