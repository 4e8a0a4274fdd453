package attest_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
)

// FuzzToken: nothing is accepted that the issuer did not sign, and nothing panics.
func FuzzToken(f *testing.F) {
	w := newWorld(f)
	good := w.issuer.Token(server, audience)
	f.Add(good)
	f.Add(strings.TrimSuffix(good, good[strings.LastIndex(good, "."):]) + ".")
	f.Add("eyJhbGciOiJub25lIn0.e30.AA")
	f.Fuzz(func(t *testing.T, token string) {
		got, until, err := w.Attest(t.Context(), attest.Evidence{Token: token})
		if (err == nil) != (token == good) {
			t.Errorf("Attest(%q) = %v, %v", token, got, err)
		}
		if err != nil && (!got.IsZero() || !until.IsZero()) {
			t.Errorf("refused, but returned %v until %v", got, until)
		}
	})
}

// FuzzClaims: whatever a trusted issuer signs, what is accepted names the pod that
// is in the view, and nothing panics. It runs in a bubble, where it is always the
// first second of the year 2000, so that seeds with dates stay what they are.
func FuzzClaims(f *testing.F) {
	w := newWorld(f, func(c *attest.Config) { c.CacheSize = 8 })
	bubble := time.Unix(946684800, 0)
	for _, e := range []attesttest.Edit{attesttest.Without("nbf"), attesttest.Claim("aud", audience), attesttest.Claim("exp", 946685000.5)} {
		token := w.issuer.Token(server, audience, attesttest.Issued(bubble), e)
		f.Add(unb64(strings.Split(token, ".")[1]))
	}
	f.Fuzz(func(t *testing.T, claims []byte) {
		synctest.Test(t, func(t *testing.T) {
			token := w.issuer.Token(server, audience, attesttest.RawClaims(func(string) string { return string(claims) }))
			got, until, err := w.Attest(t.Context(), attest.Evidence{Token: token})
			if err != nil {
				if !got.IsZero() || !until.IsZero() {
					t.Errorf("refused, but returned %v until %v", got, until)
				}
				return
			}
			if left := time.Until(until); !got.Equal(server) || left <= 0 || left > attest.DefaultMaxLifetime+attest.DefaultSkew {
				t.Errorf("accepted as %v for %s", got, left)
			}
			// What was accepted says so in so many words: encoding/json, which
			// lets the last of duplicate names win, must read the same.
			var c map[string]any
			if err := json.Unmarshal(claims, &c); err != nil {
				t.Fatalf("accepted, but another decoder says %v of %q", err, claims)
			}
			at := func(path ...string) any {
				var v any = c
				for _, name := range path {
					v = v.(map[string]any)[name]
				}
				return v
			}
			now := float64(time.Now().Unix())
			if at("iss") != issuerURL || at("sub") != "system:serviceaccount:default:server" ||
				at("kubernetes.io", "pod", "uid") != server.PodUID || at("kubernetes.io", "pod", "name") != server.Pod ||
				at("kubernetes.io", "node", "name") != server.Node || at("exp").(float64) <= now || at("iat").(float64) > now+61 {
				t.Errorf("accepted, but another decoder reads %v of %q", c, claims)
			}
		})
	})
}

// FuzzKeys: a file that is accepted as keys accepts only tokens of the issuer that
// is in it, and nothing panics.
func FuzzKeys(f *testing.F) {
	issuer := attesttest.NewIssuer(f)
	var pods identity.Pods
	pods.Set(server)
	f.Add(issuer.JWKS())
	f.Add(attesttest.NewIssuerFor(f, "RS256").JWKS())
	f.Add([]byte(`{"keys":[{"kty":"oct","kid":"x","k":"AA"}]}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		file := filepath.Join(dir, "jwks.json")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		keys, err := attest.OpenKeys(attest.KeysConfig{File: file})
		if err != nil {
			return
		}
		a, err := attest.New(attest.Config{Issuer: issuerURL, Audience: audience, Keys: keys, Pods: &pods, AnyServiceAccount: true})
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = a.Attest(t.Context(), attest.Evidence{Token: issuer.Token(server, audience)})
		if _, ok, _ := keys.Key(t.Context(), issuer.KeyID()); err == nil && !ok {
			t.Errorf("accepted without the issuer's key: %s", data)
		}
	})
}
