package attest

import (
	"context"
	"encoding/base64"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"
)

// algorithms are those that the API server signs with and that every verifier
// has; neither none nor a symmetric one can be added by configuration.
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.ES256}

// maxKeyID is what KEP-740 allows an external signer of the API server.
const maxKeyID = 1024

// maxNumericDate is the last second of the year 9999. Beyond it lies nothing but
// overflow.
const maxNumericDate = 253402300799

// proof is what a token proved, and with which key. It holds no part of the
// token that could be used again.
type proof struct {
	kid     string
	key     Key
	expires time.Time

	namespace, serviceAccount string
	serviceAccountKey         string // NAMESPACE/NAME, as in the allow-list
	serviceAccountUID         string // may be empty
	pod, podUID               string
	node, nodeUID             string // nodeUID may be empty
}

// claims is what is read of a token's claims; Kubernetes' own are in
// k8s.io/kubernetes/pkg/serviceaccount/claims.go.
type claims struct {
	Issuer     string           `json:"iss"`
	Subject    string           `json:"sub"`
	Audience   jwt.Audience     `json:"aud"`
	Expires    *numericDate     `json:"exp"`
	NotBefore  *numericDate     `json:"nbf"`
	IssuedAt   *numericDate     `json:"iat"`
	Kubernetes *kubernetesClaim `json:"kubernetes.io"`
}

type kubernetesClaim struct {
	Namespace      string     `json:"namespace"`
	ServiceAccount objectRef  `json:"serviceaccount"`
	Pod            *objectRef `json:"pod"`
	Node           *objectRef `json:"node"`
	// WarnAfter is when an extended token would have expired.
	WarnAfter *numericDate `json:"warnafter"`
}

type objectRef struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// numericDate is seconds since 1970 (RFC 7519 section 2), without the fraction.
type numericDate int64

func (n *numericDate) UnmarshalJSON(b []byte) error {
	f, err := strconv.ParseFloat(string(b), 64)
	if err != nil || math.IsNaN(f) || f < 0 || f > maxNumericDate {
		return fmt.Errorf("%s is not a date in seconds since 1970", quoted(b))
	}
	*n = numericDate(f)
	return nil
}

func (n numericDate) time() time.Time { return time.Unix(int64(n), 0) }

// verify checks everything that can be said of a token without knowing the pods.
func (a *Attestor) verify(ctx context.Context, token string, now time.Time) (*proof, error) {
	if err := checkCompact(token); err != nil {
		return nil, err
	}
	header, _, _ := strings.Cut(token, ".")
	alg, kid, err := parseHeader(header)
	if err != nil {
		return nil, err
	}
	key, ok, err := a.cfg.Keys.Key(ctx, kid)
	if err != nil {
		return nil, &refusal{kind: ErrUnavailable, check: checkUnavailable, detail: "looking for the issuer's key " + quoted(kid).String(), cause: err}
	}
	if !ok {
		return nil, refuse(checkKey, "the issuer has no key with ID %s", quoted(kid))
	}
	if want, err := algorithmFor(key.Public); err != nil {
		return nil, refuse(checkKey, "key %s: %v", quoted(kid), err)
	} else if alg != want || key.Algorithm != want {
		return nil, refuse(checkAlgorithm, "the token says %s, key %s is for %s", alg, quoted(kid), want)
	}
	// The segments were checked to be canonical, so what go-jose decodes here
	// is what was looked at, and not another spelling of it.
	jws, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		return nil, refuse(checkMalformed, "not a compact JWS")
	}
	payload, err := jws.Verify(key.Public)
	if err != nil {
		return nil, refuse(checkSignature, "does not verify with key %s", quoted(kid))
	}
	c, err := parseClaims(payload)
	if err != nil {
		return nil, err
	}
	if k := c.Kubernetes; a.cfg.Extended && k != nil && k.WarnAfter != nil && c.Expires != nil {
		*c.Expires = min(*c.Expires, *k.WarnAfter)
	}
	if err := a.checkClaims(c, now); err != nil {
		return nil, err
	}
	p, err := bind(c, a.cfg.RequireNodeUID)
	if err != nil {
		return nil, err
	}
	p.kid, p.key = kid, key
	p.expires = c.Expires.time()
	return p, nil
}

// checkCompact refuses everything but three segments of canonical base64url.
// Decoders, Go's among them, skip line breaks and ignore the unused bits of the
// last character: then one token would have many spellings.
func checkCompact(token string) error {
	segments := 0
	for segment := range strings.SplitSeq(token, ".") {
		if segments++; segments > 3 {
			break
		}
		if segment == "" {
			return refuse(checkMalformed, "segment %d is empty", segments)
		}
		if strings.ContainsAny(segment, "\r\n") {
			return refuse(checkMalformed, "segment %d has a line break", segments)
		}
		if _, err := base64.RawURLEncoding.Strict().DecodeString(segment); err != nil {
			return refuse(checkMalformed, "segment %d is not canonical base64url", segments)
		}
	}
	if segments != 3 {
		return refuse(checkMalformed, "not three segments with dots between them")
	}
	return nil
}

