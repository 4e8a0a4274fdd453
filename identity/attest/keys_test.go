package attest_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
)

func TestOpenKeysRefuses(t *testing.T) {
	t.Parallel()
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	jwk := func(key any) map[string]any {
		b, err := json.Marshal(jose.JSONWebKey{Key: key, KeyID: "k"})
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		return m
	}
	with := func(m map[string]any, kv ...any) map[string]any {
		for i := 0; i < len(kv); i += 2 {
			if kv[i+1] == nil {
				delete(m, kv[i].(string))
			} else {
				m[kv[i].(string)] = kv[i+1]
			}
		}
		return m
	}
	set := func(keys ...any) string {
		b, err := json.Marshal(map[string]any{"keys": keys})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	weak := &rsa.PublicKey{N: new(big.Int).Rsh(rsa2048.N, 1), E: rsa2048.E}
	huge := &rsa.PublicKey{N: new(big.Int).Lsh(rsa2048.N, 8192), E: rsa2048.E}
	cube := &rsa.PublicKey{N: rsa2048.N, E: 3}
	even := &rsa.PublicKey{N: rsa2048.N, E: 65538}
	good := set(jwk(p256.Public()))
	tests := map[string]struct{ data, text string }{
		"nothing":                              {"", "not a JSON Web Key Set"},
		"half of a file":                       {good[:len(good)/2], "not a JSON Web Key Set"},
		"a file with a byte order mark":        {"\ufeff" + good, "not a JSON Web Key Set"},
		"a file with something after it":       {good + "x", "not a JSON Web Key Set"},
		"a key and not a set":                  {good[len(`{"keys":[`) : len(good)-2], "none of 0 keys"},
		"null":                                 {"null", "none of 0 keys"},
		"no keys":                              {set(), "none of 0 keys"},
		"keys twice":                           {strings.TrimSuffix(good, "}") + `,"keys":[]}`, "not a JSON Web Key Set"},
		"a key that is null":                   {set(nil), "not a JSON object"},
		"a key that is a string":               {set("k"), "not a JSON object"},
		"a member twice":                       {strings.Replace(good, `"kid":"k"`, `"kid":"k","kid":"j"`, 1), "duplicate"},
		"a private EC key":                     {set(jwk(p256)), "PRIVATE"},
		"a private RSA key":                    {set(jwk(rsa2048)), "PRIVATE"},
		"a private key beside a good one":      {set(jwk(p256.Public()), with(jwk(rsa2048), "kid", "j")), "PRIVATE"},
		"a private key for encryption":         {set(jwk(p256.Public()), with(jwk(rsa2048), "kid", "j", "use", "enc")), "PRIVATE"},
		"a private key of an unknown type":     {set(jwk(p256.Public()), map[string]any{"kty": "X", "kid": "j", "d": "AA"}), "PRIVATE"},
		"only a prime of a private key":        {set(with(jwk(rsa2048.Public()), "p", "AA")), "PRIVATE"},
		"a symmetric key":                      {set(jwk(p256.Public()), map[string]any{"kty": "oct", "kid": "j", "k": "c2VjcmV0"}), "SYMMETRIC"},
		"a symmetric key without its value":    {set(jwk(p256.Public()), map[string]any{"kty": "oct", "kid": "j"}), "symmetric"},
		"a public key with a symmetric member": {set(with(jwk(p256.Public()), "k", "AA")), "SYMMETRIC"},
		"RSA of 2047 bits":                     {set(jwk(weak)), "2047 bits"},
		"RSA of 10240 bits":                    {set(jwk(huge)), "RSA modulus size"},
		"RSA with an exponent of 3":            {set(jwk(cube)), "exponent 3"},
		"RSA with an even exponent":            {set(jwk(even)), "exponent 65538"},
		"only P-384":                           {set(jwk(p384.Public())), "none of 1 keys"},
		"a point that is not on the curve":     {set(with(jwk(p256.Public()), "x", b64(make([]byte, 32)))), "malformed"},
		"a coordinate too few":                 {set(with(jwk(p256.Public()), "x", nil)), "malformed"},
		"no kty":                               {set(with(jwk(p256.Public()), "kty", nil)), "kty"},
		"a kty that is a number":               {set(with(jwk(p256.Public()), "kty", 1)), "wrong type"},
		"only keys for encryption":             {set(with(jwk(p256.Public()), "use", "enc")), "none of 1 keys"},
		"only keys of another alg":             {set(with(jwk(rsa2048.Public()), "alg", "PS256")), "none of 1 keys"},
		"RSA with the alg of EC":               {set(with(jwk(rsa2048.Public()), "alg", "ES256")), "none of 1 keys"},
		"only keys that may not verify":        {set(with(jwk(p256.Public()), "key_ops", []string{"sign"})), "none of 1 keys"},
		"no kid":                               {set(with(jwk(p256.Public()), "kid", nil)), "kid of 0 bytes"},
		"a kid of 2 KB":                        {set(with(jwk(p256.Public()), "kid", strings.Repeat("k", 2048))), "kid of 2048 bytes"},
		"a kid twice":                          {set(jwk(p256.Public()), jwk(rsa2048.Public())), "occurs twice"},
		"a kid twice, once unused":             {set(jwk(p256.Public()), with(jwk(rsa2048.Public()), "use", "enc")), "occurs twice"},
		"257 keys":                             {set(make([]any, 257)...), "257 keys"},
		"256 KiB of spaces":                    {strings.Repeat(" ", 256<<10) + good, "more than"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "jwks.json")
			if err := os.WriteFile(file, []byte(tt.data), 0o644); err != nil {
				t.Fatal(err)
			}
			k, err := attest.OpenKeys(attest.KeysConfig{File: file})
			if err == nil || k != nil {
				t.Fatalf("OpenKeys = %v, %v; want an error", k, err)
			}
			if !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), file) {
				t.Errorf("error %q does not say %q and the file", err, tt.text)
			}
			for _, secret := range []any{jwk(p256)["d"], jwk(rsa2048)["d"], jwk(rsa2048)["p"], "c2VjcmV0"} {
				if strings.Contains(err.Error(), secret.(string)) {
					t.Error("the error contains the private key")
				}
			}
		})
	}
	t.Run("skips what is fine but for something else", func(t *testing.T) {
		t.Parallel()
		file := filepath.Join(t.TempDir(), "jwks.json")
		data := set(jwk(p256.Public()), with(jwk(p384.Public()), "kid", "p384"), with(jwk(rsa2048.Public()), "kid", "enc", "use", "enc"),
			with(jwk(rsa2048.Public()), "kid", "rsa", "use", "sig", "alg", "RS256", "key_ops", []string{"verify"}),
			map[string]any{"kty": "OKP", "kid": "ed", "crv": "Ed25519", "x": "AA"}, map[string]any{"kty": "future", "kid": "f"})
		if err := os.WriteFile(file, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
		k, err := attest.OpenKeys(attest.KeysConfig{File: file})
		if err != nil {
			t.Fatal(err)
		}
		for kid, alg := range map[string]string{"k": "ES256", "rsa": "RS256", "p384": "", "enc": "", "ed": "", "f": "", "": ""} {
			if key, ok, err := k.Key(t.Context(), kid); ok != (alg != "") || key.Algorithm != alg || err != nil {
				t.Errorf("Key(%q) = %v, %v, %v; want alg %q", kid, key, ok, err, alg)
			}
		}
	})
	t.Run("refuses what is not a plain file", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		open := filepath.Join(dir, "open.json")
		if err := os.WriteFile(open, []byte(good), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(open, 0o646); err != nil {
			t.Fatal(err)
		}
		for file, text := range map[string]string{
			"": "no file", dir: "regular", "/dev/zero": "regular", filepath.Join(dir, "none"): "no such file", open: "chmod o-w",
		} {
			if _, err := attest.OpenKeys(attest.KeysConfig{File: file}); err == nil || !strings.Contains(err.Error(), text) {
				t.Errorf("OpenKeys(%q): %v; want %q", file, err, text)
			}
		}
		if _, err := attest.OpenKeys(attest.KeysConfig{File: open, Interval: -1}); err == nil {
			t.Error("a negative interval was accepted")
		}
	})
}

