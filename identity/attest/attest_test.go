package attest_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
)

func TestAttestAccepts(t *testing.T) {
	t.Parallel()
	now := time.Now()
	tests := map[string]struct {
		alg    string
		edits  []attesttest.Edit
		change func(*attest.Config)
	}{
		"a token as the API server makes it": {},
		"an RS256 token":                     {alg: "RS256"},
		"typ JWT":                            {edits: edits(attesttest.Header("typ", "JWT"))},
		"an audience that is a string (RFC 7519 4.1.3)": {edits: edits(attesttest.Claim("aud", audience))},
		"dates with a fraction": {edits: edits(
			attesttest.Claim("exp", float64(now.Unix())+300.5), attesttest.Claim("iat", float64(now.Unix())+0.25))},
		"an exp with an exponent":       {edits: edits(attesttest.RawClaims(exponent))},
		"no nbf":                        {edits: edits(attesttest.Without("nbf"))},
		"no jti":                        {edits: edits(attesttest.Without("jti"))},
		"claims that nobody knows":      {edits: edits(attesttest.Claim("kubernetes.io/warnafter", 1), attesttest.Claim("x", []any{1, nil}))},
		"nbf and iat within the skew":   {edits: edits(attesttest.Issued(now.Add(50 * time.Second)))},
		"the longest lifetime":          {edits: edits(attesttest.TTL(attest.DefaultMaxLifetime))},
		"a longer lifetime, if allowed": {edits: edits(attesttest.TTL(12 * time.Hour)), change: func(c *attest.Config) { c.MaxLifetime = 12 * time.Hour }},
		"no node UID":                   {edits: edits(attesttest.Without("kubernetes.io/node/uid"))},
		"a node UID where it must be":   {change: func(c *attest.Config) { c.RequireNodeUID = true }},
		"the node that is served":       {change: func(c *attest.Config) { c.Node = "node-a" }},
		"a service account on the list": {change: func(c *attest.Config) {
			c.AnyServiceAccount, c.ServiceAccounts = false, []string{"a/b", "default/server"}
		}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			issuer := attesttest.NewIssuerFor(t, cmpOr(tt.alg, "ES256"))
			w := newWorld(t, func(c *attest.Config) {
				keys, err := attest.OpenKeys(attest.KeysConfig{File: issuer.JWKSFile()})
				if err != nil {
					t.Fatal(err)
				}
				c.Keys = keys
				if tt.change != nil {
					tt.change(c)
				}
			})
			token := issuer.Token(server, audience, tt.edits...)
			w.accept(t, token)
			w.accept(t, token) // and from memory
		})
	}
}

func TestAttestRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *attest.Config) { c.Node = "node-a" })
	other := attesttest.NewIssuer(t)
	now := time.Now()
	der, err := x509.MarshalPKIXPublicKey(w.issuer.Key().Public())
	if err != nil {
		t.Fatal(err)
	}
	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	var otherSet struct{ Keys []map[string]any }
	if err := json.Unmarshal(other.JWKS(), &otherSet); err != nil {
		t.Fatal(err)
	}
	otherJWK := otherSet.Keys[0]

	good := w.issuer.Token(server, audience)
	segment := strings.Split(good, ".")

	tests := []struct {
		name  string
		text  string
		token string
		edits []attesttest.Edit
		want  error // nil: ErrRefused
	}{
		// What is not a compact JWS.
		{name: "nothing", text: "missing", token: ""},
		{name: "more than 16 KiB", text: "bytes", token: good + strings.Repeat("A", 16<<10)},
		{name: "a good token, but of more than 16 KiB", text: "bytes", edits: edits(attesttest.Claim("x", strings.Repeat("A", 16<<10)))},
		{name: "1 MB of dots", text: "bytes", token: strings.Repeat(".", 1<<20)},
		{name: "16 KiB of dots", text: "empty", token: strings.Repeat(".", 16<<10)},
		{name: "a word", text: "malformed", token: "token"},
		{name: "a space before", text: "malformed", token: " " + good},
		{name: "a line break after", text: "line break", token: good + "\n"},
		{name: "a line break within", text: "line break", token: good[:100] + "\r\n" + good[100:]},
		{name: "a zero byte after", text: "malformed", token: good + "\x00"},
		{name: "the scheme left on", text: "malformed", token: "Bearer " + good},
		{name: "a dot after", text: "malformed", token: good + "."},
		{name: "a dot before", text: "malformed", token: "." + good},
		{name: "a fourth segment", text: "three segments", token: good + "." + segment[2]},
		{name: "two segments", text: "three segments", token: segment[0] + "." + segment[1]},
		{name: "five segments, as JWE has", text: "malformed", token: good + ".AAAA.AAAA"},
		{name: "two tokens with a comma", text: "malformed", token: good + "," + good},
		{name: "a detached payload", text: "empty", token: segment[0] + ".." + segment[2]},
		{name: "padding", text: "base64url", token: segment[0] + "." + segment[1] + "." + segment[2] + "=="},
		{name: "the alphabet of plain base64", text: "base64url", token: segment[0] + "." + segment[1] + "." + strings.Repeat("+/", 43)},
		{name: "unused bits that are set", text: "base64url", token: unusedBits(good)},
		{name: "the JSON serialization", text: "malformed", token: fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q}`, segment[0], segment[1], segment[2])},

		// The header.
		{name: "an empty header", text: "empty", edits: edits(attesttest.RawHeader(""))},
		{name: "a header that is null", text: "algorithm", edits: edits(attesttest.RawHeader("null"))},
		{name: "a header that is a list", text: "header", edits: edits(attesttest.RawHeader("[]"))},
		{name: "a header with a byte order mark", text: "header", edits: edits(attesttest.RawHeader("\ufeff{}"))},
		{name: "a header that is not UTF-8", text: "UTF-8", edits: edits(attesttest.RawHeader("{\"alg\":\"ES256\",\"kid\":\"\xff\"}"))},
		{name: "a header with something after it", text: "header", edits: edits(attesttest.RawHeader(header(w.issuer) + "{}"))},
		{name: "alg twice", text: "header", edits: edits(attesttest.RawHeader(strings.Replace(header(w.issuer), "{", `{"alg":"none",`, 1)))},
		{name: "alg twice, once escaped", text: "header", edits: edits(attesttest.RawHeader(strings.Replace(header(w.issuer), "{", `{"\u0061lg":"none",`, 1)))},
		{name: "ALG", text: "header", edits: edits(attesttest.WithoutHeader("alg"), attesttest.Header("ALG", "ES256"))},
		{name: "no alg", text: "algorithm", edits: edits(attesttest.WithoutHeader("alg"))},
		{name: "an alg that is a number", text: "header", edits: edits(attesttest.Header("alg", 256))},
		{name: "an alg that is a list", text: "header", edits: edits(attesttest.Header("alg", []string{"ES256"}))},
		{name: "alg none, unsigned", text: "empty", edits: edits(attesttest.Header("alg", "none"), attesttest.Unsigned())},
		{name: "alg none, signed", text: "algorithm", edits: edits(attesttest.Header("alg", "none"))},
		{name: "alg nOnE", text: "algorithm", edits: edits(attesttest.Header("alg", "nOnE"))},
		{name: "alg es256", text: "algorithm", edits: edits(attesttest.Header("alg", "es256"))},
		{name: "HS256 with the public key in DER", text: "algorithm", edits: edits(attesttest.Header("alg", "HS256"), attesttest.HMAC(der))},
		{name: "HS256 with the public key in PEM", text: "algorithm", edits: edits(attesttest.Header("alg", "HS256"), attesttest.HMAC(publicPEM))},
		{name: "ES256 that is an HMAC with the public key", text: "signature", edits: edits(attesttest.HMAC(publicPEM))},
		{name: "RS256 for a key of ES256", text: "algorithm", edits: edits(attesttest.Header("alg", "RS256"))},
		{name: "PS256", text: "algorithm", edits: edits(attesttest.Header("alg", "PS256"))},
		{name: "ES384", text: "algorithm", edits: edits(attesttest.Header("alg", "ES384"), attesttest.Sign(es384(t)))},
		{name: "EdDSA", text: "algorithm", edits: edits(attesttest.Header("alg", "EdDSA"))},
		{name: "no kid", text: "1 to 1024", edits: edits(attesttest.WithoutHeader("kid"))},
		{name: "an empty kid", text: "1 to 1024", edits: edits(attesttest.Header("kid", ""))},
		{name: "a kid that is a number", text: "header", edits: edits(attesttest.Header("kid", 1))},
		{name: "an unknown kid", text: "no key with ID", edits: edits(attesttest.Header("kid", other.KeyID()))},
		{name: "a kid that is a path", text: "no key with ID", edits: edits(attesttest.Header("kid", "../../../../dev/null"))},
		{name: "a kid that is a URL", text: "no key with ID", edits: edits(attesttest.Header("kid", "https://evil.example/jwks.json"))},
		{name: "a kid of 2 KB", text: "1 to 1024", edits: edits(attesttest.Header("kid", strings.Repeat("k", 2048)))},
		{name: "typ at+jwt", text: "typ", edits: edits(attesttest.Header("typ", "at+jwt"))},
		{name: "a key of its own (jwk)", text: "jwk", edits: edits(attesttest.Header("jwk", otherJWK), attesttest.SignedBy(other))},
		{name: "a place for keys of its own (jku)", text: "jku", edits: edits(attesttest.Header("jku", "https://evil.example/"), attesttest.SignedBy(other))},
		{name: "a certificate of its own (x5c)", text: "x5c", edits: edits(attesttest.Header("x5c", []string{"AAAA"}))},
		{name: "x5u", text: "x5u", edits: edits(attesttest.Header("x5u", "https://evil.example/"))},
		{name: "crit", text: "crit", edits: edits(attesttest.Header("crit", []string{"exp"}))},
		{name: "b64 false", text: "b64", edits: edits(attesttest.Header("b64", false))},
		{name: "zip", text: "zip", edits: edits(attesttest.Header("zip", "DEF"))},

		// The signature.
		{name: "the signature of another issuer", text: "signature", edits: edits(attesttest.SignedBy(other))},
		{name: "the signature of another token", text: "signature", edits: edits(attesttest.Sign(func([]byte) []byte { return unb64(segment[2]) }))},
		{name: "a signature of zeros", text: "signature", edits: edits(attesttest.Sign(func([]byte) []byte { return make([]byte, 64) }))},
		{name: "a short signature", text: "signature", edits: edits(attesttest.Sign(func([]byte) []byte { return []byte{1} }))},
		{name: "a signature in ASN.1", text: "signature", edits: edits(attesttest.Sign(func(in []byte) []byte {
			sum := sha256.Sum256(in)
			b, err := ecdsa.SignASN1(rand.Reader, w.issuer.Key().(*ecdsa.PrivateKey), sum[:])
			if err != nil {
				t.Error(err)
			}
			return b
		}))},

		// The claims as JSON.
		{name: "claims that are null", text: "issuer", edits: edits(raw("null"))},
		{name: "claims that are a list", text: "malformed", edits: edits(raw("[]"))},
		{name: "claims that are a string", text: "malformed", edits: edits(raw(`"x"`))},
		{name: "claims with a byte order mark", text: "malformed", edits: edits(attesttest.RawClaims(func(s string) string { return "\ufeff" + s }))},
		{name: "claims with something after them", text: "malformed", edits: edits(attesttest.RawClaims(func(s string) string { return s + "{}" }))},
		{name: "claims that are not UTF-8", text: "UTF-8", edits: edits(attesttest.RawClaims(func(s string) string { return strings.Replace(s, "{", "{\"x\":\"\xff\",", 1) }))},
		{name: "iss twice", text: "duplicate", edits: edits(attesttest.RawClaims(func(s string) string { return strings.Replace(s, "{", `{"iss":"`+issuerURL+`",`, 1) }))},
		{name: "pod twice", text: "duplicate", edits: edits(attesttest.RawClaims(func(s string) string {
			return strings.Replace(s, `"pod":`, `"pod":{"name":"x","uid":"y"},"pod":`, 1)
		}))},
		{name: "a duplicate where nobody looks", text: "duplicate", edits: edits(attesttest.RawClaims(func(s string) string { return strings.Replace(s, "{", `{"x":[{"a":1,"a":2}],`, 1) }))},
		{name: "depth", text: "malformed", edits: edits(raw(strings.Repeat("[", 11000)))},

		// Whose token, and for whom.
		{name: "no iss", text: "issuer", edits: edits(attesttest.Without("iss"))},
		{name: "an iss that is a list", text: "malformed", edits: edits(attesttest.Claim("iss", []string{issuerURL}))},
		{name: "another iss", text: "issuer", edits: edits(attesttest.Claim("iss", "https://evil.example"))},
		{name: "an iss with a slash more", text: "issuer", edits: edits(attesttest.Claim("iss", issuerURL+"/"))},
		{name: "an iss in capitals", text: "issuer", edits: edits(attesttest.Claim("iss", strings.ToUpper(issuerURL)))},
		{name: "ISS", text: "issuer", edits: edits(attesttest.Without("iss"), attesttest.Claim("ISS", issuerURL))},
		{name: "the legacy issuer", text: "legacy", edits: edits(attesttest.Claim("iss", "kubernetes/serviceaccount"))},
		{name: "no aud", text: "audience", edits: edits(attesttest.Without("aud"))},
		{name: "an aud that is null", text: "malformed", edits: edits(attesttest.Claim("aud", nil))},
		{name: "an empty aud", text: "audience", edits: edits(attesttest.Claim("aud", []string{}))},
		{name: "another aud", text: "audience", edits: edits(attesttest.Claim("aud", []string{"signet-ca"}))},
		{name: "an aud that begins with ours", text: "audience", edits: edits(attesttest.Claim("aud", []string{audience + "-ca"}))},
		{name: "ours among others", text: "audience", edits: edits(attesttest.Claim("aud", []string{audience, "vault"}))},
		{name: "ours twice", text: "audience", edits: edits(attesttest.Claim("aud", []string{audience, audience}))},
		{name: "an aud of lists", text: "malformed", edits: edits(attesttest.Claim("aud", [][]string{{audience}}))},
		{name: "an aud that is a number", text: "malformed", edits: edits(attesttest.Claim("aud", 1))},

		// When.
		{name: "no exp", text: "lifetime", edits: edits(attesttest.Without("exp"))},
		{name: "an exp that is null", text: "lifetime", edits: edits(attesttest.Claim("exp", nil))},
		{name: "an exp that is a string", text: "malformed", edits: edits(attesttest.Claim("exp", fmt.Sprint(now.Unix()+300)))},
		{name: "an exp that is true", text: "malformed", edits: edits(attesttest.Claim("exp", true))},
		{name: "an exp that is an object", text: "malformed", edits: edits(attesttest.Claim("exp", map[string]any{}))},
		{name: "a negative exp", text: "malformed", edits: edits(attesttest.Claim("exp", -1))},
		{name: "an exp of zero", text: "expired", edits: edits(attesttest.Claim("exp", 0))},
		{name: "a huge exp", text: "malformed", edits: edits(attesttest.Claim("exp", uint64(1)<<63))},
		{name: "an exp past what a float holds", text: "malformed", edits: edits(attesttest.RawClaims(func(s string) string { return strings.Replace(s, `"exp":`, `"exp":1e999,"x":`, 1) }))},
		{name: "an exp in the year 9999", text: "lifetime", edits: edits(attesttest.Claim("exp", 253402300799))},
		{name: "exp this second", text: "expired", edits: edits(attesttest.Claim("exp", now.Unix()))},
		{name: "exp a while ago", text: "expired", edits: edits(attesttest.Issued(now.Add(-time.Hour)))},
		{name: "no iat", text: "lifetime", edits: edits(attesttest.Without("iat"))},
		{name: "an iat that is a string", text: "malformed", edits: edits(attesttest.Claim("iat", "0"))},
		{name: "an iat beyond the skew", text: "in the future", edits: edits(attesttest.Claim("iat", now.Unix()+70))},
		{name: "an nbf beyond the skew", text: "not before", edits: edits(attesttest.Claim("nbf", now.Unix()+70))},
		{name: "an nbf that is a string", text: "malformed", edits: edits(attesttest.Claim("nbf", "0"))},
		{name: "a lifetime a second too long", text: "lifetime", edits: edits(attesttest.TTL(attest.DefaultMaxLifetime + time.Second))},
		{name: "a lifetime of a year, as the API server extends them", text: "lifetime", edits: edits(attesttest.TTL(365 * 24 * time.Hour))},
		{name: "an iat of zero", text: "lifetime", edits: edits(attesttest.Claim("iat", 0))},
		{name: "an iat after exp", text: "lifetime", edits: edits(attesttest.Claim("exp", now.Unix()+10), attesttest.Claim("iat", now.Unix()+20))},

		// Who.
		{name: "no sub", text: "subject", edits: edits(attesttest.Without("sub"))},
		{name: "a sub that is a number", text: "malformed", edits: edits(attesttest.Claim("sub", 1))},
		{name: "a user as sub", text: "subject", edits: edits(attesttest.Claim("sub", "system:admin"))},
		{name: "a node as sub", text: "subject", edits: edits(attesttest.Claim("sub", "system:node:default:server"))},
		{name: "a sub of five parts", text: "subject", edits: edits(attesttest.Claim("sub", "system:serviceaccount:default:server:x"))},
		{name: "a sub of three parts", text: "subject", edits: edits(attesttest.Claim("sub", "system:serviceaccount:default"))},
		{name: "a sub with empty parts", text: "subject", edits: edits(attesttest.Claim("sub", "system:serviceaccount::"), attesttest.Claim("kubernetes.io/namespace", ""), attesttest.Claim("kubernetes.io/serviceaccount/name", ""))},
		{name: "a sub with another namespace", text: "contradicts", edits: edits(attesttest.Claim("sub", "system:serviceaccount:kube-system:server"))},
		{name: "a sub with another service account", text: "contradicts", edits: edits(attesttest.Claim("sub", "system:serviceaccount:default:admin"))},
		{name: "no kubernetes.io", text: "kubernetes.io", edits: edits(attesttest.Without("kubernetes.io"))},
		{name: "a kubernetes.io that is null", text: "kubernetes.io", edits: edits(attesttest.Claim("kubernetes.io", nil))},
		{name: "a kubernetes.io that is a list", text: "malformed", edits: edits(attesttest.Claim("kubernetes.io", []any{}))},
		{name: "no namespace", text: "contradicts", edits: edits(attesttest.Without("kubernetes.io/namespace"))},
		{name: "no service account", text: "contradicts", edits: edits(attesttest.Without("kubernetes.io/serviceaccount"))},
		{name: "no pod", text: "not bound", edits: edits(attesttest.Without("kubernetes.io/pod"))},
		{name: "a pod that is a string", text: "malformed", edits: edits(attesttest.Claim("kubernetes.io/pod", "server-0"))},
		{name: "no pod name", text: "not bound", edits: edits(attesttest.Without("kubernetes.io/pod/name"))},
		{name: "no pod UID", text: "not bound", edits: edits(attesttest.Without("kubernetes.io/pod/uid"))},
		{name: "a secret instead of a pod", text: "not bound", edits: edits(attesttest.Without("kubernetes.io/pod"), attesttest.Claim("kubernetes.io/secret", map[string]any{"name": "s", "uid": "u"}))},
		{name: "no node", text: "node", edits: edits(attesttest.Without("kubernetes.io/node"))},
		{name: "no node name", text: "node", edits: edits(attesttest.Without("kubernetes.io/node/name"))},

		// The view.
		{name: "a pod that is not in the view", text: "unknown_pod", want: attest.ErrUnknownPod, edits: edits(attesttest.Claim("kubernetes.io/pod/uid", "another"))},
		{name: "a pod with another name in the view", text: "in the view", edits: edits(attesttest.Claim("kubernetes.io/pod/name", "server-1"))},
		{name: "another namespace than in the view", text: "in the view", edits: edits(
			attesttest.Claim("sub", "system:serviceaccount:prod:server"), attesttest.Claim("kubernetes.io/namespace", "prod"))},
		{name: "another service account than in the view", text: "in the view", edits: edits(
			attesttest.Claim("sub", "system:serviceaccount:default:admin"), attesttest.Claim("kubernetes.io/serviceaccount/name", "admin"))},
		{name: "another node than is served", text: "node", want: attest.ErrOtherNode, edits: edits(attesttest.Claim("kubernetes.io/node/name", "node-b"))},
		{name: "another pod on another node", text: "node", want: attest.ErrOtherNode, edits: edits(
			attesttest.Claim("kubernetes.io/node/name", "node-b"), attesttest.Claim("kubernetes.io/pod/uid", "another"))},
		{name: "a node that was made anew", text: "node", want: attest.ErrOtherNode, edits: edits(attesttest.Claim("kubernetes.io/node/uid", "another"))},
	}
	names := map[string]bool{}
	for _, tt := range tests {
		if names[tt.name] {
			t.Fatalf("two rows are called %q", tt.name)
		}
		names[tt.name] = true
		t.Run(tt.name, func(t *testing.T) {
			token := tt.token
			if len(tt.edits) > 0 {
				token = w.issuer.Token(server, audience, tt.edits...)
			}
			want := tt.want
			if want == nil {
				want = attest.ErrRefused
			}
			w.refuse(t, token, want, tt.text)
			w.refuse(t, token, want, tt.text) // and no memory of it
		})
	}
	w.accept(t, good)
}

func TestAttestRefusesByConfiguration(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		change func(*attest.Config)
		edits  []attesttest.Edit
		ahead  time.Duration // of the token's time of issue, when it is presented
		want   error
		text   string
	}{
		"a service account that is not on the list": {
			change: func(c *attest.Config) {
				c.AnyServiceAccount, c.ServiceAccounts = false, []string{"default/serve", "default/server2", "x/server"}
			},
			want: attest.ErrNotAllowed, text: "not on the list",
		},
		"a node UID that must be there": {
			change: func(c *attest.Config) { c.RequireNodeUID = true },
			edits:  edits(attesttest.Without("kubernetes.io/node/uid")),
			want:   attest.ErrRefused, text: "without its UID",
		},
		"a node that the view contradicts, on any node": {
			edits: edits(attesttest.Claim("kubernetes.io/node/name", "node-b")),
			want:  attest.ErrOtherNode, text: "in the view",
		},
		"a lifetime over a shorter maximum": {
			change: func(c *attest.Config) { c.MaxLifetime = 5 * time.Minute },
			want:   attest.ErrRefused, text: "lifetime",
		},
		"an nbf over a shorter skew": {
			change: func(c *attest.Config) { c.Skew = time.Second },
			ahead:  50 * time.Second,
			want:   attest.ErrRefused, text: "not_yet_valid",
		},
		"keys that cannot be had": {
			change: func(c *attest.Config) { c.Keys = brokenKeys{} },
			want:   attest.ErrUnavailable, text: "no route",
		},
		"keys that are for nothing": {
			change: func(c *attest.Config) { c.Keys = oddKeys{} },
			want:   attest.ErrRefused, text: "key",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, func(c *attest.Config) {
				if tt.change != nil {
					tt.change(c)
				}
			})
			if tt.ahead != 0 {
				tt.edits = append(tt.edits, attesttest.Issued(time.Now().Add(tt.ahead)))
			}
			w.refuse(t, w.issuer.Token(server, audience, tt.edits...), tt.want, tt.text)
		})
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		change func(*attest.Config)
		text   string
	}{
		"no issuer":                         {func(c *attest.Config) { c.Issuer = "" }, "issuer"},
		"the legacy issuer":                 {func(c *attest.Config) { c.Issuer = "kubernetes/serviceaccount" }, "never expire"},
		"an issuer with a space":            {func(c *attest.Config) { c.Issuer = "https://x " }, "white space"},
		"an issuer that is no URL":          {func(c *attest.Config) { c.Issuer = "https://[x" }, "issuer"},
		"no audience":                       {func(c *attest.Config) { c.Audience = "" }, "audience"},
		"no keys":                           {func(c *attest.Config) { c.Keys = nil }, "keys"},
		"no pods":                           {func(c *attest.Config) { c.Pods = nil }, "pods"},
		"an empty list of service accounts": {func(c *attest.Config) { c.AnyServiceAccount = false }, "empty"},
		"a list and any":                    {func(c *attest.Config) { c.ServiceAccounts = []string{"a/b"} }, "choose one"},
		"an entry without a namespace":      {func(c *attest.Config) { c.AnyServiceAccount, c.ServiceAccounts = false, []string{"b"} }, "NAMESPACE/NAME"},
		"an entry with two slashes":         {func(c *attest.Config) { c.AnyServiceAccount, c.ServiceAccounts = false, []string{"a/b/c"} }, "NAMESPACE/NAME"},
		"a lifetime of two days":            {func(c *attest.Config) { c.MaxLifetime = 48 * time.Hour }, "lifetime"},
		"a negative lifetime":               {func(c *attest.Config) { c.MaxLifetime = -1 }, "lifetime"},
		"a skew of an hour":                 {func(c *attest.Config) { c.Skew = time.Hour }, "skew"},
		"a negative cache":                  {func(c *attest.Config) { c.CacheSize = -1 }, "cache"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := attest.Config{Issuer: issuerURL, Audience: audience, Keys: brokenKeys{}, Pods: &identity.Pods{}, AnyServiceAccount: true}
			tt.change(&cfg)
			if a, err := attest.New(cfg); err == nil || a != nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("New = %v, %v; want an error with %q", a, err, tt.text)
			}
		})
	}
}

// A token has exactly one spelling, and every other one is refused.
func TestMangledTokensAreRefused(t *testing.T) {
	t.Parallel()
	for _, alg := range []string{"ES256", "RS256"} {
		t.Run(alg, func(t *testing.T) {
			t.Parallel()
			issuer := attesttest.NewIssuerFor(t, alg)
			w := newWorld(t, func(c *attest.Config) {
				keys, err := attest.OpenKeys(attest.KeysConfig{File: issuer.JWKSFile()})
				if err != nil {
					t.Fatal(err)
				}
				c.Keys = keys
			})
			token := issuer.Token(server, audience)
			w.accept(t, token)
			tried := 0
			try := func(what string, mangled string) {
				tried++
				if mangled == token {
					return
				}
				if _, _, err := w.Attest(t.Context(), attest.Evidence{Token: mangled}); !errors.Is(err, attest.ErrRefused) {
					t.Errorf("%s: %v; want it refused", what, err)
				}
			}
			for i := range token {
				for j := i; j <= len(token); j++ {
					// Substrings without the two dots are all alike.
					if strings.Count(token[i:j], ".") == 2 || j-i < 50 {
						try(fmt.Sprintf("substring %d:%d", i, j), token[i:j])
					}
				}
				try(fmt.Sprintf("without byte %d", i), token[:i]+token[i+1:])
				try(fmt.Sprintf("byte %d twice", i), token[:i+1]+token[i:])
				for bit := range 8 {
					b := []byte(token)
					b[i] ^= 1 << bit
					try(fmt.Sprintf("byte %d, bit %d", i, bit), string(b))
				}
			}
			// Each value of the last byte of each segment: there the unused bits are.
			for _, i := range []int{strings.Index(token, ".") - 1, strings.LastIndex(token, ".") - 1, len(token) - 1} {
				for v := range 256 {
					b := []byte(token)
					b[i] = byte(v)
					try(fmt.Sprintf("byte %d = %#x", i, v), string(b))
				}
			}
			w.accept(t, token)
			t.Logf("%d mangled tokens", tried)
		})
	}
}

func TestEvidenceIsNotPrinted(t *testing.T) {
	t.Parallel()
	e := attest.Evidence{Token: "secret"}
	var b bytes.Buffer
	slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "e", e)
	for _, s := range []string{fmt.Sprint(e), fmt.Sprintf("%v %+v %#v %s %q", e, e, e, e, e), b.String()} {
		if strings.Contains(s, "secret") {
			t.Errorf("printed: %s", s)
		}
	}
}

func TestMetricsCountEachResult(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewRegistry()
	w := newWorld(t, func(c *attest.Config) { c.Metrics = reg })
	// A second attestor for another audience shares the registry.
	newWorld(t, func(c *attest.Config) { c.Metrics, c.Audience = reg, "signet-ca" })
	token := w.issuer.Token(server, audience)
	for range 3 {
		w.accept(t, token)
	}
	w.refuse(t, "x", attest.ErrRefused, "")
	w.refuse(t, w.issuer.Token(server, "other"), attest.ErrRefused, "")
	got := gather(t, reg)
	for series, want := range map[string]float64{
		"signet_attest_tokens_total{signet,verified}":    1,
		"signet_attest_tokens_total{signet,remembered}":  2,
		"signet_attest_tokens_total{signet,malformed}":   1,
		"signet_attest_tokens_total{signet,audience}":    1,
		"signet_attest_tokens_total{signet,unknown_pod}": 0,
		"signet_attest_tokens_total{signet-ca,verified}": 0,
		"signet_attest_remembered{signet}":               1,
		"signet_attest_remembered{signet-ca}":            0,
	} {
		if v, ok := got[series]; !ok || v != want {
			t.Errorf("%s = %v, %v; want %v", series, v, ok, want)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *attest.Config) { c.CacheSize = 4 })
	tokens := make([]string, 16)
	for i := range tokens {
		tokens[i] = w.issuer.Token(server, audience)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 64 {
				if _, _, err := w.Attest(t.Context(), attest.Evidence{Token: tokens[(i+j)%len(tokens)]}); err != nil && !errors.Is(err, attest.ErrUnknownPod) {
					t.Error(err)
				}
				if i == 0 && j%8 == 0 {
					w.pods.Delete(server.PodUID)
					w.pods.Set(server)
				}
			}
		})
	}
	wg.Wait()
}

// An RSA key with the checks of PKCS #1 v1.5 must not accept PSS, and an HMAC with
// the modulus is not a signature.
func TestRSATricksAreRefused(t *testing.T) {
	t.Parallel()
	issuer := attesttest.NewIssuerFor(t, "RS256")
	w := newWorld(t, func(c *attest.Config) {
		keys, err := attest.OpenKeys(attest.KeysConfig{File: issuer.JWKSFile()})
		if err != nil {
			t.Fatal(err)
		}
		c.Keys = keys
	})
	key := issuer.Key().(*rsa.PrivateKey)
	pss := attesttest.Sign(func(in []byte) []byte {
		sum := sha256.Sum256(in)
		b, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, sum[:], nil)
		if err != nil {
			t.Error(err)
		}
		return b
	})
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	modulus := hmac.New(sha256.New, key.N.Bytes())
	for name, e := range map[string][]attesttest.Edit{
		"PS256":                             edits(attesttest.Header("alg", "PS256"), pss),
		"PSS under the name of RS256":       edits(pss),
		"HS256 with the public key":         edits(attesttest.Header("alg", "HS256"), attesttest.HMAC(der)),
		"HS256 with the public key in PEM":  edits(attesttest.Header("alg", "HS256"), attesttest.HMAC(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))),
		"an HMAC with the modulus as RS256": edits(attesttest.Sign(func(in []byte) []byte { modulus.Reset(); modulus.Write(in); return slices.Repeat(modulus.Sum(nil), 8) })),
		"ES256 for a key of RS256":          edits(attesttest.Header("alg", "ES256")),
		"RS384": edits(attesttest.Header("alg", "RS384"), attesttest.Sign(func(in []byte) []byte {
			sum := sha512.Sum384(in)
			b, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA384, sum[:])
			if err != nil {
				t.Error(err)
			}
			return b
		})),
	} {
		t.Run(name, func(t *testing.T) { w.refuse(t, issuer.Token(server, audience, e...), attest.ErrRefused, "") })
	}
	w.accept(t, issuer.Token(server, audience))
}
