package oracle_test

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	_ "crypto/sha512" // for crypto.SHA384 and crypto.SHA512
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/go-jose/go-jose/v4"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/token"
)

// issuerKeys sign tokens. The key sets of the table hold some of them.
type issuerKeys struct {
	rsa, rotated, small *rsa.PrivateKey
	p256, p384          *ecdsa.PrivateKey
	ed                  ed25519.PrivateKey
	secret              []byte
}

func newIssuerKeys(tb testing.TB) *issuerKeys {
	tb.Helper()
	k := &issuerKeys{secret: []byte("a secret of at least thirty-two bytes, for HMAC")}
	var errs [6]error
	k.rsa, errs[0] = rsa.GenerateKey(rand.Reader, 2048)
	k.rotated, errs[1] = rsa.GenerateKey(rand.Reader, 2048)
	k.small, errs[2] = rsa.GenerateKey(rand.Reader, 1024)
	k.p256, errs[3] = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	k.p384, errs[4] = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	_, k.ed, errs[5] = ed25519.GenerateKey(rand.Reader)
	for _, err := range errs {
		if err != nil {
			tb.Fatal(err)
		}
	}
	return k
}

// signature signs in the way of an algorithm.
func (k *issuerKeys) signature(alg string, key any, input []byte) []byte {
	hash := map[string]crypto.Hash{"256": crypto.SHA256, "384": crypto.SHA384, "512": crypto.SHA512}[strings.TrimLeft(alg, "RPEHS")]
	var sig []byte
	var err error
	switch key := key.(type) {
	case *rsa.PrivateKey:
		h := hash.New()
		h.Write(input)
		if strings.HasPrefix(alg, "PS") {
			sig, err = rsa.SignPSS(rand.Reader, key, hash, h.Sum(nil), &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		} else {
			sig, err = rsa.SignPKCS1v15(rand.Reader, key, hash, h.Sum(nil))
		}
	case *ecdsa.PrivateKey:
		h := hash.New()
		h.Write(input)
		r, s, e := ecdsa.Sign(rand.Reader, key, h.Sum(nil))
		size := (key.Curve.Params().BitSize + 7) / 8
		sig, err = append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...), e
	case ed25519.PrivateKey:
		sig = ed25519.Sign(key, input)
	case []byte:
		m := hmac.New(sha256.New, key)
		m.Write(input)
		sig = m.Sum(nil)
	}
	if err != nil {
		panic(err)
	}
	return sig
}

var b64 = base64.RawURLEncoding

// raw is a token of any header and payload, byte by byte.
func (k *issuerKeys) raw(header, payload, alg string, key any) string {
	input := b64.EncodeToString([]byte(header)) + "." + b64.EncodeToString([]byte(payload))
	return input + "." + b64.EncodeToString(k.signature(alg, key, []byte(input)))
}

// padded is one whose parts have the padding of base64, signed as they stand.
func (k *issuerKeys) padded(header, payload, alg string, key any) string {
	e := base64.URLEncoding
	input := e.EncodeToString([]byte(header)) + "." + e.EncodeToString([]byte(payload))
	return input + "." + e.EncodeToString(k.signature(alg, key, []byte(input)))
}

// tokenCase is a row of the table.
type tokenCase struct {
	name    string
	world   string
	headers [][2]string
	query   string
	method  string
	// deviation says that Signet refuses what Istio takes, and which line of
	// docs/policies.md says so.
	deviation string
}

const (
	deviationCrit      = "crit"
	deviationHMAC      = "HMAC"
	deviationSmallRSA  = "small RSA"
	deviationBase64    = "base64"
	deviationAlgorithm = "algorithm and curve"
	deviationExp0      = "exp 0"
	deviationEmbedded  = "embedded jwk"
	deviationForgotten = "a bad token that Envoy forgets"
	deviationMany      = "more than 16 tokens"
)

func bearer(tokens ...string) (list [][2]string) {
	for _, t := range tokens {
		list = append(list, [2]string{"Authorization", "Bearer " + t})
	}
	return list
}

