package ca

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"runtime"
	"sync"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
	"google.golang.org/protobuf/proto"
)

// certificate is what is to be certified: step 1 of the ceremony is done when
// one exists, so every field is a verified fact.
type certificate struct {
	kind      capb.IssuanceRecord_Kind
	evidence  capb.IssuanceRecord_Evidence
	id        spiffeid.ID
	dnsNames  []string
	pub       crypto.PublicKey
	ttl       time.Duration
	node      string
	podUID    string
	requester []byte
	door      string
	tokenAt   time.Time // zero: not recorded
	// forInstance is the replica for which an intermediate is signed; 0: this one.
	forInstance uint8
}

// prepared is a certificate as it will be signed: step 2. tbs has been linted.
type prepared struct {
	certificate
	serial    []byte
	notBefore time.Time
	notAfter  time.Time
	keyHash   [sha256.Size]byte
	issuer    *issuer
	tbs       []byte            // TBSCertificate, DER
	algorithm []byte            // AlgorithmIdentifier of the signature, DER
	opts      crypto.SignerOpts // what the algorithm means to the key
}

// recorded is a prepared certificate whose record is durable: step 3. record is
// the only function that makes one, and sign takes nothing else.
type recorded struct{ prepared }

// issued is a signed certificate: step 5; or err, why this one alone was not.
type issued struct {
	chain   []*x509.Certificate // leaf first, without the root
	renewAt time.Time
	err     error
}

// issuer is an authority certificate with its key. cert is nil for a root
// that is about to sign itself.
type issuer struct {
	cert  *x509.Certificate
	key   crypto.Signer
	chain []*x509.Certificate // what goes out behind a leaf: the issuer itself, without the root
}

// issue runs the ceremony for certificates of one issuer. The results are in the
// order of certs; one that may not be issued fails alone. A failure to record
// fails all of them, and then none is signed.
func (a *Authority) issue(ctx context.Context, iss *issuer, certs []certificate) ([]issued, error) {
	if err := a.signing(); err != nil {
		return nil, err
	}
	now, err := a.clock.now()
	if err != nil {
		return nil, err
	}
	if iss.cert != nil && !iss.cert.NotAfter.After(now) {
		return nil, fmt.Errorf("%w: the issuing authority expired at %s", ErrUnavailable, iss.cert.NotAfter.Format(time.RFC3339))
	}
	out := make([]issued, len(certs))
	all := make([]prepared, len(certs))
	inParallel(len(certs), func(i int) { all[i], out[i].err = a.prepare(now, iss, certs[i]) })
	ready := make([]prepared, 0, len(certs))
	at := make([]int, 0, len(certs))
	a.recording.RLock() // see there: over the write to the log
	for i := range all {
		if out[i].err == nil {
			out[i].err = cmp.Or(a.refuseBanned(&certs[i]), a.refuseRequester(&certs[i]))
		}
		if out[i].err == nil {
			ready, at = append(ready, all[i]), append(at, i)
		} else if errors.Is(out[i].err, profile.ErrLint) {
			a.metrics.lintFailures.Inc()
		}
	}
	var logged []recorded
	if len(ready) > 0 {
		logged, err = a.record(ctx, ready)
	}
	a.recording.RUnlock()
	if len(ready) == 0 {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	a.clock.recorded(now)
	inParallel(len(logged), func(k int) { out[at[k]] = logged[k].sign(now) })
	for _, i := range at {
		if out[i].err != nil {
			a.metrics.signFailures.Inc()
			continue
		}
		a.metrics.issued.WithLabelValues(certs[i].kind.String()).Inc()
	}
	return out, nil
}

// prepare builds what will be signed, lints it and claims the key.
func (a *Authority) prepare(now time.Time, iss *issuer, c certificate) (prepared, error) {
	p := prepared{certificate: c, serial: profile.NewSerial(a.instance, now), issuer: iss}
	p.notBefore, p.notAfter = profile.Validity(now, c.ttl, a.cfg.SVID.Backdate, iss.cert)
	want := profile.Profile{Kind: c.kind, Serial: p.serial, NotBefore: p.notBefore, NotAfter: p.notAfter, DNSNames: c.dnsNames}
	var t *x509.Certificate
	switch c.kind {
	case capb.IssuanceRecord_KIND_ROOT:
		t, want.URI = profile.Root(a.cfg.TrustDomain, p.serial, p.notBefore, p.notAfter), a.cfg.TrustDomain.IDString()
	case capb.IssuanceRecord_KIND_INTERMEDIATE:
		t, want.URI = profile.Intermediate(a.cfg.TrustDomain, cmp.Or(c.forInstance, a.instance), p.serial, p.notBefore, p.notAfter), a.cfg.TrustDomain.IDString()
	default:
		t, want.URI = profile.Leaf(c.id, c.dnsNames, p.serial, p.notBefore, p.notAfter), c.id.String()
		if c.ttl > a.cfg.SVID.MaxTTL {
			return prepared{}, fmt.Errorf("%w: a life of %v; at most %v are configured", profile.ErrLint, c.ttl, a.cfg.SVID.MaxTTL)
		}
	}
	var err error
	if want.SPKI, err = x509.MarshalPKIXPublicKey(c.pub); err != nil {
		return prepared{}, fmt.Errorf("encoding public key: %w", err)
	}
	p.keyHash = sha256.Sum256(want.SPKI)
	if t.SubjectKeyId, err = profile.KeyIdentifier(want.SPKI); err != nil {
		return prepared{}, err
	}
	if p.tbs, p.opts, err = build(t, iss, c.pub); err != nil {
		return prepared{}, err
	}
	if want.Subject, err = asn1.Marshal(t.Subject.ToRDNSequence()); err != nil {
		return prepared{}, fmt.Errorf("encoding the subject: %w", err)
	}
	want.Issuer, want.Signer = want.Subject, iss.key.Public()
	if iss.cert != nil {
		want.Issuer, want.IssuerKey = iss.cert.RawSubject, iss.cert.SubjectKeyId
	}
	if p.algorithm, err = want.Lint(p.tbs); err != nil {
		return prepared{}, err
	}
	return p, a.keyUses.claim(p.keyHash[:], p.owner(), p.notAfter, a.clock.past())
}

// owner is the identity that a key belongs to: all authorities are one.
func (c certificate) owner() string {
	if c.id.IsZero() {
		return ""
	}
	return c.id.String()
}

// draft takes the place of a key while what it will sign is built: crypto/x509
// hands it the TBSCertificate and gets no signature.
type draft struct {
	pub  crypto.PublicKey
	tbs  []byte
	opts crypto.SignerOpts
}

var errDraft = errors.New("this is a draft")

func (d *draft) Public() crypto.PublicKey { return d.pub }

func (d *draft) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errDraft }

