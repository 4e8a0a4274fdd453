package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
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
}

// prepared is a certificate as it will be signed: step 2.
type prepared struct {
	certificate
	serial   []byte
	template *x509.Certificate
	issuer   *issuer
}

// recorded is a prepared certificate whose record is durable: step 3. record is
// the only function that makes one, and sign takes nothing else.
type recorded struct{ prepared }

// issued is a signed certificate: step 5.
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
// order of certs. A failure to record fails all of them, and then none is signed.
func (a *Authority) issue(ctx context.Context, iss *issuer, certs []certificate) ([]issued, error) {
	now, err := a.clock.now()
	if err != nil {
		return nil, err
	}
	ready := make([]prepared, 0, len(certs))
	for _, c := range certs {
		p, err := a.prepare(now, iss, c)
		if err != nil {
			return nil, err
		}
		ready = append(ready, p)
	}
	logged, err := a.record(ctx, ready)
	if err != nil {
		return nil, err
	}
	a.clock.recorded(now)
	out := make([]issued, len(logged))
	inParallel(len(logged), func(i int) { out[i] = logged[i].sign(now) })
	for i := range out {
		if out[i].err != nil {
			a.metrics.signFailures.Inc()
			continue
		}
		a.metrics.issued.WithLabelValues(certs[i].kind.String()).Inc()
	}
	return out, nil
}

func (a *Authority) prepare(now time.Time, iss *issuer, c certificate) (prepared, error) {
	p := prepared{certificate: c, serial: newSerial(a.instance, now), issuer: iss}
	notBefore, notAfter := validity(now, c.ttl, a.cfg.SVID.Backdate, iss.cert)
	if !notAfter.After(now) {
		return prepared{}, fmt.Errorf("%w: the issuing authority expired at %s", ErrUnavailable, iss.cert.NotAfter.Format(time.RFC3339))
	}
	switch c.kind {
	case capb.IssuanceRecord_KIND_ROOT:
		p.template = rootTemplate(a.cfg.TrustDomain, p.serial, notBefore, notAfter)
	case capb.IssuanceRecord_KIND_INTERMEDIATE:
		p.template = intermediateTemplate(a.cfg.TrustDomain, a.instance, p.serial, notBefore, notAfter)
	default:
		p.template = leafTemplate(c.id, c.dnsNames, p.serial, notBefore, notAfter)
	}
	ski, err := subjectKeyID(c.pub)
	if err != nil {
		return prepared{}, err
	}
	p.template.SubjectKeyId = ski
	return p, nil
}

// record makes the records of certificates durable, together. When it returns
// nil, fsync has returned.
func (a *Authority) record(ctx context.Context, ps []prepared) ([]recorded, error) {
	records := make([][]byte, 0, len(ps))
	for _, p := range ps {
		spki, err := x509.MarshalPKIXPublicKey(p.pub)
		if err != nil {
			return nil, fmt.Errorf("encoding public key: %w", err)
		}
		hash := sha256.Sum256(spki)
		r := &capb.IssuanceRecord{
			Kind: p.kind, Serial: p.serial, Node: p.node, Evidence: p.evidence, PodUid: p.podUID, Requester: p.requester,
			NotBefore: p.template.NotBefore.Unix(), NotAfter: p.template.NotAfter.Unix(), KeyHash: hash[:],
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
	parent := r.issuer.cert
	if parent == nil {
		parent = r.template // a root signs itself
	}
	der, err := x509.CreateCertificate(rand.Reader, r.template, parent, r.pub, r.issuer.key)
	if err != nil {
		return issued{err: fmt.Errorf("signing: %w", err)}
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return issued{err: fmt.Errorf("parsing what was signed: %w", err)}
	}
	if err := r.lint(c); err != nil {
		return issued{err: fmt.Errorf("checking what was signed: %w", err)}
	}
	return issued{
		chain:   append([]*x509.Certificate{c}, r.issuer.chain...),
		renewAt: renewAt(now, c.NotAfter, jitter()),
	}
}

// lint compares the certificate with the profile and with what was asked.
func (r recorded) lint(c *x509.Certificate) error {
	if c.SerialNumber.Cmp(r.template.SerialNumber) != 0 {
		return errors.New("serial differs")
	}
	if c.IsCA {
		if r.kind != capb.IssuanceRecord_KIND_ROOT && r.kind != capb.IssuanceRecord_KIND_INTERMEDIATE {
			return errors.New("a leaf became an authority")
		}
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