// tokenWorlds are the RequestAuthentications of the table, each of a workload of its
// own, which an AuthorizationPolicy demands claims of.
func tokenWorlds(tb testing.TB, k *issuerKeys) map[string]object {
	tb.Helper()
	jwk := func(key any, kid, alg string) jose.JSONWebKey {
		return jose.JSONWebKey{Key: key, KeyID: kid, Algorithm: alg}
	}
	set := func(keys ...any) string {
		b, err := json.Marshal(object{"keys": keys})
		if err != nil {
			tb.Fatal(err)
		}
		return string(b)
	}
	all := set(jwk(k.rsa.Public(), "rsa", ""), jwk(k.p256.Public(), "ec", "ES256"), jwk(k.p384.Public(), "", ""), jwk(k.ed.Public(), "ed", "EdDSA"),
		jwk(k.small.Public(), "small", ""), object{"kty": "oct", "kid": "hmac", "k": b64.EncodeToString(k.secret)})
	twice := set(jwk(k.rotated.Public(), "rsa", "RS256"), jwk(k.rsa.Public(), "rsa", "RS256"))
	return map[string]object{
		"one": {"jwtRules": []object{{"issuer": "https://iss", "audiences": []string{"shop", "https://api.example/"}, "jwks": all,
			"outputPayloadToHeader": "X-Payload", "outputClaimToHeaders": []object{{"header": "X-Sub", "claim": "sub"}, {"header": "X-Deep", "claim": "a.b"}, {"header": "X-N", "claim": "n"}}}}},
		"forward":   {"jwtRules": []object{{"issuer": "https://iss", "jwks": all, "forwardOriginalToken": true, "spaceDelimitedClaims": []string{"words"}}}},
		"plain":     {"jwtRules": []object{{"issuer": "https://iss", "jwks": all}}},
		"rsa only":  {"jwtRules": []object{{"issuer": "https://iss", "jwks": set(jwk(k.rsa.Public(), "rsa", "RS256"))}}},
		"same kid":  {"jwtRules": []object{{"issuer": "https://iss", "jwks": twice}}},
		"before":    {"jwtRules": []object{{"issuer": "https://iss", "jwks": set(jwk(k.rsa.Public(), "2025", "RS256"))}}},
		"overlap":   {"jwtRules": []object{{"issuer": "https://iss", "jwks": set(jwk(k.rsa.Public(), "2025", "RS256"), jwk(k.rotated.Public(), "2026", "RS256"))}}},
		"after":     {"jwtRules": []object{{"issuer": "https://iss", "jwks": set(jwk(k.rotated.Public(), "2026", "RS256"))}}},
		"no kid":    {"jwtRules": []object{{"issuer": "https://iss", "jwks": set(jwk(k.rotated.Public(), "", ""), jwk(k.rsa.Public(), "", ""))}}},
		"elsewhere": {"jwtRules": []object{{"issuer": "https://iss", "jwks": all, "fromHeaders": []object{{"name": "X-Token"}, {"name": "X-Auth", "prefix": "Token "}}, "fromParams": []string{"t", "u"}, "fromCookies": []string{"session"}}}},
		"two": {"jwtRules": []object{
			{"issuer": "https://iss", "jwks": all, "audiences": []string{"shop"}, "outputClaimToHeaders": []object{{"header": "X-Sub", "claim": "sub"}}},
			{"issuer": "other", "jwks": all, "outputClaimToHeaders": []object{{"header": "X-Other", "claim": "sub"}}},
		}},
		"reads":     {"jwtRules": []object{{"issuer": "https://iss", "jwks": all, "outputPayloadToHeader": "X-Payload", "outputClaimToHeaders": []object{{"header": "X-Group", "claim": "group"}}}}},
		"reads not": {"jwtRules": []object{{"issuer": "https://iss", "jwks": all, "outputClaimToHeaders": []object{{"header": "X-Group", "claim": "group"}}}}},
		"two custom": {"jwtRules": []object{
			{"issuer": "https://iss", "jwks": all, "fromHeaders": []object{{"name": "X-Token"}}}, {"issuer": "other", "jwks": all, "fromHeaders": []object{{"name": "X-Token"}}},
		}},
		"two places": {"jwtRules": []object{
			{"issuer": "https://iss", "jwks": all}, {"issuer": "other", "jwks": all, "fromHeaders": []object{{"name": "X-Other"}}},
		}},
		"same issuer": {"jwtRules": []object{
			{"issuer": "https://iss", "jwks": all, "audiences": []string{"shop"}}, {"issuer": "https://iss", "jwks": all, "audiences": []string{"bank"}},
		}},
	}
}

