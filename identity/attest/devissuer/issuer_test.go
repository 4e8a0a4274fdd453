package devissuer_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/signet-mesh/signet/identity/attest/devissuer"
)

var claims = devissuer.Claims{
	Audience: []string{"signet"}, Namespace: "default", ServiceAccount: "server",
	Pod: "server-0", PodUID: "pod-uid", Node: "node-a", NodeUID: "node-uid",
}

// The claims are those of k8s.io/kubernetes/pkg/serviceaccount/claims.go, for a
// token that is bound to a pod.
func TestTokensHaveTheClaimsOfTheAPIServer(t *testing.T) {
	t.Parallel()
	for _, alg := range []string{"ES256", "RS256"} {
		t.Run(alg, func(t *testing.T) {
			t.Parallel()
			i, err := devissuer.New(devissuer.Options{URL: "https://kubernetes.default.svc", Algorithm: alg})
			if err != nil {
				t.Fatal(err)
			}
			now := time.Unix(1_800_000_000, 999)
			token, err := i.Token(claims, now)
			if err != nil {
				t.Fatal(err)
			}
			var set jose.JSONWebKeySet
			if err := json.Unmarshal(i.JWKS(), &set); err != nil || len(set.Keys) != 1 {
				t.Fatalf("JWKS %s: %v", i.JWKS(), err)
			}
			if k := set.Keys[0]; k.KeyID != i.KeyID() || k.Use != "sig" || k.Algorithm != alg || !k.IsPublic() {
				t.Errorf("JWKS %s", i.JWKS())
			}
			parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(alg)})
			if err != nil {
				t.Fatal(err)
			}
			if h := parsed.Headers; len(h) != 1 || h[0].KeyID != i.KeyID() || h[0].Algorithm != alg || len(h[0].ExtraHeaders) != 0 {
				t.Errorf("headers %v", h)
			}
			var got map[string]any
			if err := parsed.Claims(set.Keys[0].Key, &got); err != nil {
				t.Fatal(err)
			}
			id, _ := got["jti"].(string)
			if len(id) != 36 || strings.Count(id, "-") != 4 {
				t.Errorf("jti %q", id)
			}
			delete(got, "jti")
			b, err := json.Marshal(got)
			if err != nil {
				t.Fatal(err)
			}
			const want = `{"aud":["signet"],"exp":1800000600,"iat":1800000000,"iss":"https://kubernetes.default.svc",` +
				`"kubernetes.io":{"namespace":"default","node":{"name":"node-a","uid":"node-uid"},"pod":{"name":"server-0","uid":"pod-uid"},` +
				`"serviceaccount":{"name":"server","uid":"sa-uid"}},"nbf":1800000000,"sub":"system:serviceaccount:default:server"}`
			uid := got["kubernetes.io"].(map[string]any)["serviceaccount"].(map[string]any)["uid"].(string)
			if s := strings.Replace(string(b), uid, "sa-uid", 1); s != want {
				t.Errorf("claims\n%s\nwant\n%s", s, want)
			}
			again, err := i.Token(claims, now)
			if err != nil || strings.Split(again, ".")[1] == strings.Split(token, ".")[1] {
				t.Errorf("two tokens have the same claims, jti included (%v)", err)
			}
		})
	}
}

