package attest_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
	"github.com/signet-mesh/signet/identity/attest/devissuer"
)

const (
	issuerURL = devissuer.DefaultURL
	audience  = "signet"
)

var server = identity.Workload{
	Namespace: "default", ServiceAccount: "server",
	Pod: "server-0", PodUID: "0f1e2d3c-0000-4000-8000-000000000001",
	Node: "node-a", NodeUID: "0f1e2d3c-0000-4000-8000-00000000000a",
	Labels: map[string]string{"app": "server"},
}

var sentinels = []error{attest.ErrRefused, attest.ErrUnknownPod, attest.ErrOtherNode, attest.ErrNotAllowed, attest.ErrUnavailable}

// world is an issuer, a view of the pods, and an attestor that believes them.
type world struct {
	*attest.Attestor
	issuer *attesttest.Issuer
	pods   *identity.Pods
	keys   *attest.Keys
	file   string // of keys
}

func newWorld(t testing.TB, change ...func(*attest.Config)) *world {
	t.Helper()
	w := &world{issuer: attesttest.NewIssuer(t), pods: &identity.Pods{}}
	w.pods.Set(server)
	var err error
	w.file = w.issuer.JWKSFile()
	if w.keys, err = attest.OpenKeys(attest.KeysConfig{File: w.file}); err != nil {
		t.Fatal(err)
	}
	cfg := attest.Config{Issuer: issuerURL, Audience: audience, Keys: w.keys, Pods: w.pods, AnyServiceAccount: true}
	for _, c := range change {
		c(&cfg)
	}
	if w.Attestor, err = attest.New(cfg); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) accept(t testing.TB, token string) {
	t.Helper()
	got, until, err := w.Attest(t.Context(), attest.Evidence{Token: token})
	if err != nil {
		t.Fatalf("a good token: %v", err)
	}
	if !got.Equal(server) {
		t.Fatalf("a good token proved %v, want %v", got, server)
	}
	if left := time.Until(until); left <= 0 || left > 24*time.Hour {
		t.Fatalf("it holds for another %s", left)
	}
}

// refuse checks everything that holds for each refusal, whatever the reason.
func (w *world) refuse(t testing.TB, token string, want error, text string) {
	t.Helper()
	got, until, err := w.Attest(t.Context(), attest.Evidence{Token: token})
	if err == nil {
		t.Fatalf("accepted as %v until %v", got, until)
	}
	if !got.IsZero() || !until.IsZero() {
		t.Errorf("refused, but returned %v until %v", got, until)
	}
	for _, s := range sentinels {
		if errors.Is(err, s) != (s == want) {
			t.Errorf("errors.Is(%q, %q) = %v; want it to be %q and nothing else", err, s, s != want, want)
		}
	}
	if !strings.Contains(err.Error(), text) {
		t.Errorf("error %q does not say %q", err, text)
	}
	for part := range strings.SplitSeq(token, ".") {
		if len(part) > 40 && strings.Contains(err.Error(), part) {
			t.Errorf("error %q contains a part of the token", err)
		}
	}
	if len(err.Error()) > 1000 {
		t.Errorf("an error of %d bytes", len(err.Error()))
	}
	// What a client learns depends on the kind of error and on nothing else.
	if public := attest.Public(err); public != attest.Public(want) {
		t.Errorf("the client learns %q of %q", public, err)
	}
}

func gather(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			name := f.GetName()
			if len(labels) > 0 {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return got
}

type brokenKeys struct{}

func (brokenKeys) Key(context.Context, string) (attest.Key, bool, error) {
	return attest.Key{}, false, errors.New("no route to host")
}

// oddKeys is a source that hands out what no source should: a shared secret.
type oddKeys struct{}

func (oddKeys) Key(context.Context, string) (attest.Key, bool, error) {
	return attest.Key{Public: []byte("secret"), Algorithm: "ES256"}, true, nil
}

func edits(e ...attesttest.Edit) []attesttest.Edit { return e }

func raw(s string) attesttest.Edit {
	return attesttest.RawClaims(func(string) string { return s })
}

func header(i *attesttest.Issuer) string {
	return fmt.Sprintf(`{"alg":%q,"kid":%q}`, i.Algorithm(), i.KeyID())
}

// exponent writes exp as 1.234e9.
func exponent(claims string) string {
	_, rest, _ := strings.Cut(claims, `"exp":`)
	n := rest[:strings.IndexAny(rest, ",}")]
	return strings.Replace(claims, n, n[:1]+"."+n[1:]+fmt.Sprintf("e%d", len(n)-1), 1)
}

// unusedBits is another spelling of the same signature, for decoders that are not
// strict.
func unusedBits(token string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, token[len(token)-1])
	return token[:len(token)-1] + alphabet[last|1:last|1+1]
}

func es384(t *testing.T) func([]byte) []byte {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return func(in []byte) []byte {
		sum := sha512.Sum384(in)
		r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
		if err != nil {
			t.Error(err)
		}
		return append(r.FillBytes(make([]byte, 48)), s.FillBytes(make([]byte, 48))...)
	}
}

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

func unb64(s string) []byte {
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
