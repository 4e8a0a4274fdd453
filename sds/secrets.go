package sds

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
	"weak"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-mesh/signet/identity"
)

// SecretType is the type URL of Envoy's secrets.
const SecretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// The names that Istio's and SPIRE's users have in their proxies' configuration.
const (
	defaultName = "default"
	rootName    = "ROOTCA"
)

// SVIDs is who has the SVIDs; holder.Holder is.
type SVIDs interface {
	// SVID is the current SVID of a proven caller, nil while there is none, and a
	// channel that is closed when another call would answer differently. It does
	// not wait. The SVID is not changed after it was returned, and a call that
	// would answer the same returns the same pointer.
	SVID(caller identity.Caller) (svid *x509svid.SVID, changed <-chan struct{}, err error)
}

// SecretsConfig is what [Secrets] needs. All but Metrics is required.
type SecretsConfig struct {
	// TrustDomain is the own trust domain.
	TrustDomain spiffeid.TrustDomain
	// SVIDs has the callers' SVIDs.
	SVIDs SVIDs
	// Trust is the current trust, nil while there is none, and a channel that is
	// closed when it is another; nil means never.
	Trust func() (trust *identity.Trust, changed <-chan struct{})
	// CRL puts the trust's certificate revocation lists into the bundle, so that proxies
	// refuse what was revoked.
	CRL bool
	// Metrics registers the metrics of Secrets. Nil means that they are kept but
	// registered nowhere.
	Metrics prometheus.Registerer
}

// Secrets is a [Source] of Envoy secrets. A caller gets
//
//	default                      its own SVID: certificate chain and private key
//	spiffe://TD/ns/…/sa/…        the same, if the SPIFFE ID is the caller's own
//	ROOTCA                       the trust bundle of the own trust domain
//	spiffe://TD                  the same
//
// under the name that it asked for, and nothing else; [Wildcard] gives default and
// ROOTCA. These are the names of Istio's agent and of SPIRE's.
//
// The bundle is a plain trusted_ca, as Istio's is: it says which authority to
// believe and nothing of which peer to talk to. Agents and authorities have
// certificates of the same root, so a proxy must restrict its peers by
// match_typed_subject_alt_names, in a combined_validation_context.
//
// With CRL the bundle also has the revocation lists, of the authorities that issue, and
// says that no more than the leaf is checked against them. A list that has expired is
// left in: proxies refuse every peer then, as they do when the SVIDs have expired, which
// is before. Where there is no list there is nothing to check, and
// signet_sds_crl_next_update_seconds is 0.
//
// Secrets is safe for concurrent use. It keeps the encoded form of an SVID, which
// holds the private key, exactly as long as the SVID itself is reachable.
type Secrets struct {
	td      spiffeid.TrustDomain
	svids   SVIDs
	trust   func() (*identity.Trust, <-chan struct{})
	crl     bool
	refused prometheus.Counter

	mu sync.Mutex
	// encoded has no reference to the SVIDs themselves: when one is dropped by who
	// has it, its entry goes too. Guarded by mu.
	encoded map[weak.Pointer[x509svid.SVID]]*encodedSVID
	bundle  encodedBundle // of the newest trust that was asked for; guarded by mu
}

// encodedSVID is an SVID as Envoy takes it, by the name under which it is sent.
type encodedSVID struct {
	mu      sync.Mutex
	version string
	body    map[string]*anypb.Any // guarded by mu
}

type encodedBundle struct {
	trust   *identity.Trust
	version string
	body    map[string]*anypb.Any
}