// SignMessage implements crypto.MessageSigner.
func (d *draft) SignMessage(_ io.Reader, tbs []byte, opts crypto.SignerOpts) ([]byte, error) {
	d.tbs, d.opts = tbs, opts
	return nil, errDraft
}

// build is the TBSCertificate of a template, and how the issuer's key has to sign
// it.
func build(t *x509.Certificate, iss *issuer, pub crypto.PublicKey) (tbs []byte, opts crypto.SignerOpts, err error) {
	parent := iss.cert
	if parent == nil {
		parent = t // a root signs itself
	}
	d := &draft{pub: iss.key.Public()}
	if _, err := x509.CreateCertificate(rand.Reader, t, parent, pub, d); !errors.Is(err, errDraft) || d.tbs == nil {
		return nil, nil, fmt.Errorf("building what will be signed: %w", err)
	}
	return d.tbs, d.opts, nil
}

// record makes the records of certificates durable, together. When it returns
// nil, fsync has returned.
func (a *Authority) record(ctx context.Context, ps []prepared) ([]recorded, error) {
	records := make([][]byte, 0, len(ps))
	for i := range ps {
		p := &ps[i]
		r := &capb.IssuanceRecord{
			Kind: p.kind, Serial: p.serial, Node: p.node, Evidence: p.evidence, PodUid: p.podUID, Requester: p.requester,
			NotBefore: p.notBefore.Unix(), NotAfter: p.notAfter.Unix(), KeyHash: p.keyHash[:], ForInstance: uint32(p.forInstance),
		}
		if !p.id.IsZero() {
			r.SpiffeId = p.id.String()
		}
		if r.Door = p.door; !p.tokenAt.IsZero() {
			r.TokenAt = p.tokenAt.Unix()
		}
		if p.issuer.cert != nil {
			r.Authority = p.issuer.cert.SubjectKeyId
		}
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
		if err != nil {
			return nil, fmt.Errorf("encoding issuance record: %w", err)
		}
		records = append(records, b)
	}
	if _, err := a.log.Append(ctx, records); err != nil {
		a.metrics.logFailures.Inc()
		return nil, fmt.Errorf("%w: recording in the issuance log: %w", ErrUnavailable, err)
	}
	out := make([]recorded, len(ps))
	for i := range ps {
		out[i] = recorded{ps[i]}
	}
	return out, nil
}

// sign is steps 4 and 5.
func (r recorded) sign(now time.Time) issued {
	signature, err := crypto.SignMessage(r.issuer.key, rand.Reader, r.tbs, r.opts)
	if err != nil {
		return issued{err: fmt.Errorf("signing: %w", err)}
	}
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(r.tbs)
		b.AddBytes(r.algorithm)
		b.AddASN1BitString(signature)
	})
	der, err := b.Bytes()
	if err != nil {
		return issued{err: fmt.Errorf("encoding what was signed: %w", err)}
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return issued{err: fmt.Errorf("parsing what was signed: %w", err)}
	}
	if err := r.check(c); err != nil {
		return issued{err: fmt.Errorf("checking what was signed: %w", err)}
	}
	return issued{
		chain:   append([]*x509.Certificate{c}, r.issuer.chain...),
		renewAt: profile.RenewAt(now, c.NotAfter, mathrand.Float64()),
	}
}

// check verifies the signature, which a faulty key device may have got wrong, and
// reads the certificate once more as a relying party does.
func (r recorded) check(c *x509.Certificate) error {
	parent := r.issuer.cert
	if parent == nil {
		parent = c
	}
	if err := parent.CheckSignature(c.SignatureAlgorithm, r.tbs, c.Signature); err != nil {
		return err
	}
	if c.IsCA {
		return identity.CheckAuthority(c)
	}
	id, err := identity.CheckSVID(c)
	if err != nil {
		return err
	}
	if id != r.id {
		return fmt.Errorf("it names %s instead of %s", id, r.id)
	}
	return nil
}

// inParallel calls f for 0 to n-1 on as many goroutines as there are processors
// and returns when all calls have.
func inParallel(n int, f func(int)) {
	workers := min(n, runtime.GOMAXPROCS(0))
	if workers <= 1 {
		for i := range n {
			f(i)
		}
		return
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				f(i)
			}
		})
	}
	wg.Wait()
}
