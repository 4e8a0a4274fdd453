package holder_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/holder"
)

// An authority that lies gives nobody a wrong SVID, and does no lasting harm.
func TestLies(t *testing.T) {
	type chain = []*x509.Certificate
	other := spiffeid.RequireFromString("spiffe://cluster.local/ns/default/sa/admin")
	// spoilt is an answer whose leaf differs from an honest one by f.
	spoilt := func(f func(*x509.Certificate)) func(*authority, identity.Request, spiffeid.ID) chain {
		return func(a *authority, r identity.Request, id spiffeid.ID) chain {
			tmpl := leafTemplate(id, time.Now().Add(time.Hour))
			f(tmpl)
			return chain{a.inter.sign(tmpl, mustPub(r.PublicKey)), a.inter.cert}
		}
	}
	honest := spoilt(func(*x509.Certificate) {})
	for _, c := range []struct {
		name   string
		result string
		answer func(a *authority, r identity.Request, id spiffeid.ID) chain
	}{
		{"nothing at all", "invalid", func(*authority, identity.Request, spiffeid.ID) chain { return nil }},
		{"the identity of another workload", "invalid", spoilt(func(c *x509.Certificate) { c.URIs = []*url.URL{other.URL()} })},
		{"the identity of an agent", "invalid", spoilt(func(c *x509.Certificate) {
			c.URIs[0] = &url.URL{Scheme: "spiffe", Host: "cluster.local", Path: "/signet/agent/node-a"}
		})},
		{"the same path in another trust domain", "invalid", spoilt(func(c *x509.Certificate) {
			c.URIs[0] = &url.URL{Scheme: "spiffe", Host: "other.example", Path: "/ns/default/sa/web"}
		})},
		{"two identities", "invalid", spoilt(func(c *x509.Certificate) { c.URIs = append(c.URIs, other.URL()) })},
		{"no identity", "invalid", spoilt(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"web"} })},
		{"an expired certificate", "invalid", spoilt(func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-time.Second)
		})},
		{"a certificate that expires this very moment", "invalid", spoilt(func(c *x509.Certificate) { c.NotAfter = time.Now() })},
		{"a certificate of tomorrow", "invalid", spoilt(func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(24*time.Hour), time.Now().Add(25*time.Hour)
		})},
		{"an authority", "invalid", spoilt(func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign })},
		{"a leaf that may sign certificates", "invalid", spoilt(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign })},
		{"a leaf that is no server", "invalid", spoilt(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] })},
		{"a leaf without basic constraints", "invalid", spoilt(func(c *x509.Certificate) { c.BasicConstraintsValid = false })},
		{"another key", "invalid", func(a *authority, _ identity.Request, id spiffeid.ID) chain {
			return chain{a.inter.sign(leafTemplate(id, time.Now().Add(time.Hour)), newKey().Public()), a.inter.cert}
		}},
		{"a foreign root", "invalid", func(a *authority, r identity.Request, id spiffeid.ID) chain {
			root := newCA("root", nil, time.Hour)
			return chain{root.sign(leafTemplate(id, time.Now().Add(time.Hour)), mustPub(r.PublicKey))}
		}},
		{"a foreign root that comes along", "invalid", func(a *authority, r identity.Request, id spiffeid.ID) chain {
			root := newCA("root", nil, time.Hour)
			return chain{root.sign(leafTemplate(id, time.Now().Add(time.Hour)), mustPub(r.PublicKey)), root.cert}
		}},
		{"a leaf signed by a leaf", "invalid", func(a *authority, r identity.Request, id spiffeid.ID) chain {
			key := newKey()
			mid := &ca{cert: a.inter.sign(leafTemplate(other, time.Now().Add(time.Hour)), key.Public()), key: key}
			return chain{mid.sign(leafTemplate(id, time.Now().Add(time.Hour)), mustPub(r.PublicKey)), mid.cert, a.inter.cert}
		}},
		{"an expired intermediate", "invalid", func(a *authority, r identity.Request, id spiffeid.ID) chain {
			inter := newCA("short", a.root, 0)
			return chain{inter.sign(leafTemplate(id, time.Now().Add(time.Hour)), mustPub(r.PublicKey)), inter.cert}
		}},
		{"no intermediate", "invalid", func(a *authority, r identity.Request, id spiffeid.ID) chain { return honest(a, r, id)[:1] }},
		{"a chain in the wrong order", "invalid", func(a *authority, r identity.Request, id spiffeid.ID) chain {
			c := honest(a, r, id)
			return chain{c[1], c[0]}
		}},
		{"a certificate too many", "invalid", func(a *authority, r identity.Request, id spiffeid.ID) chain {
			return append(honest(a, r, id), newCA("stranger", nil, time.Hour).cert)
		}},
		{"a chain that is too long", "invalid", func(a *authority, r identity.Request, id spiffeid.ID) chain {
			c := honest(a, r, id)
			for range 20 {
				c = append(c, a.root.cert)
			}
			return c
		}},
		{"a certificate that is too large", "invalid", spoilt(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Value: make([]byte, 20_000)}}
		})},
		{"a hole in the chain", "invalid", func(a *authority, r identity.Request, id spiffeid.ID) chain {
			return chain{honest(a, r, id)[0], nil, a.inter.cert}
		}},
		{"a certificate whose bytes say something else", "invalid", func(a *authority, r identity.Request, id spiffeid.ID) chain {
			c := honest(a, r, id)
			c[0].Raw = a.inter.sign(leafTemplate(other, time.Now().Add(time.Hour)), mustPub(r.PublicKey)).Raw
			return c
		}},
		{"bytes that are no certificate", "invalid", func(a *authority, r identity.Request, id spiffeid.ID) chain {
			c := honest(a, r, id)
			c[0].Raw = []byte("certificate")
			return c
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAuthority()
				w := pod("web", "web-1")
				a.pods.Set(w)
				reg := prometheus.NewRegistry()
				cfg := config(a)
				cfg.Metrics = reg
				h := start(t, cfg)
				lie := func(r identity.Request, id spiffeid.ID) *identity.Result {
					return &identity.Result{Chain: c.answer(a, r, id), RenewAt: time.Now().Add(time.Minute)}
				}
				a.set(func() { a.answer = lie })
				_, changed := ask(t, h, caller(w))
				synctest.Wait()
				if svid, _ := ask(t, h, caller(w)); svid != nil || closed(changed) || len(h.Export()) != 0 {
					t.Fatal("the lie was given out as an SVID")
				}
				if got := value(t, reg, "signet_holder_requests_total", "kind=first", "result="+c.result); got != 1 {
					t.Errorf("%v lies were counted, want 1", got)
				}
				a.set(func() { a.answer = nil })
				<-changed
				svid := have(t, h, a, caller(w))
				// Nor does a lie at renewal replace what is held.
				a.set(func() { a.answer = lie })
				time.Sleep(40 * time.Minute)
				if have(t, h, a, caller(w)) != svid {
					t.Error("the lie replaced a good SVID")
				}
				if h.Health() == nil {
					t.Error("Health says nothing of the missed renewal")
				}
			})
		})
	}
}

