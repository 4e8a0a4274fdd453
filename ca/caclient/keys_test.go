package caclient_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
)

// TestTokenKeysComeFromTheAuthority: an agent verifies its proxies' tokens with what
// the authority handed it, and has the authority look for keys that it meets first.
func TestTokenKeysComeFromTheAuthority(t *testing.T) {
	t.Parallel()
	next := attesttest.NewIssuer(t)
	var file string
	a := newAuthority(t)
	file = filepath.Join(t.TempDir(), "jwks.json")
	first := keysOf(t, a.issuer.JWKSFile())
	writeKeys(t, file, first)
	// Read again only for an unknown key: nothing but the agent's question makes it.
	keys, err := attest.OpenKeys(attest.KeysConfig{File: file, Issuer: a.issuer.URL(), Interval: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	a.stop()
	a.cfg.TokenKeys = keys
	a.start()

	handed := &attest.Handed{}
	cfg := a.config()
	cfg.UnknownKeys = handed.Unknown
	client, err := caclient.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = client.Run(ctx) }()
	defer func() { cancel(); <-done }()
	go func() {
		for {
			k, changed := client.TokenKeys()
			if k.Issuer != "" {
				if err := handed.Hand(k); err != nil {
					t.Error(err)
				}
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	attestor, err := attest.New(attest.Config{Keys: handed, Audience: "signet", Pods: cfg.Pods, Node: "node-a", AnyServiceAccount: true})
	if err != nil {
		t.Fatal(err)
	}
	try := func(issuer *attesttest.Issuer) error {
		_, _, err := attestor.Attest(ctx, attest.Evidence{Token: issuer.Token(server, "signet")})
		return err
	}
	if err := try(a.issuer); err != nil && !errors.Is(err, attest.ErrUnavailable) && !errors.Is(err, attest.ErrUnknownPod) {
		t.Errorf("before the keys came: %v", err)
	}
	eventually(t, "a token by the first key is good", func() bool { return try(a.issuer) == nil })
	if err := try(next); !errors.Is(err, attest.ErrRefused) {
		t.Errorf("a token by a key that nobody knows: %v", err)
	}
	writeKeys(t, file, append(first, keysOf(t, next.JWKSFile())...))
	eventually(t, "a token by the new key is good", func() bool { return try(next) == nil })
	if err := try(a.issuer); err != nil {
		t.Errorf("a token by the old key: %v", err)
	}
}

func keysOf(t *testing.T, file string) []json.RawMessage {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(b, &set); err != nil {
		t.Fatal(err)
	}
	return set.Keys
}

func writeKeys(t *testing.T, file string, keys []json.RawMessage) {
	t.Helper()
	b, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		t.Fatal(err)
	}
	write(t, file, b)
}
