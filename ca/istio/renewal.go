package istio

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"
)

const (
	// maxCertificates bounds the certificates that are remembered, some 200 bytes
	// each, and maxOfOnePod those of one pod: an agent uses the last one or two.
	maxCertificates = 1 << 19
	maxOfOnePod     = 256
	// forgetEvery is how often expired certificates are forgotten.
	forgetEvery = time.Minute
)

type serial [17]byte

// renewals remembers the certificates that may renew themselves. What is not
// remembered needs a token.
type renewals struct {
	accounts    map[string]struct{} // NAMESPACE/NAME, NAMESPACE/*, */*
	maxTokenAge time.Duration

	mu   sync.Mutex
	all  map[serial]*renewable // guarded by mu
	pods map[podKey]*podOf     // guarded by mu
}

// podKey is who a pod is. The UID alone would do where a view knows each one.
type podKey struct{ uid, namespace, account, node string }

// renewable is one certificate.
type renewable struct {
	serial   serial
	pod      *podOf
	tokenAt  time.Time
	notAfter time.Time
	trust    uint64 // state of trust under which its chain verified; guarded by renewals.mu
}

// podOf is the pod that certificates were issued to.
type podOf struct {
	workload     identity.Workload // as it was proved
	certificates []*renewable      // least recently used first; guarded by renewals.mu
}

func newRenewals(accounts []string, maxTokenAge time.Duration) *renewals {
	return &renewals{accounts: set(accounts), maxTokenAge: maxTokenAge, all: map[serial]*renewable{}, pods: map[podKey]*podOf{}}
}

// enabled reports whether the certificates of an account may renew themselves.
func (r *renewals) enabled(namespace, account string) bool {
	for _, k := range [...]string{namespace + "/" + account, namespace + "/*", "*/*"} {
		if _, ok := r.accounts[k]; ok {
			return true
		}
	}
	return false
}

// load fills the memory from the issuance log. A certificate that can still renew
// has not expired and rests on a token that is not too old, so records older than
// either need not be read.
func (r *renewals) load(ctx context.Context, a *ca.Authority, now time.Time, longest time.Duration) error {
	for rec, err := range a.Issuances(ctx, now.Add(-min(r.maxTokenAge, longest))) {
		if err != nil {
			return fmt.Errorf("reading which certificates may be renewed: %w", err)
		}
		if rec.Door != doorName || rec.Kind != capb.IssuanceRecord_KIND_WORKLOAD || rec.TokenAt == 0 || rec.NotAfter <= now.Unix() {
			continue
		}
		id, err := identity.ParseID(rec.SpiffeId)
		if err != nil {
			return fmt.Errorf("reading which certificates may be renewed: record of %x: %w", rec.Serial, err)
		}
		if ns, sa, ok := identity.SplitWorkloadID(id); ok {
			w := identity.Workload{Namespace: ns, ServiceAccount: sa, PodUID: rec.PodUid, Node: rec.Node}
			r.add(rec.Serial, w, time.Unix(rec.TokenAt, 0), time.Unix(rec.NotAfter, 0))
		}
	}
	return nil
}

// add remembers a certificate, if its account may renew.
func (r *renewals) add(number []byte, w identity.Workload, tokenAt, notAfter time.Time) {
	var s serial
	if len(number) != len(s) || !r.enabled(w.Namespace, w.ServiceAccount) {
		return
	}
	copy(s[:], number)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.all) >= maxCertificates {
		r.makeRoom()
	}
	key := podKey{w.PodUID, w.Namespace, w.ServiceAccount, w.Node}
	p := r.pods[key]
	if p == nil {
		p = &podOf{workload: w}
		r.pods[key] = p
	}
	if len(p.certificates) >= maxOfOnePod {
		delete(r.all, p.certificates[0].serial)
		p.certificates = slices.Delete(p.certificates, 0, 1)
	}
	c := &renewable{serial: s, pod: p, tokenAt: tokenAt, notAfter: notAfter}
	r.all[s] = c
	p.certificates = append(p.certificates, c)
}

// use is the certificate c on record, if it may renew now. verify checks its
// chain; it is called where that was not done under the present state of trust.
func (r *renewals) use(c *x509.Certificate, now time.Time, trust uint64, verify func() error) (*renewable, error) {
	id, err := identity.CheckSVID(c)
	if err != nil {
		return nil, err
	}
	var s serial
	if number := ca.Serial(c); copy(s[:], number) != len(s) || len(number) != len(s) {
		return nil, fmt.Errorf("certificate %x of %s is not from here", number, id)
	}
	r.mu.Lock()
	found := r.all[s]
	verified := found != nil && found.trust == trust
	r.mu.Unlock()
	if found == nil {
		return nil, fmt.Errorf("certificate %x of %s is not one that may be renewed by itself", s, id)
	}
	w := found.pod.workload
	ns, sa, _ := identity.SplitWorkloadID(id)
	switch {
	case ns != w.Namespace || sa != w.ServiceAccount:
		return nil, fmt.Errorf("certificate %x says %s, the record %s/%s", s, id, w.Namespace, w.ServiceAccount)
	case !now.Before(c.NotAfter) || !now.Before(found.notAfter):
		return nil, fmt.Errorf("certificate %x of %s expired at %s", s, id, c.NotAfter.Format(time.RFC3339))
	case now.Sub(found.tokenAt) >= r.maxTokenAge:
		return nil, fmt.Errorf("certificate %x of %s goes back to a token of %s; a fresh one is needed", s, id, found.tokenAt.Format(time.RFC3339))
	}
	if !verified {
		if err := verify(); err != nil {
			return nil, fmt.Errorf("certificate %x of %s: %w", s, id, err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all[s] != found {
		return nil, errors.New("the certificate was forgotten in the meantime")
	}
	found.trust = trust
	// Used last: the others of the pod are forgotten before it.
	list := found.pod.certificates
	if i := slices.Index(list, found); i >= 0 && i < len(list)-1 {
		copy(list[i:], list[i+1:])
		list[len(list)-1] = found
	}
	return found, nil
}

// forget drops what has expired.
func (r *renewals) forget(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.drop(func(c *renewable) bool { return !now.Before(c.notAfter) })
}

// makeRoom drops what has expired and then, if less than a tenth became free,
// arbitrary pods until it is. mu is held.
func (r *renewals) makeRoom() {
	now := time.Now()
	r.drop(func(c *renewable) bool { return !now.Before(c.notAfter) })
	for key, p := range r.pods {
		if len(r.all) <= maxCertificates-maxCertificates/10 {
			return
		}
		for _, c := range p.certificates {
			delete(r.all, c.serial)
		}
		delete(r.pods, key)
	}
}

// drop forgets certificates, and pods that are left without any. mu is held.
func (r *renewals) drop(gone func(*renewable) bool) {
	for key, p := range r.pods {
		p.certificates = slices.DeleteFunc(p.certificates, func(c *renewable) bool {
			if !gone(c) {
				return false
			}
			delete(r.all, c.serial)
			return true
		})
		if len(p.certificates) == 0 {
			delete(r.pods, key)
		}
	}
}

func (r *renewals) len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}