func TestLiesAboutTheBatch(t *testing.T) {
	for _, c := range []struct {
		name string
		lie  func([]identity.Result) []identity.Result
		want string
	}{
		{"fewer answers than requests", func(r []identity.Result) []identity.Result { return r[:1] }, "unavailable"},
		{"no answers", func([]identity.Result) []identity.Result { return nil }, "unavailable"},
		{"more answers than requests", func(r []identity.Result) []identity.Result { return append(r, r[0]) }, "unavailable"},
		{"answers in another order", func(r []identity.Result) []identity.Result { return []identity.Result{r[1], r[0]} }, "invalid"},
		{"one answer for all", func(r []identity.Result) []identity.Result {
			if r[0].Chain[0].URIs[0].Path == "/ns/default/sa/api" {
				return []identity.Result{{Err: errors.New("no")}, r[0]}
			}
			return []identity.Result{{Err: errors.New("no")}, r[0]}
		}, "invalid"},
		{"a chain and an error", func(r []identity.Result) []identity.Result {
			r[0].Err, r[1].Err = errors.New("no"), errors.New("no")
			return r
		}, "refused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAuthority()
				a.pods.Replace([]identity.Workload{pod("web", "web-1"), pod("api", "api-1")})
				a.lie = c.lie
				reg := prometheus.NewRegistry()
				cfg := config(a)
				cfg.Metrics = reg
				h, err := holder.New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				ask(t, h, caller(pod("web", "web-1")))
				ask(t, h, caller(pod("api", "api-1")))
				run(t, h)
				synctest.Wait()
				if held := h.Export(); len(held) != 0 {
					t.Errorf("the lie was believed: %v", held)
				}
				if got := value(t, reg, "signet_holder_requests_total", "kind=first", "result="+c.want); got == 0 {
					t.Errorf("no lie was counted as %s", c.want)
				}
				a.set(func() { a.lie = nil })
				time.Sleep(5 * time.Second)
				have(t, h, a, caller(pod("web", "web-1")))
				have(t, h, a, caller(pod("api", "api-1")))
			})
		})
	}
}

// The SVID ends with the first certificate of its chain.
func TestShortIntermediateEndsTheSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.inter = newCA("short", a.root, 10*time.Minute)
		w := pod("web", "web-1")
		a.pods.Set(w)
		h := start(t, config(a))
		ask(t, h, caller(w))
		synctest.Wait()
		have(t, h, a, caller(w))
		if at := h.Export()[0].RenewAt; time.Until(at) > 9*time.Minute {
			t.Errorf("renewal is in %s, the intermediate ends in 10 minutes", time.Until(at))
		}
		a.set(func() { a.before = a.down })
		time.Sleep(10 * time.Minute)
		if svid, _ := ask(t, h, caller(w)); svid != nil {
			t.Error("an SVID is given out whose intermediate has expired")
		}
	})
}

func mustPub(spki []byte) any {
	pub, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		panic(err)
	}
	return pub
}