// tokenTable is the table: at least sixty ways to make a token, or to hide one.
func tokenTable(k *issuerKeys) []tokenCase {
	now := time.Now().Unix()
	claims := func(more string) string {
		if more != "" {
			more = "," + more
		}
		return fmt.Sprintf(`{"iss":"https://iss","sub":"alice","aud":"shop","exp":%d%s}`, now+3600, more)
	}
	header := func(alg, kid string) string { return fmt.Sprintf(`{"alg":%q,"kid":%q}`, alg, kid) }
	good := k.raw(header("RS256", "rsa"), claims(""), "RS256", k.rsa)
	payload := func(p string) string { return k.raw(header("RS256", "rsa"), p, "RS256", k.rsa) }
	head := func(h string) string { return k.raw(h, claims(""), "RS256", k.rsa) }
	with := func(more string) string { return payload(claims(more)) }
	aud := func(a string) string {
		return payload(fmt.Sprintf(`{"iss":"https://iss","sub":"alice","aud":%s,"exp":%d}`, a, now+3600))
	}
	at := func(f string, t int64) string {
		return payload(fmt.Sprintf(`{"iss":"https://iss","sub":"alice","aud":"shop",%q:%d}`, f, t))
	}
	bad := good[:len(good)-8] + "AAAAAAAA"
	expired := at("exp", now-3600)
	other := payload(fmt.Sprintf(`{"iss":"other","sub":"bob","exp":%d}`, now+3600))
	bob := payload(fmt.Sprintf(`{"iss":"https://iss","sub":"bob","aud":"shop","exp":%d}`, now+3600))
	der, err := x509.MarshalPKIXPublicKey(k.rsa.Public())
	if err != nil {
		panic(err)
	}
	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	strangerJWK, err := json.Marshal(jose.JSONWebKey{Key: k.rotated.Public(), KeyID: "rsa", Algorithm: "RS256"})
	if err != nil {
		panic(err)
	}
	parts := strings.Split(good, ".")
	one := func(name, token string) tokenCase { return tokenCase{name: name, world: "one", headers: bearer(token)} }
	in := func(world, name, token string) tokenCase {
		return tokenCase{name: name, world: world, headers: bearer(token)}
	}
	but := func(c tokenCase, deviation string) tokenCase { c.deviation = deviation; return c }
	h := func(world, name string, headers ...[2]string) tokenCase {
		return tokenCase{name: name, world: world, headers: headers}
	}
	q := func(world, name, query string) tokenCase { return tokenCase{name: name, world: world, query: query} }
	deep := strings.Repeat(`{"a":`, 60) + "1" + strings.Repeat("}", 60)
	deeper := strings.Repeat(`{"a":`, 150) + "1" + strings.Repeat("}", 150)
	flipped := []byte(good)
	flipped[len(parts[0])+10] ^= 1
	return []tokenCase{
		h("one", "no token"),
		one("RS256", good),
		one("RS384", k.raw(header("RS384", "rsa"), claims(""), "RS384", k.rsa)),
		one("RS512", k.raw(header("RS512", "rsa"), claims(""), "RS512", k.rsa)),
		one("PS256", k.raw(header("PS256", "rsa"), claims(""), "PS256", k.rsa)),
		one("PS512", k.raw(header("PS512", "rsa"), claims(""), "PS512", k.rsa)),
		one("ES256", k.raw(header("ES256", "ec"), claims(""), "ES256", k.p256)),
		one("ES384 with a key without kid", k.raw(header("ES384", "whatever"), claims(""), "ES384", k.p384)),
		one("EdDSA", k.raw(header("EdDSA", "ed"), claims(""), "EdDSA", k.ed)),
		// Algorithms that are not what they say.
		one("alg none, no signature", b64.EncodeToString([]byte(`{"alg":"none"}`))+"."+parts[1]+"."),
		one("alg none with a signature", b64.EncodeToString([]byte(`{"alg":"none"}`))+"."+parts[1]+"."+parts[2]),
		one("alg None", head(`{"alg":"None","kid":"rsa"}`)),
		one("alg missing", head(`{"kid":"rsa"}`)),
		one("alg null", head(`{"alg":null,"kid":"rsa"}`)),
		one("alg a number", head(`{"alg":256,"kid":"rsa"}`)),
		one("alg a list", head(`{"alg":["RS256"],"kid":"rsa"}`)),
		one("alg in lower case", head(`{"alg":"rs256","kid":"rsa"}`)),
		one("Alg with a capital", head(`{"Alg":"RS256","kid":"rsa"}`)),
		one("HS256 with the public key in PEM", k.raw(header("HS256", "rsa"), claims(""), "HS256", publicPEM)),
		one("HS256 with the public key in DER", k.raw(header("HS256", "rsa"), claims(""), "HS256", der)),
		one("HS256 with the modulus", k.raw(header("HS256", "rsa"), claims(""), "HS256", k.rsa.N.Bytes())),
		in("rsa only", "HS256 with the public key, one RSA key", k.raw(header("HS256", "rsa"), claims(""), "HS256", publicPEM)),
		in("rsa only", "HS256 with an empty key", k.raw(header("HS256", "rsa"), claims(""), "HS256", []byte{})),
		but(one("HS256 with a key of the set", k.raw(header("HS256", "hmac"), claims(""), "HS256", k.secret)), deviationHMAC),
		one("RS256 by the signature of PS256", k.raw(header("RS256", "rsa"), claims(""), "PS256", k.rsa)),
		one("PS256 by the signature of RS256", k.raw(header("PS256", "rsa"), claims(""), "RS256", k.rsa)),
		in("rsa only", "RS512 where the key says RS256", k.raw(header("RS512", "rsa"), claims(""), "RS512", k.rsa)),
		one("ES256 with a key of P-384", k.raw(header("ES256", "x"), claims(""), "ES384", k.p384)),
		but(one("ES256's hash with a key of P-384", k.raw(header("ES256", "x"), claims(""), "ES256", k.p384)), deviationAlgorithm),
		but(one("RS256 signed by ECDSA", k.raw(header("RS256", "x"), claims(""), "ES256", k.p384)), deviationAlgorithm),
		one("EdDSA with a short signature", k.raw(header("EdDSA", "ed"), claims(""), "EdDSA", k.ed)[:200]),
		but(one("an RSA key of 1024 bits", k.raw(header("RS256", "small"), claims(""), "RS256", k.small)), deviationSmallRSA),
		// Key IDs.
		one("kid missing", head(`{"alg":"RS256"}`)),
		one("kid empty", head(`{"alg":"RS256","kid":""}`)),
		one("kid null", head(`{"alg":"RS256","kid":null}`)),
		one("kid a number", head(`{"alg":"RS256","kid":7}`)),
		one("kid of nobody", head(header("RS256", "nobody"))),
		one("kid a path", head(header("RS256", "../../../../dev/null"))),
		one("kid SQL", head(header("RS256", "' OR 1=1 --"))),
		one("kid with a NUL", head(`{"alg":"RS256","kid":"rsa\u0000"}`)),
		one("kid of another key", head(header("RS256", "ec"))),
		one("kid in upper case", head(header("RS256", "RSA"))),
		one("kid twice", head(`{"alg":"RS256","kid":"nobody","kid":"rsa"}`)),
		in("same kid", "two keys of one kid, the second signs", good),
		in("same kid", "two keys of one kid, the first signs", k.raw(header("RS256", "rsa"), claims(""), "RS256", k.rotated)),
		in("no kid", "keys without kid", good),
		// Headers that ask to be believed.
		one("jwk of a stranger", k.raw(`{"alg":"RS256","kid":"rsa","jwk":`+string(strangerJWK)+`}`, claims(""), "RS256", k.rotated)),
		one("jwk of a stranger, no kid", k.raw(`{"alg":"RS256","jwk":`+string(strangerJWK)+`}`, claims(""), "RS256", k.rotated)),
		one("jwk of a stranger, signed well", k.raw(`{"alg":"RS256","kid":"rsa","jwk":`+string(strangerJWK)+`}`, claims(""), "RS256", k.rsa)),
		but(one("jwk that is none, signed well", head(`{"alg":"RS256","kid":"rsa","jwk":{}}`)), deviationEmbedded),
		one("jku", k.raw(`{"alg":"RS256","kid":"rsa","jku":"http://127.0.0.1:1/keys"}`, claims(""), "RS256", k.rotated)),
		one("x5u", k.raw(`{"alg":"RS256","kid":"rsa","x5u":"http://127.0.0.1:1/cert"}`, claims(""), "RS256", k.rotated)),
		one("x5u and jku, signed well", head(`{"alg":"RS256","kid":"rsa","x5u":"http://127.0.0.1:1/cert","jku":"http://127.0.0.1:1/keys"}`)),
		but(one("crit", head(`{"alg":"RS256","kid":"rsa","crit":["exp"],"exp":1}`)), deviationCrit),
		but(one("crit of b64", head(`{"alg":"RS256","kid":"rsa","crit":["b64"],"b64":true}`)), deviationCrit),
		but(one("b64 false", head(`{"alg":"RS256","kid":"rsa","b64":false}`)), deviationCrit),
		one("zip", head(`{"alg":"RS256","kid":"rsa","zip":"DEF"}`)),
		one("typ at+jwt and cty", head(`{"alg":"RS256","kid":"rsa","typ":"at+jwt","cty":"JWT"}`)),
		one("header twice alg", head(`{"alg":"none","alg":"RS256","kid":"rsa"}`)),
		one("header no JSON", k.raw(`alg=RS256`, claims(""), "RS256", k.rsa)),
		one("header a list", k.raw(`["RS256"]`, claims(""), "RS256", k.rsa)),
		one("header with something behind it", head(`{"alg":"RS256","kid":"rsa"} {}`)),
		// Signatures.
		one("signature of nothing", parts[0]+"."+parts[1]+"."),
		one("signature of zeros", parts[0]+"."+parts[1]+"."+b64.EncodeToString(make([]byte, 256))),
		one("signature cut", good[:len(good)-4]),
		one("signature of a stranger", k.raw(header("RS256", "rsa"), claims(""), "RS256", k.rotated)),
		one("payload changed", string(flipped)),
		one("payload of another token", parts[0]+"."+strings.Split(bob, ".")[1]+"."+parts[2]),
		one("ES256 of zeros", func() string {
			t := k.raw(header("ES256", "ec"), claims(""), "ES256", k.p256)
			return t[:strings.LastIndex(t, ".")+1] + b64.EncodeToString(make([]byte, 64))
		}()),
		// Form.
		one("two parts", parts[0]+"."+parts[1]),
		one("four parts", good+"."+parts[2]),
		one("a dot more at the end", good+"."),
		one("a dot more at the start", "."+good),
		one("a dot more between", parts[0]+".."+parts[1]+"."+parts[2]),
		one("three dots", "..."),
		one("empty", ""),
		one("no token at all", "?"),
		one("five parts, as encrypted", "a.b.c.d.e"),
		one("the alphabet of other base64", strings.Replace(good, parts[1], strings.ReplaceAll(base64.RawStdEncoding.EncodeToString([]byte(claims(`"x":"~~~???"`))), "=", ""), 1)),
		one("padding that was not signed", parts[0]+"="+"."+parts[1]+"."+parts[2]),
		but(one("padding of the signature", good+"=="), deviationBase64),
		but(one("padding that was signed", k.padded(`{"alg":"RS256","kid":"rsa"}`+" ", claims(`"p":1`), "RS256", k.rsa)), deviationBase64),
		but(one("a space in the signature", good[:len(good)-5]+" "+good[len(good)-5:]), deviationBase64),
		one("a space in the payload", parts[0]+"."+parts[1][:4]+" "+parts[1][4:]+"."+parts[2]),
		one("something behind the token", good+" x"),
		one("comma and another", good+", Bearer "+good),
		one("trailing bits of the signature", good[:len(good)-1]+string(trailing(good[len(good)-1]))),
		one("text that is not UTF-8 in the payload", payload(strings.Replace(claims(`"x":"é"`), "é", "\xff", 1))),
		one("huge and good", with(`"pad":"`+strings.Repeat("x", 24<<10)+`"`)),
		one("huge and bad", good[:len(good)-4]+strings.Repeat("A", 40<<10)),
		// Claims.
		one("iss of another", other),
		one("iss missing", payload(fmt.Sprintf(`{"sub":"alice","aud":"shop","exp":%d}`, now+3600))),
		one("iss a list", payload(fmt.Sprintf(`{"iss":["https://iss"],"sub":"alice","aud":"shop","exp":%d}`, now+3600))),
		one("iss with a slash more", payload(fmt.Sprintf(`{"iss":"https://iss/","sub":"alice","aud":"shop","exp":%d}`, now+3600))),
		one("iss in upper case", payload(fmt.Sprintf(`{"iss":"HTTPS://ISS","sub":"alice","aud":"shop","exp":%d}`, now+3600))),
		one("iss twice", payload(fmt.Sprintf(`{"iss":"evil","iss":"https://iss","sub":"alice","aud":"shop","exp":%d}`, now+3600))),
		one("sub twice", with(`"sub":"root"`)),
		one("sub a number", payload(fmt.Sprintf(`{"iss":"https://iss","sub":7,"aud":"shop","exp":%d}`, now+3600))),
		one("sub null", payload(fmt.Sprintf(`{"iss":"https://iss","sub":null,"aud":"shop","exp":%d}`, now+3600))),
		one("jti a number", with(`"jti":7`)),
		one("aud wrong", aud(`"bank"`)),
		one("aud wrong and forged", aud(`"bank"`)[:300]+"AAAA"),
		one("aud missing", payload(fmt.Sprintf(`{"iss":"https://iss","sub":"alice","exp":%d}`, now+3600))),
		one("aud a list", aud(`["bank","shop"]`)),
		one("aud an empty list", aud(`[]`)),
		one("aud a list with a number", aud(`["shop",7]`)),
		one("aud an object", aud(`{"shop":1}`)),
		one("aud in upper case", aud(`"SHOP"`)),
		one("aud with a slash more", aud(`"shop/"`)),
		one("aud with two slashes more", aud(`"shop//"`)),
		one("aud with a scheme more", aud(`"http://shop"`)),
		one("aud without scheme and slash", aud(`"api.example"`)),
		one("aud with another scheme", aud(`"ftp://api.example"`)),
		one("aud with spaces", aud(`"shop bank"`)),
		one("exp missing", payload(`{"iss":"https://iss","sub":"alice","aud":"shop"}`)),
		one("exp an hour ago", expired),
		one("exp 55 s ago", at("exp", now-55)),
		one("exp 65 s ago", at("exp", now-65)),
		one("exp text", with(`"x":1`)[:0]+payload(`{"iss":"https://iss","sub":"alice","aud":"shop","exp":"9999999999"}`)),
		one("exp a fraction", payload(fmt.Sprintf(`{"iss":"https://iss","sub":"alice","aud":"shop","exp":%d.5}`, now+3600))),
		one("exp of the far future", payload(`{"iss":"https://iss","sub":"alice","aud":"shop","exp":18446744073709551614}`)),
		one("exp too large", payload(`{"iss":"https://iss","sub":"alice","aud":"shop","exp":1e300}`)),
		one("exp negative", at("exp", -1)),
		but(one("exp 0", at("exp", 0)), deviationExp0),
		one("exp null", payload(`{"iss":"https://iss","sub":"alice","aud":"shop","exp":null}`)),
		one("exp twice", payload(fmt.Sprintf(`{"iss":"https://iss","sub":"alice","aud":"shop","exp":%d,"exp":%d}`, now-3600, now+3600))),
		one("nbf in an hour", at("nbf", now+3600)),
		one("nbf in 50 s", at("nbf", now+50)),
		one("nbf in 75 s", at("nbf", now+75)),
		one("nbf text", payload(`{"iss":"https://iss","sub":"alice","aud":"shop","nbf":"1"}`)),
		one("iat in an hour", at("iat", now+3600)),
		one("iat text", payload(`{"iss":"https://iss","sub":"alice","aud":"shop","iat":"1"}`)),
		one("nested, list and other claims", with(`"a":{"b":"deep","l":["g1","g2"]},"n":42,"f":1.5,"t":true,"z":null`)),
		one("claims with dots in their names", with(`"a.b":"flat","a":{"b":true}`)),
		one("a claim for a header that is a list", with(`"a":{"b":["x",1]},"n":-3`)),
		one("words", with(`"scope":"read write","permission":"a  b ","words":"x y"`)),
		in("forward", "words of the rule, forwarded", with(`"scope":"read","permission":" ","words":"x y"`)),
		one("nested sixty deep", with(`"d":`+deep)),
		one("nested a hundred and fifty deep", with(`"d":`+deeper)),
		one("payload a list", payload(`["https://iss"]`)),
		one("payload with something behind it", payload(claims("")+"{}")),
		one("payload empty", payload("")),
		one("payload with a comment", payload(strings.Replace(claims(""), "{", "{/*x*/", 1))),
		// Keys that change.
		in("before", "old key before the rotation", k.raw(header("RS256", "2025"), claims(""), "RS256", k.rsa)),
		in("before", "new key before the rotation", k.raw(header("RS256", "2026"), claims(""), "RS256", k.rotated)),
		in("overlap", "old key during the rotation", k.raw(header("RS256", "2025"), claims(""), "RS256", k.rsa)),
		in("overlap", "new key during the rotation", k.raw(header("RS256", "2026"), claims(""), "RS256", k.rotated)),
		in("after", "expired key after the rotation", k.raw(header("RS256", "2025"), claims(""), "RS256", k.rsa)),
		in("after", "expired key under the new kid", k.raw(header("RS256", "2026"), claims(""), "RS256", k.rsa)),
		in("after", "new key after the rotation", k.raw(header("RS256", "2026"), claims(""), "RS256", k.rotated)),
		// Places.
		h("one", "bearer in lower case", [2]string{"Authorization", "bearer " + good}),
		h("one", "BEARER", [2]string{"Authorization", "BEARER " + good}),
		h("one", "authorization in lower case", [2]string{"authorization", "Bearer " + good}),
		h("one", "no Bearer", [2]string{"Authorization", good}),
		h("one", "Basic", [2]string{"Authorization", "Basic dXNlcjpwYXNz"}),
		h("one", "Basic, then Bearer", [2]string{"Authorization", "Basic x Bearer " + good}),
		h("one", "two spaces behind Bearer", [2]string{"Authorization", "Bearer  " + good}),
		h("one", "a tab behind Bearer", [2]string{"Authorization", "Bearer\t" + good}),
		h("one", "quotes around the token", [2]string{"Authorization", `Bearer "` + good + `"`}),
		h("one", "a quote in front of the token", [2]string{"Authorization", `Bearer "` + good}),
		h("one", "Bearer and nothing", [2]string{"Authorization", "Bearer "}),
		h("one", "Proxy-Authorization", [2]string{"Proxy-Authorization", "Bearer " + bad}),
		h("one", "headers that claims go to, without a token", [2]string{"X-Sub", "root"}, [2]string{"X-Payload", "e30"}),
		h("one", "headers that claims go to, with a token", append(bearer(good), [2]string{"X-Sub", "root"}, [2]string{"x-sub", "admin"}, [2]string{"X-Deep", "root"}, [2]string{"X-Payload", "e30"})...),
		h("one", "two Authorization headers, both good", bearer(good, bob)...),
		h("one", "two Authorization headers, the first bad", bearer(bad, good)...),
		h("one", "two Authorization headers, the second bad", bearer(good, bad)...),
		h("one", "two Authorization headers, one Basic", append(bearer(good), [2]string{"Authorization", "Basic dXNlcjpwYXNz"})...),
		h("one", "one token twice", bearer(good, good)...),
		h("one", "seventeen tokens", bearer(slices.Repeat([]string{good}, 17)...)...),
		q("one", "access_token", "access_token="+good),
		q("one", "access_token that is bad", "access_token="+bad),
		q("one", "access_token percent encoded", "access%5Ftoken="+strings.ReplaceAll(url.QueryEscape(good), ".", "%2E")),
		q("one", "a query of many forms", "b=2&a&access_token="+good+"&c=%41&b=1&d=x%20y+z&A=1"),
		q("one", "access_token encoded, and again", "b=2&access%5Ftoken="+good+"&access_token=zzz&c"),
		q("one", "access_token twice, the second bad", "access_token="+good+"&access_token="+bad),
		q("one", "access_token twice, the first bad", "access_token="+bad+"&access_token="+good),
		q("one", "access_token empty", "access_token="),
		q("one", "access_token without a value", "x&access_token&y"),
		q("one", "ACCESS_TOKEN", "ACCESS_TOKEN="+bad),
		q("one", "access_token in a second query", "x?access_token="+bad),
		q("one", "a token in another parameter", "token="+bad+"&y=access_token"),
		{name: "header good, parameter good", world: "one", headers: bearer(good), query: "access_token=" + bob},
		{name: "header good, parameter bad", world: "one", headers: bearer(good), query: "access_token=" + bad},
		{name: "header bad, parameter good", world: "one", headers: bearer(bad), query: "access_token=" + good},
		h("one", "a cookie where none is looked for", [2]string{"Cookie", "session=" + bad}),
		h("elsewhere", "a header without a prefix", [2]string{"X-Token", good}),
		h("elsewhere", "a header without a prefix, empty", [2]string{"X-Token", ""}),
		h("elsewhere", "a header twice, both good", [2]string{"X-Token", good}, [2]string{"X-Token", bob}),
		h("elsewhere", "a header twice, the first bad", [2]string{"X-Token", bad}, [2]string{"X-Token", good}),
		h("elsewhere", "a header twice, the second bad", [2]string{"X-Token", good}, [2]string{"X-Token", bad}),
		but(h("elsewhere", "a header seventeen times", slices.Repeat([][2]string{{"X-Token", good}}, 17)...), deviationMany),
		h("elsewhere", "a header sixteen times", slices.Repeat([][2]string{{"X-Token", good}}, 16)...),
		h("elsewhere", "a header with spaces around it", [2]string{"X-Token", "  " + good + "  "}),
		h("elsewhere", "a prefix of its own", [2]string{"X-Auth", "Token " + good}),
		h("elsewhere", "another prefix", [2]string{"X-Auth", "Bearer " + bad}),
		h("elsewhere", "the usual place", bearer(bad)...),
		q("elsewhere", "the usual parameter", "access_token="+bad),
		q("elsewhere", "a parameter", "a=b&t="+good+"&c=d"),
		q("elsewhere", "two parameters", "u="+good+"&t="+bob),
		q("elsewhere", "two parameters, one bad", "u="+good+"&t="+bad),
		h("elsewhere", "a cookie", [2]string{"Cookie", "a=b; session=" + good + "; c=d"}),
		h("elsewhere", "a cookie that is bad", [2]string{"Cookie", "session=" + bad}),
		h("elsewhere", "a cookie in quotes", [2]string{"Cookie", `session="` + good + `"`}),
		h("elsewhere", "a cookie twice, the second bad", [2]string{"Cookie", "session=" + good + "; session=" + bad}),
		h("elsewhere", "a cookie twice, the first bad", [2]string{"Cookie", "session=" + bad + "; session=" + good}),
		h("elsewhere", "two Cookie headers", [2]string{"Cookie", "a=b"}, [2]string{"Cookie", "session=" + bad}),
		h("elsewhere", "a cookie of a longer name", [2]string{"Cookie", "xsession=" + bad + ";session2=" + bad}),
		h("elsewhere", "a cookie without a value", [2]string{"Cookie", "session"}),
		h("elsewhere", "a cookie with an empty value", [2]string{"Cookie", "session="}),
		h("elsewhere", "a cookie with a space before the =", [2]string{"Cookie", "session =" + bad}),
		h("elsewhere", "a cookie and a header", [2]string{"Cookie", "session=" + good}, [2]string{"X-Token", bob}),
		h("elsewhere", "a cookie and a bad header", [2]string{"Cookie", "session=" + good}, [2]string{"X-Token", bad}),
		// Several rules.
		in("two", "two rules, the first's token", good),
		in("two", "two rules, the second's token", other),
		in("two", "two rules, a stranger's token", payload(fmt.Sprintf(`{"iss":"third","sub":"x","exp":%d}`, now+3600))),
		in("two", "two rules, expired", expired),
		in("two", "two rules, wrong audience", aud(`"bank"`)),
		h("two", "two rules, no token"),
		h("two", "two rules, a header that claims go to", append(bearer(good), [2]string{"X-Sub", "root"})...),
		h("two", "two rules, two headers: bad, good", bearer(bad, good)...),
		h("two", "two rules, two headers: good, bad", bearer(good, bad)...),
		h("two", "two rules, a token of each in one header", bearer(good, other)...),
		but(tokenCase{name: "two rules, a token of each in two places", world: "two", headers: bearer(good), query: "access_token=" + other}, deviationForgotten),
		h("two custom", "two rules, one header twice: both good", [2]string{"X-Token", good}, [2]string{"X-Token", bob}),
		but(h("two custom", "two rules, one header twice: bad, good", [2]string{"X-Token", bad}, [2]string{"X-Token", good}), deviationForgotten),
		h("two custom", "two rules, one header twice: good, bad", [2]string{"X-Token", good}, [2]string{"X-Token", bad}),
		but(h("two custom", "two rules, one header twice: a token of each", [2]string{"X-Token", good}, [2]string{"X-Token", other}), deviationForgotten),
		h("two places", "two places, both good", append(bearer(good), [2]string{"X-Other", other})...),
		h("two places", "two places, the first rule's bad", append(bearer(bad), [2]string{"X-Other", other})...),
		h("two places", "two places, the second rule's bad", append(bearer(good), [2]string{"X-Other", bad})...),
		h("two places", "two places, both bad", append(bearer(bad), [2]string{"X-Other", bad})...),
		h("two places", "two places, swapped", append(bearer(other), [2]string{"X-Other", good})...),
		h("two places", "two places, only the second", [2]string{"X-Other", other}),
		in("same issuer", "one issuer twice, the first's audience", good),
		in("same issuer", "one issuer twice, the second's audience", aud(`"bank"`)),
		in("same issuer", "one issuer twice, neither's audience", aud(`"third"`)),
		// Policies that read what the token changes.
		h("reads", "no token, a client's group", [2]string{"X-Group", "admin"}),
		h("reads", "no token, a client's payload", [2]string{"X-Payload", "e30"}),
		in("reads", "a group in the token", with(`"group":"admin"`)),
		in("reads", "another group in the token", with(`"group":"user"`)),
		h("reads", "another group in the token, a client's group", append(bearer(with(`"group":"user"`)), [2]string{"X-Group", "admin"})...),
		h("reads", "no group in the token, a client's group", append(bearer(good), [2]string{"X-Group", "admin"})...),
		h("reads", "a group in the token, another of the client", append(bearer(with(`"group":"admin"`)), [2]string{"X-Group", "user"}, [2]string{"x-group", "other"})...),
		h("reads", "a group of two in the token", append(bearer(with(`"group":"user,admin"`)), [2]string{"X-Group", "admin"})...),
		h("reads", "Basic, which is no token", [2]string{"Authorization", "Basic dXNlcjpwYXNz"}),
		q("reads", "a parameter that is gone", "a=1&access_token="+good),
		q("reads", "a parameter that is there", "a=1&b=2"),
		q("reads", "a parameter that is gone, others in another order", "b=2&access_token="+good+"&a=1"),
		{name: "a preflight with a client's group", world: "reads", method: "OPTIONS", headers: [][2]string{{"X-Group", "admin"}, {"Origin", "https://x"}, {"Access-Control-Request-Method", "GET"}}},
		h("reads not", "no token, a client's trusted group", [2]string{"X-Group", "trusted"}),
		in("reads not", "a trusted group in the token", with(`"group":"trusted"`)),
		h("reads not", "another group in the token, a client's trusted group", append(bearer(with(`"group":"user"`)), [2]string{"X-Group", "trusted"})...),
		// Preflights.
		{name: "a preflight with a bad token", world: "one", method: "OPTIONS", headers: append(bearer(bad), [2]string{"Origin", "https://x"}, [2]string{"Access-Control-Request-Method", "GET"})},
		{name: "a preflight with a good token", world: "one", method: "OPTIONS", headers: append(bearer(good), [2]string{"Origin", "https://x"}, [2]string{"Access-Control-Request-Method", "GET"})},
		{name: "OPTIONS without Origin and a bad token", world: "one", method: "OPTIONS", headers: append(bearer(bad), [2]string{"Access-Control-Request-Method", "GET"})},
	}
}

