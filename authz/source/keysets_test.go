package source_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/durationpb"
	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/source"
	"github.com/signet-mesh/signet/identity"
)

// keySetText is a set of one new key.
func keySetText(tb testing.TB, kid string) string {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: kid}}})
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}

func keyRule(namespace, uri, issuer string) *authz.TokenRule {
	return &authz.TokenRule{Namespace: namespace, Name: "jwt", Spec: &security.JWTRule{JwksUri: uri, Issuer: issuer}}
}

// wantedRules are rules that can change.
type wantedRules struct {
	identity.Watched[[]*authz.TokenRule]
}

func wants(rules ...*authz.TokenRule) *wantedRules {
	w := &wantedRules{}
	w.Store(rules)
	return w
}

// issuers stands for the network: what it answers by URL, and how often it was asked.
type issuers struct {
	mu      sync.Mutex
	answers map[string]string // a missing one is an error, "500" a status, "hang" none
	asked   map[string]int
}

func (i *issuers) set(url, answer string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.answers == nil {
		i.answers = map[string]string{}
	}
	i.answers[url] = answer
}

func (i *issuers) times(url string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.asked[url]
}

func (i *issuers) RoundTrip(r *http.Request) (*http.Response, error) {
	url := r.URL.String()
	i.mu.Lock()
	if i.asked == nil {
		i.asked = map[string]int{}
	}
	i.asked[url]++
	a, ok := i.answers[url]
	i.mu.Unlock()
	if a == "hang" {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	status := http.StatusOK
	switch {
	case !ok:
		return nil, errors.New("nobody there")
	case a == "500":
		status = 500
	}
	return &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(a)), Request: r, Header: http.Header{}}, nil
}

// runKeySets runs sets in a bubble, without a network.
func runKeySets(t *testing.T, net *issuers, cfg source.KeySetsConfig) (k *source.KeySets, stop func()) {
	t.Helper()
	k, err := source.NewKeySets(cfg)
	if err != nil {
		t.Fatal(err)
	}
	source.SetTransport(k, net)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- k.Run(ctx) }()
	return k, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

const keysAt = "https://issuer.example/keys"

func TestKeySetsAreFetchedAgainAndKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		net, rule := &issuers{}, keyRule("a", keysAt, "")
		reg := prometheus.NewRegistry()
		k, stop := runKeySets(t, net, source.KeySetsConfig{Rules: wants(rule).Load, Metrics: reg})
		defer stop()
		state := func() string {
			t.Helper()
			families, err := reg.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range families {
				for _, m := range f.GetMetric() {
					if f.GetName() == "signet_source_key_sets" && m.GetGauge().GetValue() == 1 {
						return m.GetLabel()[0].GetValue()
					}
				}
			}
			return ""
		}
		synctest.Wait()
		if k.Keys(rule) != nil || state() != "missing" {
			t.Errorf("keys from nowhere: %s", state())
		}
		// Failing, it is tried again, ever more slowly.
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := net.times(keysAt); n < 12 || n > 30 {
			t.Errorf("tried %d times in an hour", n)
		}
		first := keySetText(t, "1")
		net.set(keysAt, first)
		time.Sleep(source.MaxKeyRetry * 5 / 4)
		synctest.Wait()
		keys := k.Keys(rule)
		if keys == nil || state() != "good" {
			t.Fatalf("no keys: %s", state())
		}
		// What did not change are the same keys, so that tokens need not be verified again.
		n := net.times(keysAt)
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := net.times(keysAt) - n; got < 2 || got > 4 || k.Keys(rule) != keys {
			t.Errorf("fetched %d times in an hour, want every 20 minutes", got)
		}
		net.set(keysAt, keySetText(t, "2"))
		time.Sleep(source.DefaultKeyRefresh * 5 / 4)
		synctest.Wait()
		rotated := k.Keys(rule)
		if rotated == keys || rotated == nil {
			t.Error("rotated keys were not taken")
		}
		// The last good ones stay for as long as it takes.
		for _, bad := range []string{"500", "<html>", `{"keys":[]}`, ""} {
			net.set(keysAt, bad)
			time.Sleep(10 * 24 * time.Hour)
			synctest.Wait()
			if k.Keys(rule) != rotated || state() != "stale" {
				t.Errorf("after %q: other keys, or %s", bad, state())
			}
		}
		net.set(keysAt, first)
		time.Sleep(source.MaxKeyRetry * 5 / 4)
		synctest.Wait()
		if k.Keys(rule) == rotated || state() != "good" {
			t.Errorf("good answers do not count again: %s", state())
		}
	})
}

