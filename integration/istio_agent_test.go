package integration_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/tls"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/parts"
)

// pilotAgent asks for a certificate with the code of Istio's own agent: its secret
// cache, which makes key and CSR, and its CA client, of module integration/istio.
func pilotAgent(t *testing.T, question map[string]any) (chain, key []byte, root string, err error) {
	t.Helper()
	part, err := parts.FindIstio("..")
	if errors.Is(err, parts.ErrMissing) && os.Getenv("CI") == "" {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]any{"agent": question})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), part.Path)
	cmd.Stdin = bytes.NewReader(append(b, '\n'))
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if line[0] != '{' { // its log
			continue
		}
		var answer struct {
			Secret *struct{ Chain, Key, Root string } `json:"secret"`
			Error  string                             `json:"error"`
		}
		if err := json.Unmarshal([]byte(line), &answer); err != nil {
			t.Fatal(err)
		}
		if answer.Secret == nil {
			return nil, nil, "", errors.New(answer.Error)
		}
		return []byte(answer.Secret.Chain), []byte(answer.Secret.Key), answer.Secret.Root, nil
	}
	t.Fatalf("no answer in %q", out)
	return nil, nil, "", nil
}

// TestPilotAgentGetsCertificates: Istio's agent, unchanged, with a token and then
// with its certificate alone.
func TestPilotAgentGetsCertificates(t *testing.T) {
	t.Parallel()
	if _, err := parts.FindIstio(".."); errors.Is(err, parts.ErrMissing) && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	c := startIstioCA(t, programs(t))
	dir := t.TempDir()
	write := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	root := filepath.Join(c.dir, "root.pem")
	roots, err := os.ReadFile(root)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(more map[string]any) map[string]any {
		q := map[string]any{"address": c.addr, "san": "istiod.istio-system.svc", "rootFile": root, "clusterID": "Kubernetes", "namespace": "shop", "serviceAccount": "cart"}
		for k, v := range more {
			q[k] = v
		}
		return q
	}
	token := write("token", []byte(c.token("istio-ca", "shop", "cart", "cart-0", "node-a")))
	good := func(q map[string]any, wantRSA bool) (chain, key []byte) {
		t.Helper()
		chain, key, got, err := pilotAgent(t, q)
		if err != nil {
			t.Fatalf("%v\n%s", err, c.out.String())
		}
		pair, err := tls.X509KeyPair(chain, key)
		if err != nil {
			t.Fatal(err)
		}
		_, isRSA := pair.Leaf.PublicKey.(*rsa.PublicKey)
		_, isEC := pair.Leaf.PublicKey.(*ecdsa.PublicKey)
		if isRSA != wantRSA || isEC == wantRSA {
			t.Errorf("a key of type %T", pair.Leaf.PublicKey)
		}
		if got := pair.Leaf.URIs[0].String(); got != "spiffe://cluster.local/ns/shop/sa/cart" {
			t.Errorf("it names %s", got)
		}
		if strings.TrimSpace(got) != strings.TrimSpace(string(roots)) {
			t.Errorf("the agent takes for roots\n%s\nwant\n%s", got, roots)
		}
		if left := time.Until(pair.Leaf.NotAfter); left < 50*time.Minute || left > time.Hour {
			t.Errorf("it lives for another %v", left)
		}
		return chain, key
	}
	good(ask(map[string]any{"tokenFile": token}), true)
	chain, key := good(ask(map[string]any{"tokenFile": token, "ecc": true}), false)
	good(ask(map[string]any{"ecc": true, "certFile": write("cert.pem", chain), "keyFile": write("key.pem", key)}), false)

	for what, more := range map[string]map[string]any{
		"no proof":          {},
		"another cluster":   {"tokenFile": token, "clusterID": "remote"},
		"a token elsewhere": {"tokenFile": write("other", []byte(c.token("signet", "shop", "cart", "cart-0", "node-a")))},
	} {
		if _, _, _, err := pilotAgent(t, ask(more)); err == nil || !strings.Contains(err.Error(), "request authenticate failure") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