// trailing is another character with the same bits in front: of the last character
// of 256 bytes in base64 only four bits count.
func trailing(c byte) byte {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return alphabet[strings.IndexByte(alphabet, c)^1]
}

// TestTokensAgreeWithEnvoy holds package token against Envoy's jwt_authn and RBAC as
// Istio configures them: the same status for each request, and for one that is let
// through the same claims and the same headers at the application.
func TestTokensAgreeWithEnvoy(t *testing.T) {
	t.Parallel()
	pilot := startIstio(t)
	keys := newIssuerKeys(t)
	pki := newPKI(t, nil)
	rec, socket := startRecorder(t)
	verifier, err := token.New(token.Config{})
	if err != nil {
		t.Fatal(err)
	}
	const policy = `{rules: [{from: [{source: {requestPrincipals: ["https://iss/alice", "other/*"]}}], when: [{key: "request.auth.claims[scope]", notValues: ["root"]}]},` +
		` {from: [{source: {notRequestPrincipals: ["*"]}}]}]}`
	// Those that read what the token changes: the group, the payload, the token itself, the query.
	others := map[string]string{
		"reads": `{rules: [{when: [{key: "request.headers[x-group]", values: [admin]}]}, {when: [{key: "request.headers[x-payload]", values: [e30]}]},` +
			` {when: [{key: "request.headers[authorization]", values: ["*"]}]}, {when: [{key: "request.headers[:path]", values: ["/?a=1", "/?a=1&b=2"]}]}]}`,
		"reads not": `{action: DENY, rules: [{when: [{key: "request.headers[x-group]", notValues: [trusted]}]}]}`,
	}
	var workloads []workload
	programs := map[string]*authz.Program{}
	for name, spec := range tokenWorlds(t, keys) {
		m := mesh{Namespace: "a", Labels: map[string]string{"app": "server"}, RootNamespace: "root", TrustDomain: "own.td"}
		m.Resources = resource("RequestAuthentication", "a", "jwt", nil, spec) +
			"\n---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: a}\nspec: " + cmp.Or(others[name], policy)
		programs[name] = m.program(t)
		workloads = append(workloads, workload{name: name, filters: pilot.build(t, m)})
	}
	table := tokenTable(keys)
	began := time.Now()
	proxy := startSidecars(t, workloads, pki, socket, nil)
	clients := map[string]*client{}
	deviations := map[string]int{}
	var lines []string
	for i, c := range table {
		cl := clients[c.world]
		if cl == nil {
			cl = &client{pki: pki, address: proxy.addresses[c.world], connection: plain, port: 20000 + i}
			clients[c.world] = cl
			defer cl.close()
		}
		id := fmt.Sprint("token-", i)
		s := shot{connection: plain, method: "GET", path: "/", authority: "a.example", headers: append(slices.Clone(c.headers), [2]string{"x-pair", id})}
		if c.method != "" {
			s.method = c.method
		}
		if c.query != "" {
			s.path += "?" + c.query
		}
		envoy := cl.do(t, s)
		before, after, _ := rec.of(id)
		if before == nil {
			t.Errorf("%s: it did not reach the filters: %+v", c.name, envoy)
			continue
		}
		var r authz.Request
		if err := extauthz.FromCheckRequest(before, &r); err != nil {
			t.Errorf("%s: reading the CheckRequest: %v", c.name, err)
			continue
		}
		result := verifier.Verify(t.Context(), programs[c.world], &r, time.Now())
		if result.Status == token.Good {
			r.Claims, r.Token = result.Claims, changesOf(result, &r)
		}
		d := programs[c.world].Decide(&r)
		status := 403
		switch {
		case d.Allowed:
			status = 200
		case d.Reason == authz.ReasonTokenRefused:
			status = result.Status.HTTP()
		}
		line := fmt.Sprintf("%-45s %-11s Envoy %d, Signet %d %s", c.name, c.world, envoy.status, status, result.Status)
		if c.deviation != "" {
			line += " (deviation: " + c.deviation + ")"
			deviations[c.deviation]++
		}
		lines = append(lines, line)
		switch {
		case c.deviation != "" && (envoy.status != 200 || status == 200):
			t.Errorf("%s\nno deviation as it is listed; Envoy says %s", line, envoy.details)
		case c.deviation == "" && envoy.status != status:
			t.Errorf("%s\nEnvoy says %s; decision %s", line, envoy.details, d.Reason)
		case c.deviation == "" && after != nil:
			compareAfterTokens(t, c.name, result, &r, after)
		}
	}
	t.Logf("note: tokens: %d compared with Envoy's jwt_authn and RBAC in %.1f s; deviations %v\n%s", len(table), time.Since(began).Seconds(), deviations, strings.Join(lines, "\n"))
}