// NewSecrets checks cfg and makes a Secrets.
func NewSecrets(cfg SecretsConfig) (*Secrets, error) {
	switch {
	case cfg.TrustDomain.IsZero():
		return nil, errors.New("secrets: no trust domain configured")
	case cfg.SVIDs == nil:
		return nil, errors.New("secrets: no SVIDs configured")
	case cfg.Trust == nil:
		return nil, errors.New("secrets: no trust configured")
	}
	s := &Secrets{
		td:    cfg.TrustDomain,
		svids: cfg.SVIDs,
		trust: cfg.Trust,
		crl:   cfg.CRL,
		refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_sds_refused_identities_total",
			Help: "Times that a caller asked for a SPIFFE ID that is not its own."}),
		encoded: map[weak.Pointer[x509svid.SVID]]*encodedSVID{},
	}
	nextUpdate := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "signet_sds_crl_next_update_seconds",
		Help: "When the first of the CRLs that proxies check expires, Unix seconds; 0 if they check none."}, s.nextUpdate)
	if err := register(cfg.Metrics, s.refused, nextUpdate); err != nil {
		return nil, fmt.Errorf("registering metrics of secrets: %w", err)
	}
	return s, nil
}

// Resources implements [Source]. It has nothing of another type than [SecretType].
// Asking for an SVID makes the SVIDs want it; asking for the bundle does not.
func (s *Secrets) Resources(ctx context.Context, caller identity.Workload, typeURL string, names []string) (rs []Resource, changed <-chan struct{}, err error) {
	if typeURL != SecretType {
		return nil, nil, nil
	}
	id, idErr := caller.ID(s.td)
	var own, bundles []string
	for _, n := range names {
		switch {
		case n == Wildcard:
			own, bundles = append(own, defaultName), append(bundles, rootName)
		case n == defaultName, idErr == nil && n == id.String():
			own = append(own, n)
		case n == rootName, n == s.td.IDString():
			bundles = append(bundles, n)
		case strings.HasPrefix(n, "spiffe://"):
			s.refused.Inc()
		}
	}
	own, bundles = unique(own), unique(bundles)
	var svidChanged, trustChanged <-chan struct{}
	if len(own) > 0 {
		var got []Resource
		if idErr != nil {
			err = fmt.Errorf("naming the SVID of pod %s: %w", caller.PodUID, idErr)
		} else {
			got, svidChanged, err = s.ownSVID(callerFor(ctx, caller), id, own)
		}
		rs = append(rs, complete(got, own)...)
	}
	if len(bundles) > 0 {
		var got []Resource
		var trustErr error
		got, trustChanged, trustErr = s.bundleOf(bundles)
		err = errors.Join(err, trustErr)
		rs = append(rs, complete(got, bundles)...)
	}
	return rs, either(ctx, svidChanged, trustChanged), err
}

// callerFor is caller with the proof that ctx has, if it is a proof of that workload.
func callerFor(ctx context.Context, w identity.Workload) identity.Caller {
	if c, ok := identity.CallerFrom(ctx); ok && c.Workload.Equal(w) {
		return c
	}
	return identity.Caller{Workload: w}
}

// complete is rs, or names without content if there is none.
func complete(rs []Resource, names []string) []Resource {
	if len(rs) > 0 {
		return rs
	}
	for _, n := range names {
		rs = append(rs, Resource{Name: n})
	}
	return rs
}

func unique(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}

// either is closed when a or b is, unless ctx ends before.
func either(ctx context.Context, a, b <-chan struct{}) <-chan struct{} {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	}
	c := make(chan struct{})
	go func() {
		select {
		case <-a:
			close(c)
		case <-b:
			close(c)
		case <-ctx.Done():
		}
	}()
	return c
}

// ownSVID is the caller's SVID under each of names, none if there is none yet.
func (s *Secrets) ownSVID(caller identity.Caller, id spiffeid.ID, names []string) (rs []Resource, changed <-chan struct{}, err error) {
	svid, changed, err := s.svids.SVID(caller)
	switch {
	case err != nil:
		return nil, changed, err
	case svid == nil:
		return nil, changed, nil
	case svid.ID != id || len(svid.Certificates) == 0:
		// Whatever went wrong there, a key never goes to a caller that it is not for.
		return nil, changed, fmt.Errorf("the SVID held for %s is one of %s", id, svid.ID)
	case time.Now().After(svid.Certificates[0].NotAfter):
		return nil, changed, nil
	}
	e := s.entry(svid)
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, n := range names {
		if e.body[n] == nil {
			if e.body[n], err = encodeSVID(n, svid); err != nil {
				delete(e.body, n)
				return nil, changed, fmt.Errorf("encoding the SVID of %s: %w", id, err)
			}
		}
		rs = append(rs, Resource{Name: n, Version: e.version, Body: e.body[n]})
	}
	return rs, changed, nil
}