// What happens to a file that is in use.
func TestKeysFollowTheFile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		first, second := attesttest.NewIssuer(t), attesttest.NewIssuer(t)
		file := filepath.Join(t.TempDir(), "jwks.json")
		write := func(data []byte) {
			t.Helper()
			if err := os.WriteFile(file+".new", data, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(file+".new", file); err != nil {
				t.Fatal(err)
			}
		}
		var keys *attest.Keys
		has := func(i *attesttest.Issuer, want bool) {
			t.Helper()
			if _, ok, err := keys.Key(t.Context(), i.KeyID()); ok != want || err != nil {
				t.Errorf("Key = %v, %v; want %v", ok, err, want)
			}
		}
		var log bytes.Buffer
		write(first.JWKS())
		var err error
		if keys, err = attest.OpenKeys(attest.KeysConfig{File: file, Log: slog.New(slog.NewTextHandler(&log, nil))}); err != nil {
			t.Fatal(err)
		}

		has(first, true)
		has(second, false)

		// A new key is found for the sake of a token that names it, but the file
		// is not read for each.
		write(second.JWKS())
		has(second, false)
		has(first, true)
		time.Sleep(100 * time.Millisecond)
		has(second, true)
		has(first, false)

		// Without an unknown key ID a change is noticed within an interval.
		write(first.JWKS())
		time.Sleep(999 * time.Millisecond)
		has(second, true)
		time.Sleep(time.Millisecond)
		has(second, false)
		has(first, true)

		// What is broken or gone changes nothing, and says so once.
		for i, breakIt := range []func(){
			func() { write([]byte("{")) },
			func() { write([]byte(`{"keys":[]}`)) },
			func() {
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
			},
		} {
			if err := keys.Err(); (err != nil) != (i > 0) {
				t.Errorf("before break %d: Err = %v", i, err)
			}
			log.Reset()
			breakIt()
			for range 5 {
				time.Sleep(time.Second)
				has(first, true)
			}
			if keys.Err() == nil {
				t.Errorf("break %d: no error", i)
			}
			if n := strings.Count(log.String(), "issuer keys cannot be read"); n != 1 {
				t.Errorf("break %d was logged %d times:\n%s", i, n, log.String())
			}
		}
		log.Reset()
		write(first.JWKS())
		time.Sleep(time.Second)
		has(first, true)
		if err := keys.Err(); err != nil || !strings.Contains(log.String(), "can be read again") {
			t.Errorf("after it was mended: Err = %v, log %q", err, log.String())
		}
	})
}

// An unknown key ID reads the file at most ten times a second.
func TestUnknownKeyIDsAreRateLimited(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		issuer := attesttest.NewIssuer(t)
		file := issuer.JWKSFile()
		keys, err := attest.OpenKeys(attest.KeysConfig{File: file, Interval: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		// The file alternates between broken and good, so that each reading shows.
		readings, before := 0, keys.Err()
		for i := range 1000 {
			data := issuer.JWKS()
			if keys.Err() == nil {
				data = []byte("{")
			}
			if err := os.WriteFile(file, data, 0o644); err != nil {
				t.Fatal(err)
			}
			if _, ok, _ := keys.Key(t.Context(), fmt.Sprint("unknown ", i)); ok {
				t.Fatal("an unknown key was found")
			}
			if (keys.Err() == nil) != (before == nil) {
				readings++
			}
			before = keys.Err()
			time.Sleep(time.Millisecond)
		}
		if readings < 9 || readings > 10 {
			t.Errorf("%d readings in a second; want 10 at most", readings)
		}
	})
}