func TestWhatIsMissingIsRefused(t *testing.T) {
	t.Parallel()
	i, err := devissuer.New(devissuer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if i.URL() != devissuer.DefaultURL || i.Algorithm() != devissuer.DefaultAlgorithm {
		t.Errorf("defaults %s, %s", i.URL(), i.Algorithm())
	}
	for name, change := range map[string]func(*devissuer.Claims){
		"no audience":        func(c *devissuer.Claims) { c.Audience = nil },
		"no namespace":       func(c *devissuer.Claims) { c.Namespace = "" },
		"no service account": func(c *devissuer.Claims) { c.ServiceAccount = "" },
		"no pod":             func(c *devissuer.Claims) { c.Pod = "" },
		"no pod UID":         func(c *devissuer.Claims) { c.PodUID = "" },
		"no node":            func(c *devissuer.Claims) { c.Node = "" },
		"no colon":           func(c *devissuer.Claims) { c.ServiceAccount = "a:b" },
		"shortest":           func(c *devissuer.Claims) { c.TTL = -time.Hour },
	} {
		c := claims
		change(&c)
		if token, err := i.Token(c, time.Now()); err == nil || token != "" || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %q, %v", name, token, err)
		}
	}
	c := claims
	c.NodeUID = ""
	m, err := i.Claims(c, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if node := m["kubernetes.io"].(map[string]any)["node"].(map[string]any); len(node) != 1 {
		t.Errorf("node %v; want its name alone", node)
	}
}

// An interrupted Create leaves something that neither Open nor Create takes for an
// issuer, at whatever point it was interrupted, and nothing is ever overwritten.
func TestCreateIsAllOrNothing(t *testing.T) {
	t.Parallel()
	order := []string{devissuer.KeyFile, devissuer.JWKSFile, devissuer.IssuerFile}
	for written := range order {
		dir := t.TempDir()
		first, created, err := devissuer.Create(dir, devissuer.Options{})
		if err != nil || !created {
			t.Fatal(created, err)
		}
		for _, name := range order[written:] {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := devissuer.Open(dir); err == nil {
			t.Errorf("with %v alone it was opened", order[:written])
		}
		second, created, err := devissuer.Create(dir, devissuer.Options{})
		if written == 0 {
			if err != nil || !created || second.KeyID() == first.KeyID() {
				t.Errorf("in an empty folder: %v, %v", created, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), "interrupted") {
			t.Errorf("with %v alone: %v", order[:written], err)
		}
	}
	// A write that fails leaves nothing of its own behind.
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, devissuer.JWKSFile), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, _, err := devissuer.Create(dir, devissuer.Options{}); err == nil {
		t.Error("a folder was overwritten")
	}
}

func TestOpenRefusesWhatDoesNotBelongTogether(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(t *testing.T, dir string){
		"no key":                   func(t *testing.T, dir string) { remove(t, dir, devissuer.KeyFile) },
		"a key that others read":   func(t *testing.T, dir string) { chmod(t, dir, devissuer.KeyFile, 0o644) },
		"an empty key":             func(t *testing.T, dir string) { write(t, dir, devissuer.KeyFile, nil) },
		"a key that is not PKCS#8": func(t *testing.T, dir string) { edit(t, dir, devissuer.KeyFile, "PRIVATE KEY", "EC PRIVATE KEY") },
		"a key with a tail": func(t *testing.T, dir string) {
			edit(t, dir, devissuer.KeyFile, "-----END PRIVATE KEY-----", "-----END PRIVATE KEY-----\nx")
		},
		"another algorithm": func(t *testing.T, dir string) { edit(t, dir, devissuer.IssuerFile, "ES256", "RS256") },
		"no algorithm":      func(t *testing.T, dir string) { edit(t, dir, devissuer.IssuerFile, "ES256", "none") },
		"another key ID":    func(t *testing.T, dir string) { edit(t, dir, devissuer.IssuerFile, `"kid": "`, `"kid": "x`) },
		"no JSON":           func(t *testing.T, dir string) { write(t, dir, devissuer.IssuerFile, []byte("{")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "issuer")
			made, _, err := devissuer.Create(dir, devissuer.Options{URL: "https://x.invalid"})
			if err != nil {
				t.Fatal(err)
			}
			opened, err := devissuer.Open(dir)
			if err != nil || opened.KeyID() != made.KeyID() || opened.URL() != "https://x.invalid" || !slices.Equal(opened.JWKS(), made.JWKS()) {
				t.Fatalf("Open = %v, %v", opened, err)
			}
			spoil(t, dir)
			if i, err := devissuer.Open(dir); err == nil || i != nil || !strings.Contains(err.Error(), dir) {
				t.Errorf("Open = %v, %v", i, err)
			}
		})
	}
}

func remove(t *testing.T, dir, name string) {
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func chmod(t *testing.T, dir, name string, mode os.FileMode) {
	if err := os.Chmod(filepath.Join(dir, name), mode); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, dir, name string, data []byte) {
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func edit(t *testing.T, dir, name, old, replacement string) {
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(data), old) {
		t.Fatalf("%s does not contain %q", name, old)
	}
	write(t, dir, name, []byte(strings.ReplaceAll(string(data), old, replacement)))
}
