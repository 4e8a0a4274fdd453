package attest_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
)

func TestHandedKeysVerifyTokens(t *testing.T) {
	t.Parallel()
	handed := &attest.Handed{}
	w := newWorld(t, func(c *attest.Config) { c.Keys, c.Issuer = handed, "" })
	token := w.issuer.Token(server, audience)
	if _, _, err := w.Attest(t.Context(), attest.Evidence{Token: token}); !errors.Is(err, attest.ErrUnavailable) || handed.Err() == nil {
		t.Errorf("before anything was handed over: %v, %v", err, handed.Err())
	}
	keys, _ := w.keys.Published()
	keys.Issuer = issuerURL
	if err := handed.Hand(keys); err != nil || handed.Err() != nil {
		t.Fatal(err, handed.Err())
	}
	w.accept(t, token)
	saved, _ := handed.Export()
	again := &attest.Handed{}
	if err := again.Load(saved); err != nil {
		t.Fatal(err)
	}
	w2 := newWorld(t, func(c *attest.Config) { c.Keys, c.Issuer, c.Pods = again, "", w.pods })
	w2.accept(t, token)

	// What replaces the keys ends what was proved with them.
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if err := handed.Hand(identity.TokenKeys{Issuer: issuerURL, Keys: map[string]crypto.PublicKey{"k": other.Public()}}); err != nil {
		t.Fatal(err)
	}
	w.refuse(t, token, attest.ErrRefused, "has no key")
	keys.Issuer = "https://another.test"
	if err := handed.Hand(keys); err != nil {
		t.Fatal(err)
	}
	w.refuse(t, token, attest.ErrRefused, "another.test")
}

func TestHandedKeysAreChecked(t *testing.T) {
	t.Parallel()
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := identity.TokenKeys{Issuer: issuerURL, Keys: map[string]crypto.PublicKey{"k": p256.Public()}}
	for name, k := range map[string]identity.TokenKeys{
		"none":           {Issuer: issuerURL},
		"no issuer":      {Keys: good.Keys},
		"legacy issuer":  {Issuer: "kubernetes/serviceaccount", Keys: good.Keys},
		"a weak key":     {Issuer: issuerURL, Keys: map[string]crypto.PublicKey{"k": weak.Public(), "l": p256.Public()}},
		"no usable key":  {Issuer: issuerURL, Keys: map[string]crypto.PublicKey{"k": p384.Public()}},
		"a key of no ID": {Issuer: issuerURL, Keys: map[string]crypto.PublicKey{"": p256.Public()}},
	} {
		h := &attest.Handed{}
		if err := h.Hand(good); err != nil {
			t.Fatal(err)
		}
		if err := h.Hand(k); err == nil {
			t.Errorf("%s: taken", name)
		}
		if _, ok, err := h.Key(t.Context(), "k"); !ok || err != nil {
			t.Errorf("%s: the keys before it did not stay: %v", name, err)
		}
	}
	h := &attest.Handed{}
	if err := h.Hand(good); err != nil {
		t.Fatal(err)
	}
	saved, _ := h.Export()
	for i := range saved {
		bad := bytes.Clone(saved)
		bad[i] ^= 1
		if again := (&attest.Handed{}); again.Load(bad) != nil && again.Err() == nil {
			t.Errorf("byte %d changed: an error, and keys", i)
		}
		if (&attest.Handed{}).Load(saved[:i]) == nil {
			t.Errorf("cut after %d bytes: taken", i)
		}
	}
}

func TestUnknownKeysAreAskedForSeldom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := &attest.Handed{}
		time.Sleep(time.Hour)
		ask := func(kid string) { _, _, _ = h.Key(t.Context(), kid) }
		wanted := func(want ...string) {
			t.Helper()
			if ids, _ := h.Unknown(); !slices.Equal(ids, want) {
				t.Errorf("unknown are %q, want %q", ids, want)
			}
		}
		_, changed := h.Unknown()
		ask("a")
		<-changed
		ask("b") // too soon
		wanted("a")
		time.Sleep(time.Second)
		ask("b")
		ask("a")
		wanted("a", "b")
		for i := range 20 {
			time.Sleep(time.Second)
			ask(fmt.Sprint(i))
		}
		wanted("12", "13", "14", "15", "16", "17", "18", "19")
		// Later it may be asked for again.
		time.Sleep(5 * time.Second)
		ask("19")
		wanted("12", "13", "14", "15", "16", "17", "18")
		time.Sleep(time.Second)
		ask("19")
		wanted("12", "13", "14", "15", "16", "17", "18", "19")
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Hand(identity.TokenKeys{Issuer: issuerURL, Keys: map[string]crypto.PublicKey{"19": key.Public()}}); err != nil {
			t.Fatal(err)
		}
		wanted("12", "13", "14", "15", "16", "17", "18")
	})
}