func TestUnknownKeysHaveSetsFetchedButNotOften(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		net, rule := &issuers{}, keyRule("a", keysAt, "")
		net.set(keysAt, keySetText(t, "1"))
		k, stop := runKeySets(t, net, source.KeySetsConfig{Rules: wants(rule).Load})
		defer stop()
		synctest.Wait()
		before := k.Keys(rule)
		net.set(keysAt, keySetText(t, "2"))
		start := net.times(keysAt)
		for range 600 { // a minute of tokens with an unknown key
			k.UnknownKey(rule)
			time.Sleep(100 * time.Millisecond)
		}
		synctest.Wait()
		if n := net.times(keysAt) - start; n < 2 || n > int(time.Minute/source.UnknownKeyRefresh)+1 {
			t.Errorf("fetched %d times in a minute", n)
		}
		if k.Keys(rule) == before {
			t.Error("the new key is not there")
		}
		k.UnknownKey(keyRule("a", "https://nobody.example", "")) // nothing happens
		// Where that brings nothing it happens less often, and soon again for a while
		// after it did.
		start = net.times(keysAt)
		for range 600 {
			k.UnknownKey(rule)
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if n := net.times(keysAt) - start; n < 8 || n > 13 {
			t.Errorf("fetched %d times in ten minutes in vain", n)
		}
		net.set(keysAt, keySetText(t, "3"))
		before = k.Keys(rule)
		time.Sleep(time.Minute)
		k.UnknownKey(rule)
		synctest.Wait()
		if k.Keys(rule) == before {
			t.Error("a key that came late is not there")
		}
	})
}

func TestIssuersAreDiscovered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		net := &issuers{}
		net.set("https://a.example/.well-known/openid-configuration", `{"issuer":"x","jwks_uri":"https://a.example/k"}`)
		net.set("https://a.example/k", keySetText(t, "a"))
		net.set("https://b.example/.well-known/openid-configuration", `{"jwks_uri":"http://b.example/k"}`)
		net.set("http://b.example/k", keySetText(t, "b"))
		net.set("https://c.example/.well-known/openid-configuration", `{"jwks_uri":["https://a.example/k"]}`)
		a, slash := keyRule("a", "", "https://a.example"), keyRule("a", "", "https://a.example/")
		plain, list, name := keyRule("a", "", "https://b.example"), keyRule("a", "", "https://c.example"), keyRule("a", "", "issuer")
		k, stop := runKeySets(t, net, source.KeySetsConfig{Rules: wants(a, slash, plain, list, name).Load})
		defer stop()
		time.Sleep(time.Minute)
		synctest.Wait()
		if k.Keys(a) == nil || k.Keys(slash) == nil {
			t.Error("no keys of an issuer that names them")
		}
		if k.Keys(plain) != nil || k.Keys(list) != nil || k.Keys(name) != nil {
			t.Error("keys from a configuration that must not be followed")
		}
	})
}

func TestOneNamespaceTakesNothingFromOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		net := &issuers{}
		uri := func(i int) string { return fmt.Sprintf("https://%d.example/keys", i) }
		set := keySetText(t, "x")
		var greedy []*authz.TokenRule
		for i := range 200 {
			net.set(uri(i), set)
			greedy = append(greedy, keyRule("greedy", uri(i), ""))
		}
		net.set(keysAt, set)
		modest := keyRule("modest", keysAt, "")
		rules := wants(append(greedy, modest)...)
		k, stop := runKeySets(t, net, source.KeySetsConfig{Rules: rules.Load})
		defer stop()
		synctest.Wait()
		have := 0
		for _, r := range greedy {
			if k.Keys(r) != nil {
				have++
			}
		}
		if have != source.MaxNamespaceKeySets || k.Keys(modest) == nil {
			t.Errorf("the greedy namespace has %d sets, the modest one's: %v", have, k.Keys(modest))
		}
		// Who was there first stays.
		rules.Store(append([]*authz.TokenRule{modest, keyRule("greedy", "https://new.example", "")}, greedy...))
		synctest.Wait()
		if k.Keys(greedy[0]) == nil || net.times("https://new.example") != 0 {
			t.Error("a newcomer has replaced a set")
		}
		// What nobody wants is kept for a while, and not fetched.
		rules.Store([]*authz.TokenRule{modest})
		n := net.times(uri(0))
		time.Sleep(source.KeyLinger / 2)
		synctest.Wait()
		if k.Keys(greedy[0]) == nil {
			t.Error("a set is gone at once")
		}
		time.Sleep(source.KeyLinger)
		synctest.Wait()
		if k.Keys(greedy[0]) != nil || net.times(uri(0)) != n {
			t.Error("a set that nobody wants goes on")
		}
	})
}

