package token_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/token"
	"github.com/signet-mesh/signet/identity"
)

// now is the time of all tests.
var now = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

type issuer struct {
	key    *ecdsa.PrivateKey
	signer jose.Signer
	set    string
}

func newIssuer(tb testing.TB, kid string) *issuer {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, nil)
	if err != nil {
		tb.Fatal(err)
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: kid, Algorithm: "ES256"}}})
	if err != nil {
		tb.Fatal(err)
	}
	return &issuer{key, signer, string(set)}
}

func (i *issuer) token(tb testing.TB, claims map[string]any) string {
	tb.Helper()
	b, err := json.Marshal(claims)
	if err != nil {
		tb.Fatal(err)
	}
	s, err := i.signer.Sign(b)
	if err != nil {
		tb.Fatal(err)
	}
	text, err := s.CompactSerialize()
	if err != nil {
		tb.Fatal(err)
	}
	return text
}

// program is that of a workload with the rules.
func program(tb testing.TB, rules ...map[string]any) *authz.Program {
	tb.Helper()
	doc, err := json.Marshal(map[string]any{
		"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": map[string]any{"name": "jwt", "namespace": "default"},
		"spec": map[string]any{"jwtRules": rules},
	})
	if err != nil {
		tb.Fatal(err)
	}
	resources, problems := authz.Parse("test", doc)
	set, more := authz.Set{}.Update(resources)
	if problems = append(problems, more...); len(problems) > 0 {
		tb.Fatal(problems)
	}
	snapshot, _ := authz.Compile(set, authz.Options{})
	return snapshot.For(identity.Workload{Namespace: "default"})
}

func request(path string, headers ...string) *authz.Request {
	r := &authz.Request{Known: authz.FieldsHTTP, HTTP: true, Method: []byte("GET"), Path: []byte(path)}
	for i := 0; i < len(headers); i += 2 {
		r.Headers = append(r.Headers, authz.Header{Name: headers[i], Value: []byte(headers[i+1])})
	}
	return r
}

func bearer(text string) *authz.Request { return request("/", "authorization", "Bearer "+text) }

func newVerifier(tb testing.TB, source token.Source) *token.Verifier {
	tb.Helper()
	v, err := token.New(token.Config{Keys: source, Metrics: prometheus.NewRegistry()})
	if err != nil {
		tb.Fatal(err)
	}
	return v
}

type source struct {
	keys    *token.Keys
	unknown int
}

func (s *source) Keys(*authz.TokenRule) *token.Keys { return s.keys }
func (s *source) UnknownKey(*authz.TokenRule)       { s.unknown++ }