// entry is where the encoded form of svid is kept.
func (s *Secrets) entry(svid *x509svid.SVID) *encodedSVID {
	key := weak.Make(svid)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.encoded[key]
	if e == nil {
		// The certificates are public and change with each key, so they are the version.
		var chain [][]byte
		for _, c := range svid.Certificates {
			chain = append(chain, c.Raw)
		}
		e = &encodedSVID{version: contentVersion(chain...), body: map[string]*anypb.Any{}}
		s.encoded[key] = e
		runtime.AddCleanup(svid, s.forget, key)
	}
	return e
}

func (s *Secrets) forget(key weak.Pointer[x509svid.SVID]) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.encoded, key)
}

// bundleOf is the trust bundle under each of names, none if there is no trust yet.
func (s *Secrets) bundleOf(names []string) (rs []Resource, changed <-chan struct{}, err error) {
	t, changed := s.trust()
	if t == nil {
		return nil, changed, nil
	}
	if t.TrustDomain() != s.td {
		return nil, changed, fmt.Errorf("the trust is of %s, not of %s", t.TrustDomain().Name(), s.td.Name())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bundle.trust != t {
		s.bundle = encodedBundle{trust: t, version: contentVersion(t.PEM(), s.crls(t)), body: map[string]*anypb.Any{}}
	}
	for _, n := range names {
		if s.bundle.body[n] == nil {
			if s.bundle.body[n], err = encodeBundle(n, t, s.crls(t)); err != nil {
				delete(s.bundle.body, n)
				return nil, changed, fmt.Errorf("encoding the trust bundle of %s: %w", s.td.Name(), err)
			}
		}
		rs = append(rs, Resource{Name: n, Version: s.bundle.version, Body: s.bundle.body[n], TrustSequence: t.Sequence()})
	}
	return rs, changed, nil
}

// encodeSVID is svid as Envoy takes it: leaf first, then the intermediates, and
// the key as PKCS #8.
func encodeSVID(name string, svid *x509svid.SVID) (*anypb.Any, error) {
	var chain bytes.Buffer
	for _, c := range svid.Certificates {
		// Encoding to a bytes.Buffer does not fail.
		_ = pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	der, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		return nil, err
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	// The one copy that stays is in the message.
	defer clear(der)
	defer clear(key)
	return encode(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(chain.Bytes()),
		PrivateKey:       inline(key),
	}}})
}

func encodeBundle(name string, t *identity.Trust, crls []byte) (*anypb.Any, error) {
	v := &tlsv3.CertificateValidationContext{TrustedCa: inline(t.PEM())}
	if len(crls) > 0 {
		// Without the second an intermediate would need a list of the root's too.
		v.Crl, v.OnlyVerifyLeafCertCrl = inline(crls), true
	}
	return encode(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: v}})
}

// crls are the lists of a trust that proxies are to check; nil for none.
func (s *Secrets) crls(t *identity.Trust) []byte {
	if !s.crl {
		return nil
	}
	return t.CRLPEM()
}

// nextUpdate is when the first of the lists that proxies check expires.
func (s *Secrets) nextUpdate() (first float64) {
	t, _ := s.trust()
	if t == nil || !s.crl {
		return 0
	}
	for _, c := range t.CRLs() {
		if end := float64(c.NextUpdate.Unix()); first == 0 || end < first {
			first = end
		}
	}
	return first
}

func encode(secret *tlsv3.Secret) (*anypb.Any, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(secret)
	if err != nil {
		return nil, err
	}
	return &anypb.Any{TypeUrl: SecretType, Value: b}, nil
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}