// parseHeader takes a header of exactly alg and kid, and typ if it is JWT. The API
// server writes no other (KEP-740 forbids it to external signers, too), and each
// other one (jwk, jku, x5c, x5u, crit, b64, zip) has been a way around verifiers.
func parseHeader(segment string) (alg, kid string, err error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(segment)
	if err != nil {
		return "", "", refuse(checkMalformed, "header is not base64url")
	}
	if !utf8.Valid(b) {
		return "", "", refuse(checkHeader, "not UTF-8")
	}
	var fields map[string]any
	// go-jose's decoder refuses duplicate names.
	if err := json.Unmarshal(b, &fields); err != nil {
		return "", "", refuse(checkHeader, "not a JSON object without duplicate names")
	}
	for name, value := range fields {
		s, isString := value.(string)
		switch {
		case name == "alg" && isString:
			alg = s
		case name == "kid" && isString:
			kid = s
		case name == "typ" && isString && s == "JWT":
		default:
			return "", "", refuse(checkHeader, "%s is not allowed, or not with this value", quoted(name))
		}
	}
	if !slices.Contains(algorithms, jose.SignatureAlgorithm(alg)) {
		return "", "", refuse(checkAlgorithm, "%s is not one of %v", quoted(alg), algorithms)
	}
	if kid == "" || len(kid) > maxKeyID {
		return "", "", refuse(checkKey, "key ID of %d bytes; it must have 1 to %d", len(kid), maxKeyID)
	}
	return alg, kid, nil
}

func parseClaims(payload []byte) (*claims, error) {
	if !utf8.Valid(payload) {
		return nil, refuse(checkMalformed, "claims are not UTF-8")
	}
	// Decoded twice: into a map, because only there duplicate names are found at
	// every depth, and into the fields that are used.
	var all map[string]any
	if err := json.Unmarshal(payload, &all); err != nil {
		return nil, refuse(checkMalformed, "claims: not a JSON object without duplicate names")
	}
	var c claims
	if err := json.Unmarshal(payload, &c); err != nil {
		return nil, refuse(checkMalformed, "claims: %s", quoted(err.Error()))
	}
	return &c, nil
}

// checkClaims checks the claims of RFC 7519: whose token, for whom, and when.
func (a *Attestor) checkClaims(c *claims, now time.Time) error {
	issuer, err := a.issuer()
	if err != nil {
		return err
	}
	if c.Issuer != issuer {
		if c.Issuer == legacyIssuer {
			return refuse(checkIssuer, "a legacy token, bound to no pod; project one with an audience")
		}
		return refuse(checkIssuer, "%s is not %q", quoted(c.Issuer), issuer)
	}
	if len(c.Audience) != 1 || c.Audience[0] != a.cfg.Audience {
		return refuse(checkAudience, "%s is not exactly %q", quoted(strings.Join(c.Audience, ", ")), a.cfg.Audience)
	}
	if c.Expires == nil || c.IssuedAt == nil {
		return refuse(checkLifetime, "exp and iat are required")
	}
	exp, iat := c.Expires.time(), c.IssuedAt.time()
	if !now.Before(exp) {
		return refuse(checkExpired, "since %s", exp.UTC().Format(time.RFC3339))
	}
	latest := now.Add(a.cfg.Skew)
	if iat.After(latest) {
		return refuse(checkEarly, "issued at %s, which is in the future", iat.UTC().Format(time.RFC3339))
	}
	if c.NotBefore != nil && c.NotBefore.time().After(latest) {
		return refuse(checkEarly, "not before %s", c.NotBefore.time().UTC().Format(time.RFC3339))
	}
	if life := exp.Sub(iat); life <= 0 || life > a.cfg.MaxLifetime {
		return refuse(checkLifetime, "%s; more than zero and at most %s are accepted: ask for shorter tokens, with an audience of their own", life, a.cfg.MaxLifetime)
	}
	return nil
}

// bind checks Kubernetes' claims: which service account, pod and node.
func bind(c *claims, needNodeUID bool) (*proof, error) {
	// Exactly four parts, as the API server splits it: neither names of
	// namespaces nor of service accounts contain a colon.
	part := strings.Split(c.Subject, ":")
	if len(part) != 4 || part[0] != "system" || part[1] != "serviceaccount" || part[2] == "" || part[3] == "" {
		return nil, refuse(checkSubject, "%s is not system:serviceaccount:NAMESPACE:NAME", quoted(c.Subject))
	}
	k := c.Kubernetes
	if k == nil {
		return nil, refuse(checkBinding, "no claim kubernetes.io")
	}
	if k.Namespace != part[2] || k.ServiceAccount.Name != part[3] {
		return nil, refuse(checkSubject, "%s contradicts kubernetes.io, namespace %s and service account %s",
			quoted(c.Subject), quoted(k.Namespace), quoted(k.ServiceAccount.Name))
	}
	if k.Pod == nil || k.Pod.Name == "" || k.Pod.UID == "" {
		return nil, refuse(checkBinding, "not bound to a pod by name and UID")
	}
	if k.Node == nil || k.Node.Name == "" {
		return nil, refuse(checkBinding, "names no node")
	}
	if needNodeUID && k.Node.UID == "" {
		return nil, refuse(checkBinding, "names node %s without its UID", quoted(k.Node.Name))
	}
	return &proof{
		namespace:         k.Namespace,
		serviceAccount:    k.ServiceAccount.Name,
		serviceAccountKey: k.Namespace + "/" + k.ServiceAccount.Name,
		serviceAccountUID: k.ServiceAccount.UID,
		pod:               k.Pod.Name,
		podUID:            k.Pod.UID,
		node:              k.Node.Name,
		nodeUID:           k.Node.UID,
	}, nil
}