// TestServersThatDoNotAnswerHoldUpNoOtherNamespace: the rules of one namespace, at
// servers that take connections and say nothing, keep it for themselves.
func TestServersThatDoNotAnswerHoldUpNoOtherNamespace(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		// shared says that the greedy namespace wants the modest one's set too.
		shared bool
	}{{"keys of its own", false}, {"keys that the other wants too", true}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				net := &issuers{}
				var rules []*authz.TokenRule
				for i := range source.MaxNamespaceKeySets {
					uri := fmt.Sprintf("https://a%02d.example/keys", i)
					net.set(uri, "hang")
					rules = append(rules, keyRule("greedy", uri, ""))
				}
				const last = "https://zzz.example/keys"
				if tt.shared {
					rules[0] = keyRule("greedy", last, "")
				}
				for _, r := range rules {
					r.Spec.Timeout = durationpb.New(30 * time.Second)
				}
				net.set(last, keySetText(t, "x"))
				modest := keyRule("modest", last, "")
				k, stop := runKeySets(t, net, source.KeySetsConfig{Rules: wants(append(rules, modest)...).Load})
				defer stop()
				time.Sleep(5 * time.Second)
				synctest.Wait()
				if k.Keys(modest) == nil {
					t.Error("no keys after 5 s")
				}
				// And so it stays: it is fetched again each twenty minutes.
				time.Sleep(24 * time.Hour)
				synctest.Wait()
				if n := net.times(last); n < 60 || n > 84 {
					t.Errorf("in a day its keys were fetched %d times", n)
				}
				// Those that hang have their turns, too.
				for _, r := range rules {
					if net.times(r.Spec.JwksUri) == 0 {
						t.Errorf("%s was never asked", r.Spec.JwksUri)
					}
				}
			})
		})
	}
}

// TestNamespacesThatFailHoldUpEachOther: however many have servers that do not answer, keys
// that could be fetched the last time, or never were tried, have room at once.
func TestNamespacesThatFailHoldUpEachOther(t *testing.T) {
	t.Parallel()
	var slots source.KeySlots
	var bad []source.KeySet
	for i := range 16 {
		bad = append(bad, source.DueKeySet(fmt.Sprint("greedy-", i/2), 3))
	}
	first := slots.Next(bad...)
	if len(first) != 4 {
		t.Errorf("%d fetches of sets that fail", len(first))
	}
	good := []source.KeySet{source.DueKeySet("a", 0), source.DueKeySet("b", 0), source.DueKeySet("c", 0), source.DueKeySet("d", 0)}
	if n := len(slots.Next(append(slices.Clone(bad), good...)...)); n != 4 {
		t.Errorf("beside them %d fetches of others", n)
	}
	if n := len(slots.Next(source.DueKeySet("e", 0))); n != 0 {
		t.Errorf("%d fetches beyond the limit", n)
	}
	// Who has failed has turns again, and no more of them.
	slots.End(good[0])
	if n := len(slots.Next(bad...)); n != 0 {
		t.Errorf("%d more fetches of sets that fail", n)
	}
	slots.End(first[0])
	slots.End(first[1])
	if n := len(slots.Next(bad...)); n != 2 {
		t.Errorf("%d fetches of sets that fail in the place of two", n)
	}
}

func TestKeySetsOutliveARestart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		net, rule := &issuers{}, keyRule("a", keysAt, "")
		net.set(keysAt, keySetText(t, "1"))
		k, stop := runKeySets(t, net, source.KeySetsConfig{Rules: wants(rule).Load})
		synctest.Wait()
		if k.Keys(rule) == nil {
			t.Fatal("no keys")
		}
		saved, _ := k.Export()
		stop()
		// The issuer is away when the successor starts.
		again, stop := runKeySets(t, &issuers{}, source.KeySetsConfig{Rules: wants(rule).Load, Saved: saved})
		if again.Keys(rule) == nil {
			t.Error("the saved keys are not there at once")
		}
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if again.Keys(rule) == nil {
			t.Error("the saved keys are gone")
		}
		if b, _ := again.Export(); string(b) == "" || !strings.Contains(string(b), keysAt) {
			t.Errorf("they are not saved again: %s", b)
		}
		stop()
		for _, bad := range []string{"", "x", `{"version":2}`, `{"version":1,"sets":[{"uri":"x","keys":"y"}]}`} {
			k, err := source.NewKeySets(source.KeySetsConfig{Rules: wants(rule).Load, Saved: []byte(bad)})
			if err != nil || k.Keys(rule) != nil {
				t.Errorf("saved %q: %v", bad, err)
			}
		}
	})
}