func parseKeys(tb testing.TB, text string) *token.Keys {
	tb.Helper()
	k, err := token.ParseKeys([]byte(text))
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func TestATokenIsGoodUntilItExpiresAlsoWhenItIsRemembered(t *testing.T) {
	t.Parallel()
	i := newIssuer(t, "a")
	p := program(t, map[string]any{"issuer": "iss", "jwks": i.set})
	v := newVerifier(t, nil)
	text := i.token(t, map[string]any{"iss": "iss", "sub": "s", "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix()})
	for _, c := range []struct {
		at   time.Duration
		want token.Status
	}{
		{0, token.Good}, {0, token.Good}, {time.Hour, token.Good}, {time.Hour + token.Skew, token.Good}, {time.Hour + token.Skew + time.Second, token.Expired},
		{-token.Skew, token.Good}, {-token.Skew - time.Second, token.Future}, {30 * 24 * time.Hour, token.Expired}, {0, token.Good},
	} {
		if got := v.Verify(t.Context(), p, bearer(text), now.Add(c.at)).Status; got != c.want {
			t.Errorf("after %s: %v, want %v", c.at, got, c.want)
		}
	}
}

func TestRotatedKeysForgetTokens(t *testing.T) {
	t.Parallel()
	before, after := newIssuer(t, "1"), newIssuer(t, "2")
	p := program(t, map[string]any{"issuer": "iss", "jwksUri": "https://iss.example/keys"})
	s := &source{}
	v := newVerifier(t, s)
	text := before.token(t, map[string]any{"iss": "iss"})
	check := func(want token.Status, unknown int) {
		t.Helper()
		for range 2 {
			if got := v.Verify(t.Context(), p, bearer(text), now).Status; got != want {
				t.Errorf("%v, want %v", got, want)
			}
		}
		if s.unknown != unknown {
			t.Errorf("told %d times of an unknown key, want %d", s.unknown, unknown)
		}
	}
	check(token.NoKeys, 0)
	s.keys = parseKeys(t, before.set)
	check(token.Good, 0)
	s.keys = parseKeys(t, after.set)
	check(token.UnknownKey, 2)
	s.keys = nil
	check(token.NoKeys, 2)
	s.keys = parseKeys(t, before.set)
	check(token.Good, 2)
}

// What one rule has found good says nothing about another rule.
func TestRulesDoNotShareWhatTheyFound(t *testing.T) {
	t.Parallel()
	i := newIssuer(t, "a")
	v := newVerifier(t, nil)
	text := i.token(t, map[string]any{"iss": "iss", "aud": "shop", "scope": "a b", "words": "a b"})
	shop := program(t, map[string]any{"issuer": "iss", "jwks": i.set, "audiences": []string{"shop"}, "spaceDelimitedClaims": []string{"words"}})
	for range 2 {
		r := v.Verify(t.Context(), shop, bearer(text), now)
		if r.Status != token.Good || len(r.Claims.GetFields()["words"].GetListValue().GetValues()) != 2 {
			t.Fatalf("%v %v", r.Status, r.Claims)
		}
		r = v.Verify(t.Context(), program(t, map[string]any{"issuer": "iss", "jwks": i.set}), bearer(text), now)
		if r.Status != token.Good || r.Claims.GetFields()["words"].GetStringValue() != "a b" || len(r.Claims.GetFields()["scope"].GetListValue().GetValues()) != 2 {
			t.Fatalf("%v %v", r.Status, r.Claims)
		}
		for want, rule := range map[token.Status]map[string]any{
			token.Audience: {"issuer": "iss", "jwks": i.set, "audiences": []string{"bank"}},
			token.Foreign:  {"issuer": "other", "jwks": i.set},
			token.Forged:   {"issuer": "iss", "jwks": newIssuer(t, "a").set},
		} {
			if got := v.Verify(t.Context(), program(t, rule), bearer(text), now); got.Status != want || got.Claims != nil {
				t.Errorf("%v, want %v", got.Status, want)
			}
		}
	}
}

func TestTokensAreLeftToDecideWhereTheProxyHasVerified(t *testing.T) {
	t.Parallel()
	i := newIssuer(t, "a")
	p := program(t, map[string]any{"issuer": "iss", "jwks": i.set})
	v := newVerifier(t, nil)
	good := v.Verify(t.Context(), p, bearer(i.token(t, map[string]any{"iss": "iss"})), now)
	r := bearer("bad")
	r.Claims = good.Claims
	tcp := bearer("bad")
	tcp.HTTP = false
	preflight := request("/", "authorization", "Bearer bad", "origin", "x", "access-control-request-method", "GET")
	preflight.Method = []byte("OPTIONS")
	for name, c := range map[string]struct {
		p *authz.Program
		r *authz.Request
	}{"claims of the proxy": {p, r}, "a bare connection": {p, tcp}, "a preflight": {p, preflight}, "no rules": {nil, bearer("bad")}} {
		if got := v.Verify(t.Context(), c.p, c.r, now); got.Status != token.Missing || got.Claims != nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// Where the request does not say all, no token of it is good, and Decide refuses.
func TestWhatIsNotKnownIsNotGood(t *testing.T) {
	t.Parallel()
	i := newIssuer(t, "a")
	text := i.token(t, map[string]any{"iss": "iss", "sub": "s"})
	v := newVerifier(t, nil)
	p := program(t, map[string]any{"issuer": "iss", "jwks": i.set}, map[string]any{"issuer": "zzz", "jwks": i.set, "fromParams": []string{"t"}})
	for name, change := range map[string]func(*authz.Request){
		"headers": func(r *authz.Request) { r.Known &^= authz.FieldHeaders },
		"path":    func(r *authz.Request) { r.Known &^= authz.FieldPath; r.Path = nil },
	} {
		r := bearer(text)
		change(r)
		got := v.Verify(t.Context(), p, r, now)
		if got.Status != token.Unread || got.Claims != nil {
			t.Errorf("%s: %v", name, got.Status)
		}
		if d := p.Decide(r); d.Allowed {
			t.Errorf("%s: allowed", name)
		}
	}
	// Values that came joined could be several tokens.
	r := request("/", "authorization", "Bearer "+text+",Bearer "+text)
	r.Headers[0].Form = authz.HeaderJoined
	if got := v.Verify(t.Context(), p, r, now); got.Status != token.Malformed {
		t.Errorf("joined: %v", got.Status)
	}
}

func TestHeadersOfClaims(t *testing.T) {
	t.Parallel()
	i := newIssuer(t, "a")
	v := newVerifier(t, nil)
	rule := map[string]any{"issuer": "iss", "jwks": i.set, "outputPayloadToHeader": "X-Payload",
		"outputClaimToHeaders": []any{map[string]any{"header": "X-Sub", "claim": "sub"}, map[string]any{"header": "X-Evil", "claim": "evil"}, map[string]any{"header": "X-Gone", "claim": "gone.x"}}}
	other := map[string]any{"issuer": "zzz", "jwks": i.set, "forwardOriginalToken": true, "outputClaimToHeaders": []any{map[string]any{"header": "X-Other", "claim": "sub"}}}
	p := program(t, rule, other)
	text := i.token(t, map[string]any{"iss": "iss", "sub": "alice", "evil": "a\r\nx-admin: true"})
	got := v.Verify(t.Context(), p, request("/?access_token="+text, "x-sub", "root", "x-other", "root"), now)
	want := []token.Header{{Name: "x-payload", Value: strings.Split(text, ".")[1]}, {Name: "x-sub", Value: "alice"}}
	if got.Status != token.Good || !slices.Equal(got.SetHeaders, want) {
		t.Errorf("%v: set %v", got.Status, got.SetHeaders)
	}
	// Also what the rule that found nothing would have set.
	if !slices.Equal(got.RemoveHeaders, []string{"x-evil", "x-gone", "x-other"}) || !slices.Equal(got.RemoveParams, []string{"access_token"}) {
		t.Errorf("removed %v %v", got.RemoveHeaders, got.RemoveParams)
	}
	none := v.Verify(t.Context(), p, request("/", "x-sub", "root"), now)
	if none.Status != token.Missing || !slices.Equal(none.RemoveHeaders, []string{"x-payload", "x-sub", "x-evil", "x-gone", "x-other"}) {
		t.Errorf("without a token: %v removed %v", none.Status, none.RemoveHeaders)
	}
	forwarded := v.Verify(t.Context(), program(t, other), bearer(i.token(t, map[string]any{"iss": "zzz", "sub": "b"})), now)
	if forwarded.Status != token.Good || len(forwarded.RemoveHeaders) != 0 {
		t.Errorf("forwarded: %v removed %v", forwarded.Status, forwarded.RemoveHeaders)
	}
}

// Any byte of a good token that is changed makes it a bad one, but for bits that
// base64 does not use.
func TestOneChangedByteRefuses(t *testing.T) {
	t.Parallel()
	i := newIssuer(t, "a")
	p := program(t, map[string]any{"issuer": "iss", "jwks": i.set})
	v := newVerifier(t, nil)
	text := i.token(t, map[string]any{"iss": "iss", "sub": "s"})
	if v.Verify(t.Context(), p, bearer(text), now).Status != token.Good {
		t.Fatal("the token is not good")
	}
	for at := range text {
		for _, c := range []byte("A.-=+ \x00\xff") {
			changed := []byte(text)
			if changed[at] == c {
				continue
			}
			changed[at] = c
			if got := v.Verify(t.Context(), p, bearer(string(changed)), now); got.Status == token.Good && at != len(text)-1 {
				t.Errorf("byte %d changed to %q: %v", at, c, got.Status)
			}
		}
		if got := v.Verify(t.Context(), p, bearer(text[:at]), now); got.Status == token.Good {
			t.Errorf("cut at %d: good", at)
		}
	}
}

// TestSignaturesAreBounded counts the keys that are tried.
func TestSignaturesAreBounded(t *testing.T) {
	t.Parallel()
	good := newIssuer(t, "")
	// keys is a set of keys of strangers and, where it is not negative, the good one at
	// that place.
	keys := func(n, at int, id, alg string) string {
		set := jose.JSONWebKeySet{}
		for i := range n {
			k := newIssuer(t, "").key.Public()
			if i == at {
				k = good.key.Public()
			}
			set.Keys = append(set.Keys, jose.JSONWebKey{Key: k, KeyID: id, Algorithm: alg})
		}
		b, err := json.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	ed := func(n int) string {
		set := jose.JSONWebKeySet{}
		for range n {
			k, _, err := ed25519.GenerateKey(rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			set.Keys = append(set.Keys, jose.JSONWebKey{Key: k})
		}
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: good.key.Public()})
		b, err := json.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	named := newIssuer(t, "named")
	one := strings.TrimSuffix(strings.TrimPrefix(named.set, `{"keys":[`), "]}")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	text, other := good.token(t, map[string]any{"iss": "iss"}), good.token(t, map[string]any{"iss": "iss", "sub": "other"})
	for _, tt := range []struct {
		name  string
		ctx   context.Context
		sets  []string // one for each rule
		r     *authz.Request
		want  token.Status
		tried float64
	}{
		{"the good key is the hundredth", t.Context(), []string{keys(150, 99, "", "")}, bearer(text), token.Good, 100},
		{"the good key comes after a hundred", t.Context(), []string{keys(150, 100, "", "")}, bearer(text), token.TooManyKeys, 100},
		{"no key is good", t.Context(), []string{keys(100, -1, "", "")}, bearer(text), token.Forged, 100},
		{"several rules", t.Context(), []string{keys(60, -1, "", ""), keys(60, 50, "", "")}, bearer(text), token.TooManyKeys, 100},
		{"several tokens", t.Context(), []string{keys(80, 60, "", "")}, request("/?access_token="+text, "authorization", "Bearer "+other), token.TooManyKeys, 100},
		{"keys of other types", t.Context(), []string{ed(150)}, bearer(text), token.Good, 1},
		{"keys of other IDs", t.Context(), []string{keys(150, -1, "other", "ES256")}, bearer(named.token(t, map[string]any{"iss": "iss"})), token.UnknownKey, 0},
		{"a key of the ID among keys of others", t.Context(), []string{strings.Replace(keys(150, -1, "other", "ES256"), `{"keys":[`, `{"keys":[`+one+",", 1)},
			bearer(named.token(t, map[string]any{"iss": "iss"})), token.Good, 1},
		{"a check that was given up", ended, []string{keys(1, 0, "", "")}, bearer(text), token.Interrupted, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			v := newVerifier(t, nil)
			var rules []map[string]any
			for _, s := range tt.sets {
				rules = append(rules, map[string]any{"issuer": "iss", "jwks": s})
			}
			p := program(t, rules...)
			if got := v.Verify(tt.ctx, p, tt.r, now); got.Status != tt.want || (got.Claims != nil) != (tt.want == token.Good) {
				t.Errorf("the token is %s; want %s", got.Status, tt.want)
			}
			if n := token.Tried(v); n != tt.tried {
				t.Errorf("%v keys were tried; want %v", n, tt.tried)
			}
			// What is known to be good costs nothing more, even then.
			if tt.want == token.Good {
				if got := v.Verify(ended, p, tt.r, now); got.Status != token.Good || token.Tried(v) != tt.tried {
					t.Errorf("the second time it is %s, for %v keys", got.Status, token.Tried(v))
				}
			}
		})
	}
}

// TestRememberedTokensTakeLittleMemory is not parallel: it counts what the process
// has. Each token's claims take some forty times its size.
func TestRememberedTokensTakeLittleMemory(t *testing.T) {
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	i := newIssuer(t, "a")
	p := program(t, map[string]any{"issuer": "iss", "jwks": i.set})
	v := newVerifier(t, nil)
	list := make([]any, 900)
	for j := range list {
		list[j] = []any{}
	}
	before := heap()
	var last *authz.Request
	for j := range 600 {
		last = bearer(i.token(t, map[string]any{"iss": "iss", "n": j, "l": list}))
		if got := v.Verify(t.Context(), p, last, now); got.Status != token.Good {
			t.Fatal(got.Status)
		}
	}
	if after := heap(); after > before+40<<20 {
		t.Errorf("600 tokens of 4 KiB are kept in %d MiB", (after-before)>>20)
	}
	// Those that came last are.
	tried := token.Tried(v)
	if got := v.Verify(t.Context(), p, last, now); got.Status != token.Good || token.Tried(v) != tried {
		t.Error("the last token is not remembered")
	}
	// Many small ones are, too.
	var small []*authz.Request
	for j := range 500 {
		small = append(small, bearer(i.token(t, map[string]any{"iss": "iss", "n": j})))
	}
	for round := range 2 {
		tried := token.Tried(v)
		for _, r := range small {
			v.Verify(t.Context(), p, r, now)
		}
		if n := token.Tried(v) - tried; round == 1 && n != 0 {
			t.Errorf("%v of 500 small tokens are not remembered", n)
		}
	}
}

func TestParseKeys(t *testing.T) {
	t.Parallel()
	big1, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jwk := func(k any) string {
		b, err := jose.JSONWebKey{Key: k, KeyID: "k"}.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}}
	certificate := func(public, private any) string {
		der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	good := jwk(big1.Public())
	for name, c := range map[string]struct {
		text string
		ok   bool
	}{
		"a key":                         {`{"keys":[` + good + `]}`, true},
		"a private key":                 {`{"keys":[` + jwk(big1) + `]}`, true},
		"an Ed25519 key":                {`{"keys":[` + jwk(ed.Public()) + `]}`, true},
		"keys of no use beside a key":   {`{"keys":[{"kty":"new"},7,{"kty":"oct","k":"eA"},{"kty":"RSA","n":"!","e":"AQAB"},` + good + `]}`, true},
		"certificates":                  {`{"a":` + certificate(big1.Public(), big1) + `}`, true},
		"an x5t that is not the key's":  {`{"keys":[` + strings.TrimSuffix(good, "}") + `,"x5t":"AAAA","x5c":["eA"]}]}`, true},
		"padding":                       {`{"keys":[` + strings.Replace(good, `"AQAB"`, `"AQAB=="`, 1) + `]}`, true},
		"no keys":                       {`{"keys":[]}`, false},
		"null":                          {`null`, false},
		"keys null":                     {`{"keys":null}`, false},
		"keys that are an object":       {`{"keys":{}}`, false},
		"a single key":                  {good, false},
		"nothing":                       {``, false},
		"a page":                        {`<html>`, false},
		"two values":                    {`{"keys":[` + good + `]}{}`, false},
		"a small RSA key":               {`{"keys":[` + jwk(small.Public()) + `]}`, false},
		"a symmetric key":               {`{"keys":[{"kty":"oct","k":"c2VjcmV0","alg":"HS256"}]}`, false},
		"an algorithm of another type":  {`{"keys":[` + strings.TrimSuffix(good, "}") + `,"alg":"HS256"}]}`, false},
		"an algorithm of another curve": {`{"keys":[{"kty":"EC","crv":"P-256","alg":"ES512","x":"AA","y":"AA"}]}`, false},
		"a point that is not on it":     {`{"keys":[{"kty":"EC","crv":"P-256","x":"AQ","y":"AQ"}]}`, false},
		"X25519":                        {`{"keys":[{"kty":"OKP","crv":"X25519","x":"` + strings.Repeat("A", 43) + `"}]}`, false},
		"an even exponent":              {`{"keys":[` + strings.Replace(good, `"AQAB"`, `"BA"`, 1) + `]}`, false},
		"too many":                      {`{"keys":[` + strings.Repeat(`7,`, 1000) + good + `]}`, false},
		"certificates of EC keys":       {`{"a":` + certificate(newIssuer(t, "x").key.Public(), big1) + `}`, false},
		"text that is no certificate":   {`{"a":"b"}`, false},
	} {
		k, err := token.ParseKeys([]byte(c.text))
		if (err == nil) != c.ok || (k != nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMetricsCountStatuses(t *testing.T) {
	t.Parallel()
	i := newIssuer(t, "a")
	p := program(t, map[string]any{"issuer": "iss", "jwks": i.set})
	reg := prometheus.NewRegistry()
	v, err := token.New(token.Config{Metrics: reg})
	if err != nil {
		t.Fatal(err)
	}
	good := i.token(t, map[string]any{"iss": "iss"})
	for _, r := range []*authz.Request{request("/"), bearer(good), bearer(good), bearer("x")} {
		v.Verify(t.Context(), p, r, now)
	}
	for name, want := range map[string]float64{"missing": 1, "good": 2, "malformed": 1, "expired": 0} {
		if got := count(t, reg, name); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
}

func count(t *testing.T, reg *prometheus.Registry, status string) float64 {
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "signet_token_requests_total" && m.GetLabel()[0].GetValue() == status {
				return m.GetCounter().GetValue()
			}
		}
	}
	return -1
}

func ExampleVerifier_Verify() {
	v, err := token.New(token.Config{})
	if err != nil {
		panic(err)
	}
	resources, _ := authz.Parse("example", []byte(`{"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
		"metadata": {"name": "jwt"}, "spec": {"jwtRules": [{"issuer": "https://issuer.example", "jwksUri": "https://issuer.example/keys"}]}}`))
	set, _ := authz.Set{}.Update(resources)
	snapshot, _ := authz.Compile(set, authz.Options{})
	p := snapshot.For(identity.Workload{Namespace: "default"})
	r := authz.Request{Known: authz.FieldsHTTP, HTTP: true, Headers: []authz.Header{{Name: "authorization", Value: []byte("Bearer x.y.z")}}}
	result := v.Verify(context.Background(), p, &r, time.Now())
	r.Claims = result.Claims
	fmt.Println(result.Status, result.Status.HTTP(), p.Decide(&r).Reason)
	// Output: malformed 401 token-refused
}

// FuzzVerify feeds the finder of tokens and their parser: nothing panics, a request
// is only given claims by a token that an issuer signed, and Decide refuses whatever
// has a token that is not good.
func FuzzVerify(f *testing.F) {
	i := newIssuer(f, "a")
	v := newVerifier(f, nil)
	good := i.token(f, map[string]any{"iss": "iss", "sub": "s", "aud": []string{"a"}, "scope": "x y"})
	p := program(f, map[string]any{"issuer": "iss", "jwks": i.set, "outputClaimToHeaders": []any{map[string]any{"header": "x", "claim": "a.b"}}},
		map[string]any{"issuer": "other", "jwks": i.set, "fromHeaders": []any{map[string]any{"name": "x-t"}, map[string]any{"name": "x-u", "prefix": "T "}}, "fromParams": []string{"p"}, "fromCookies": []string{"c"}})
	want := v.Verify(f.Context(), p, bearer(good), now).Claims
	f.Add("/", "authorization", "Bearer "+good, uint8(0))
	f.Add("/?p=%2E", "x-u", "T ..", uint8(1))
	f.Add("/?access_token="+good, "cookie", `c="x"; d`, uint8(2))
	f.Add("/", "authorization", "Bearer eyJhbGciOiJub25lIn0.e30.", uint8(0))
	f.Add("/", "authorization", "Bearer eyJhbGciOiJFUzI1NiIsImp3ayI6e319.e30.AA", uint8(0))
	f.Fuzz(func(t *testing.T, path, name, value string, form uint8) {
		r := request(path, strings.ToLower(name), value)
		r.Headers[0].Form = authz.HeaderForm(form % 3)
		got := v.Verify(t.Context(), p, r, now)
		switch {
		case got.Status == token.Good:
			if !proto.Equal(got.Claims, want) || !strings.Contains(path+value, strings.Split(good, ".")[0]) && !strings.Contains(path, "%") {
				t.Fatalf("claims from nowhere: %v", got.Claims)
			}
		case got.Claims != nil:
			t.Fatalf("%v with claims", got.Status)
		case p.Decide(r).Allowed != (got.Status == token.Missing):
			t.Fatalf("%v, and Decide says %v", got.Status, p.Decide(r).Reason)
		}
	})
}

func FuzzParseKeys(f *testing.F) {
	f.Add([]byte(newIssuer(f, "a").set))
	f.Add([]byte(`{"keys":[{"kty":"RSA","n":"AQ","e":"AQAB"},{"kty":"OKP","crv":"Ed25519","x":"AA"}]}`))
	f.Add([]byte(`{"a":"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if k, err := token.ParseKeys(text); (k == nil) != (err != nil) {
			t.Fatalf("%v %v", k, err)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	i := newIssuer(b, "a")
	p := program(b, map[string]any{"issuer": "iss", "jwks": i.set})
	v := newVerifier(b, nil)
	claims := map[string]any{"iss": "iss", "sub": "s", "scope": "read write", "pad": strings.Repeat("x", 500)}
	good := bearer(i.token(b, claims))
	claims["pad"] = strings.Repeat("x", 5000)
	for name, r := range map[string]*authz.Request{"none": request("/"), "remembered": good, "large": bearer(i.token(b, claims)), "bad": bearer("x.y.z")} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				v.Verify(b.Context(), p, r, now)
			}
		})
	}
}