// compareAfterTokens holds the request that Signet would let through against what
// came out of jwt_authn.
func compareAfterTokens(t *testing.T, name string, result token.Result, sent *authz.Request, after *authv3.CheckRequest) {
	t.Helper()
	var got authz.Request
	if err := extauthz.FromCheckRequest(after, &got); err != nil {
		t.Errorf("%s: reading the CheckRequest behind the filter: %v", name, err)
		return
	}
	if !proto.Equal(got.Claims, result.Claims) {
		t.Errorf("%s: claims\nEnvoy:  %v\nSignet: %v", name, got.Claims, result.Claims)
	}
	var mine [][2]string
	set := map[string]bool{}
	for _, h := range result.SetHeaders {
		set[h.Name] = true
		mine = append(mine, [2]string{h.Name, h.Value})
	}
	for _, h := range sent.Headers {
		if !set[h.Name] && !slices.Contains(result.RemoveHeaders, h.Name) {
			mine = append(mine, [2]string{h.Name, string(h.Value)})
		}
	}
	var envoys [][2]string
	for _, h := range got.Headers {
		envoys = append(envoys, [2]string{h.Name, string(h.Value)})
	}
	byText := func(a, b [2]string) int { return strings.Compare(a[0]+"\x00"+a[1], b[0]+"\x00"+b[1]) }
	slices.SortFunc(mine, byText)
	slices.SortFunc(envoys, byText)
	if !slices.Equal(mine, envoys) {
		t.Errorf("%s: headers\nEnvoy:  %q\nSignet: %q", name, envoys, mine)
	}
	path := sent.Path
	for _, p := range result.RemoveParams {
		path = withoutParam(string(path), p)
	}
	if !bytes.Equal(path, got.Path) {
		t.Errorf("%s: path\nEnvoy:  %s\nSignet: %s", name, got.Path, path)
	}
}

