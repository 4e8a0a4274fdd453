package token

import (
	"bytes"
	"encoding/base64"
	"math"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"
)

// algorithms are those that are accepted, Envoy's without HMAC.
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
}

// maxDepth is how deep claims may be nested; Envoy's parser stops there.
const maxDepth = 100

// parsed is a token that was read and not verified.
type parsed struct {
	jws     *jose.JSONWebSignature
	kid     string
	alg     string
	payload string // as it stands in the token
	claims  *structpb.Struct
	normal  *structpb.Struct // the claims as policies see them; set once it is verified
	issuer  string
	// nbf and exp are Unix seconds; hasExp says that there is one.
	nbf, exp uint64
	hasExp   bool
	weight   int64 // what it takes in memory, once it is remembered
}

// weigh is about what a token takes in memory, in bytes.
func (t *parsed) weigh() int64 {
	// Texts and names of claims together are no longer than the payload, of which there
	// is a copy; words of a list that normalized makes are counted there.
	const each, value = 500, 150
	n := countValues(t.claims)
	if t.normal != t.claims {
		n += countValues(t.normal)
	}
	return int64(each + 2*len(t.payload) + n*value)
}

// countValues is how many values there are in claims, which maxDepth bounds.
func countValues(s *structpb.Struct) (n int) {
	var count func(v *structpb.Value)
	count = func(v *structpb.Value) {
		n++
		switch k := v.GetKind().(type) {
		case *structpb.Value_StructValue:
			for _, e := range k.StructValue.GetFields() {
				count(e)
			}
		case *structpb.Value_ListValue:
			for _, e := range k.ListValue.GetValues() {
				count(e)
			}
		}
	}
	for _, v := range s.GetFields() {
		count(v)
	}
	return n
}

// parse reads a token. The status is Good, or why it cannot be read.
func parse(text []byte) (*parsed, Status) {
	if len(text) > MaxSize {
		return nil, Malformed
	}
	// As in Envoy empty parts do not count: the token is three that are not.
	var part [3][]byte
	n := 0
	for p := range bytes.SplitSeq(text, []byte(".")) {
		if len(p) == 0 {
			continue
		}
		if n == len(part) {
			return nil, Malformed
		}
		part[n] = p
		n++
	}
	if n != len(part) {
		return nil, Malformed
	}
	compact := string(bytes.Join(part[:], []byte(".")))
	// What is not base64url without padding is no token (RFC 7515 section 2); a
	// decoder that skips line ends would take two texts for one.
	if strings.ContainsAny(compact, "\r\n") {
		return nil, Malformed
	}
	jws, err := jose.ParseSignedCompact(compact, algorithms)
	if err != nil {
		if _, other := err.(*jose.ErrUnexpectedSignatureAlgorithm); other {
			return nil, Algorithm
		}
		return nil, Malformed
	}
	t := &parsed{jws: jws, payload: string(part[1]), claims: &structpb.Struct{}}
	if status := t.header(part[0]); status != Good {
		return nil, status
	}
	if object(jws.UnsafePayloadWithoutVerification(), t.claims) != nil {
		return nil, Malformed
	}
	return t, t.registered()
}

// object reads JSON as Envoy does: a name that is there twice is an error.
func object(text []byte, into *structpb.Struct) error {
	return protojson.UnmarshalOptions{RecursionLimit: maxDepth}.Unmarshal(text, into)
}

// header reads what the header says about key and algorithm.
func (t *parsed) header(encoded []byte) Status {
	text, err := base64.RawURLEncoding.AppendDecode(nil, encoded)
	if err != nil {
		return Malformed
	}
	var header structpb.Struct
	if object(text, &header) != nil {
		return Malformed
	}
	// RFC 7515 section 4.1.11: who does not understand what is critical must refuse
	// it. Envoy does not look. RFC 7797 section 7: no b64 in a JWT.
	for _, demand := range []string{"crit", "b64"} {
		if header.GetFields()[demand] != nil {
			return Algorithm
		}
	}
	var ok bool
	if t.kid, ok = optional(&header, "kid"); !ok {
		return Malformed
	}
	if t.alg, ok = optional(&header, "alg"); !ok || t.alg == "" {
		return Algorithm
	}
	return Good
}

// optional is a field that is text or absent.
func optional(s *structpb.Struct, name string) (text string, ok bool) {
	v, there := s.GetFields()[name]
	if !there {
		return "", true
	}
	k, ok := v.GetKind().(*structpb.Value_StringValue)
	if !ok {
		return "", false
	}
	return k.StringValue, true
}

// registered reads the claims that RFC 7519 section 4.1 registers.
func (t *parsed) registered() Status {
	var ok bool
	if t.issuer, ok = optional(t.claims, "iss"); !ok {
		return Malformed
	}
	for _, name := range []string{"sub", "jti"} {
		if _, ok := optional(t.claims, name); !ok {
			return Malformed
		}
	}
	for _, f := range []struct {
		name string
		to   *uint64
		has  *bool
	}{{"iat", new(uint64), new(bool)}, {"nbf", &t.nbf, new(bool)}, {"exp", &t.exp, &t.hasExp}} {
		v, there := t.claims.GetFields()[f.name]
		if !there {
			continue
		}
		k, ok := v.GetKind().(*structpb.Value_NumberValue)
		// The negation also refuses what is no number.
		if !ok || !(k.NumberValue >= 0 && k.NumberValue < math.MaxUint64) {
			return Malformed
		}
		*f.to, *f.has = uint64(k.NumberValue), true
	}
	switch aud := t.claims.GetFields()["aud"]; k := aud.GetKind().(type) {
	case *structpb.Value_StringValue:
	case *structpb.Value_ListValue:
		for _, e := range k.ListValue.GetValues() {
			if _, ok := e.GetKind().(*structpb.Value_StringValue); !ok {
				return Malformed
			}
		}
	default:
		if aud != nil {
			return Malformed
		}
	}
	return Good
}

// valid says whether it is the token's time. Seconds are compared as Envoy does.
func (t *parsed) valid(now uint64) Status {
	const skew = uint64(Skew / time.Second)
	if now+skew < t.nbf {
		return Future
	}
	if t.hasExp && now > skew && now-skew > t.exp {
		return Expired
	}
	return Good
}