// keyServer is a server with TLS on loopback.
func keyServer(t *testing.T, h http.HandlerFunc) (uri string, roots *x509.CertPool) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = nil
	s.StartTLS()
	t.Cleanup(s.Close)
	roots = x509.NewCertPool()
	roots.AddCert(s.Certificate())
	return s.URL, roots
}

func TestWhatServersOfKeysMayDo(t *testing.T) {
	t.Parallel()
	set := keySetText(t, "a")
	stop := make(chan struct{})
	var base string
	uri, roots := keyServer(t, func(w http.ResponseWriter, r *http.Request) {
		flush := func() { w.(http.Flusher).Flush() }
		switch r.URL.Path {
		case "/good":
			_, _ = io.WriteString(w, set)
		case "/as-html":
			w.Header().Set("Content-Type", "text/html")
			_, _ = io.WriteString(w, set)
		case "/page":
			_, _ = io.WriteString(w, "<html>")
		case "/500":
			w.WriteHeader(500)
			_, _ = io.WriteString(w, set)
		case "/204":
			w.WriteHeader(204)
		case "/large":
			_, _ = io.WriteString(w, strings.TrimSuffix(set, "}")+`,"x":"`+strings.Repeat("x", source.MaxKeyBytes)+`"}`)
		case "/endless":
			for {
				if _, err := io.WriteString(w, strings.Repeat(" ", 64<<10)); err != nil {
					return
				}
			}
		case "/silent":
			select {
			case <-stop:
			case <-r.Context().Done():
			}
		case "/slow":
			_, _ = io.WriteString(w, set[:10])
			flush()
			select {
			case <-stop:
			case <-r.Context().Done():
			}
		case "/cut":
			w.Header().Set("Content-Length", fmt.Sprint(len(set)))
			_, _ = io.WriteString(w, set[:10])
			flush()
			panic(http.ErrAbortHandler)
		case "/headers":
			for i := range 2000 {
				w.Header().Set(fmt.Sprint("x-", i), strings.Repeat("x", 100))
			}
			_, _ = io.WriteString(w, set)
		case "/elsewhere":
			http.Redirect(w, r, "/good", http.StatusFound)
		case "/loop":
			http.Redirect(w, r, "/loop", http.StatusFound)
		case "/plaintext":
			http.Redirect(w, r, strings.Replace(base, "https", "http", 1)+"/good", http.StatusFound)
		case "/file":
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		case "/metadata":
			http.Redirect(w, r, "https://169.254.169.254/latest", http.StatusFound)
		case "/another-loopback":
			http.Redirect(w, r, "https://127.0.0.2:1/", http.StatusFound)
		}
	})
	base = uri
	t.Cleanup(func() { close(stop) })
	one := []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	for name, c := range map[string]struct {
		path  string
		allow []netip.Prefix
		roots *x509.CertPool
		want  string // of the error
	}{
		"a set":                             {"/good", one, roots, ""},
		"a set of another type":             {"/as-html", one, roots, ""},
		"a page":                            {"/page", one, roots, "no JSON object"},
		"an error with a set":               {"/500", one, roots, "answers 500"},
		"nothing":                           {"/204", one, roots, "no JSON object"},
		"too much":                          {"/large", one, roots, "more than 1048576 bytes"},
		"without end":                       {"/endless", one, roots, "more than 1048576 bytes"},
		"no answer":                         {"/silent", one, roots, "no complete answer within 300ms"},
		"a slow answer":                     {"/slow", one, roots, "no complete answer within 300ms"},
		"half an answer":                    {"/cut", one, roots, "EOF"},
		"too many headers":                  {"/headers", one, roots, "header"},
		"elsewhere":                         {"/elsewhere", one, roots, ""},
		"round and round":                   {"/loop", one, roots, "more than 3 times"},
		"to plaintext":                      {"/plaintext", one, roots, "http:// URL"},
		"to a file":                         {"/file", one, roots, "no https:// URL"},
		"to a cloud's metadata":             {"/metadata", append(one, netip.MustParsePrefix("169.254.0.0/16")), roots, "gives out credentials"},
		"to another address of loopback":    {"/another-loopback", one, roots, "127.0.0.2 is not a public address"},
		"at loopback, which is not allowed": {"/good", nil, roots, "127.0.0.1 is not a public address"},
		"with a certificate that nobody vouches for": {"/good", one, x509.NewCertPool(), "certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k, err := source.NewKeySets(source.KeySetsConfig{Rules: wants().Load, AllowAddresses: c.allow, Roots: c.roots})
			if err != nil {
				t.Fatal(err)
			}
			rule := keyRule("a", uri+c.path, "")
			rule.Spec.Timeout = durationpb.New(source.MaxKeyTimeout)
			if strings.Contains(c.want, "300ms") {
				rule.Spec.Timeout = durationpb.New(300 * time.Millisecond)
			}
			err = source.FetchKeys(t.Context(), k, rule)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), uri) {
				t.Errorf("the error tells the URL: %v", err)
			}
		})
	}
}