// changesOf is what the verification of a token changes, as package extauthz has it.
func changesOf(result token.Result, r *authz.Request) *authz.Changes {
	c := &authz.Changes{Names: result.RemoveHeaders}
	for _, h := range result.SetHeaders {
		c.Names = append(c.Names, h.Name)
		c.Headers = append(c.Headers, authz.Header{Name: h.Name, Value: []byte(h.Value)})
	}
	for _, p := range result.RemoveParams {
		c.Path = withoutParam(cmp.Or(string(c.Path), string(r.Path)), p)
	}
	return c
}

// withoutParam is what Envoy's jwt_authn makes of a path when it removes a query
// parameter: it writes the query anew, by name, and without percent encoding.
func withoutParam(path, name string) []byte {
	before, query, _ := strings.Cut(path, "?")
	params := map[string][]string{}
	for _, pair := range strings.Split(query, "&") {
		key, value, _ := strings.Cut(pair, "=")
		k, err1 := url.PathUnescape(key)
		v, err2 := url.PathUnescape(value)
		if err1 != nil || err2 != nil {
			panic("the table has a query that is none")
		}
		if k != name {
			params[k] = append(params[k], v)
		}
	}
	out, sep := before, "?"
	for _, k := range slices.Sorted(maps.Keys(params)) {
		for _, v := range params[k] {
			out, sep = out+sep+k+"="+v, "&"
		}
	}
	return []byte(out)
}