// A name that resolves to loopback is caught where it is connected to, and a proxy
// of the environment is not asked to do it instead.
func TestNamesOfLoopbackAreNotReached(t *testing.T) {
	reached := false
	proxy := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }))
	defer proxy.Close()
	t.Setenv("HTTPS_PROXY", proxy.URL)
	t.Setenv("HTTP_PROXY", proxy.URL)
	k, err := source.NewKeySets(source.KeySetsConfig{Rules: wants().Load, AllowPlaintext: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, uri := range []string{"https://localhost:1/", "http://localhost:1/", "https://[::1]:1/", "https://[::ffff:127.0.0.1]:1/", "http://127.1:1/", "http://0/", "http://2130706433/"} {
		if err := source.FetchKeys(t.Context(), k, keyRule("a", uri, "")); err == nil || strings.Contains(err.Error(), "refused") {
			t.Errorf("%s: %v", uri, err)
		}
	}
	if reached {
		t.Error("the proxy was asked")
	}
}

func TestPermittedAddresses(t *testing.T) {
	t.Parallel()
	var allow []netip.Prefix
	for _, p := range []string{"10.1.0.0/16", "fd00::/8", "169.254.0.0/16", "100.100.100.200/32"} {
		allow = append(allow, netip.MustParsePrefix(p))
	}
	for address, want := range map[string]bool{
		"1.1.1.1": true, "8.8.8.8": true, "2606:4700::1111": true, "64:ff9b::808:808": true, "::ffff:8.8.8.8": true,
		"10.1.2.3": true, "10.2.2.3": false, "::ffff:10.2.2.3": false, "64:ff9b::a02:203": false, "64:ff9b::a01:203": true, "fd00::1": true,
		"127.0.0.1": false, "127.255.255.254": false, "::1": false, "::": false, "0.0.0.0": false, "0.1.2.3": false, "::127.0.0.1": false,
		"192.168.1.1": false, "172.16.0.1": false, "172.32.0.1": true, "100.64.0.1": false, "169.254.1.1": true, "fe80::1%eth0": false,
		"169.254.169.254": false, "::ffff:169.254.169.254": false, "64:ff9b::a9fe:a9fe": false, "fd00:ec2::254": false, "100.100.100.200": true, "168.63.129.16": false,
		"224.0.0.1": false, "255.255.255.255": false, "240.0.0.1": false, "ff02::1": false, "2002:7f00:1::": false, "2001::1": false, "2001:db8::1": false, "2001:4860:4860::8888": true,
	} {
		if err := source.Permitted(netip.MustParseAddr(address), allow); (err == nil) != want {
			t.Errorf("%s: %v, want permitted %t", address, err, want)
		}
	}
}

// FuzzSavedKeySets: what is saved may be anything.
func FuzzSavedKeySets(f *testing.F) {
	f.Add([]byte(`{"version":1,"sets":[{"uri":"https://a/","good":"2026-01-01T00:00:00Z","keys":"{}"}]}`))
	set, err := json.Marshal(keySetText(f, "a"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"version":1,"sets":[{"issuer":"https://a/","good":"2026-01-01T00:00:00Z","keys":` + string(set) + `}]}`))
	f.Fuzz(func(t *testing.T, saved []byte) {
		if _, err := source.NewKeySets(source.KeySetsConfig{Rules: wants().Load, Saved: saved}); err != nil {
			t.Fatal(err)
		}
	})
}
