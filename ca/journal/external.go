package journal

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"time"
)

// RootEntries are entries of roots that somebody else has the keys of: they are trusted
// from the moment the journal has them.
func RootEntries(roots []*x509.Certificate) (entries []Entry) {
	for _, c := range roots {
		entries = append(entries, Entry{Kind: KindRoot, State: StateActive, External: true, Certificate: c.Raw})
	}
	return entries
}

// ExternalEntry is an intermediate that somebody else signed; key is empty where its
// key is not this authority's to keep.
func ExternalEntry(cert *x509.Certificate, chain []*x509.Certificate, state, key string) Entry {
	e := Entry{Kind: KindIntermediate, State: state, External: true, Certificate: cert.Raw, Key: key}
	for _, c := range chain {
		if !c.Equal(cert) {
			e.Chain = append(e.Chain, c.Raw)
		}
	}
	return e
}

// Follows reports whether an entry takes the place of another: of the same certificate, or
// of the request that it answers.
func (e Entry) Follows(o Entry) bool {
	return string(o.Certificate) == string(e.Certificate) || o.State == StatePending && o.Key == e.Key
}

// IsOf reports whether an issuer of a folder like Istio's cacerts is the one that the
// journal has, and its roots those.
func (j Journal) IsOf(issuer *x509.Certificate, roots []*x509.Certificate) bool {
	n, has := 0, false
	for _, e := range j.Authorities {
		switch {
		case e.State != StateActive:
		case e.Kind == KindRoot:
			n++
		default:
			has = bytes.Equal(e.Certificate, issuer.Raw)
		}
	}
	for _, e := range RootEntries(roots) {
		if !j.HasRoot(e) {
			return false
		}
	}
	return has && n == len(roots)
}

// HasRoot reports whether a root is in the journal.
func (j Journal) HasRoot(e Entry) bool {
	for _, o := range j.Authorities {
		if o.Kind == KindRoot && string(o.Certificate) == string(e.Certificate) {
			return true
		}
	}
	return false
}

// LeadsTo reports whether an intermediate is below a root that signed it or the last of its
// chain.
func (e Entry) LeadsTo(root *x509.Certificate) (bool, error) {
	last, err := e.Cert()
	if err != nil || last == nil || e.Kind != KindIntermediate {
		return false, err
	}
	if n := len(e.Chain); n > 0 {
		if last, err = x509.ParseCertificate(e.Chain[n-1]); err != nil {
			return false, fmt.Errorf("journal: chain of the %s: %w", e.Kind, err)
		}
	}
	return last.Equal(root) || bytes.Equal(last.RawIssuer, root.RawSubject) && last.CheckSignatureFrom(root) == nil, nil
}

// Needs reports whether an intermediate in one of states, of this or of any other replica,
// leads to a root and to none of those that stay: what it signs does not verify
// when the root has left. Those that have ended before now sign nothing. What cannot be read
// is an error, so that nothing is taken for not needed.
func (j Journal) Needs(root *x509.Certificate, stay []*x509.Certificate, now time.Time, states ...string) (bool, error) {
	all := slices.Clone(j.Authorities)
	for _, n := range slices.Sorted(maps.Keys(j.Others)) {
		all = append(all, j.Others[n]...)
	}
	for _, e := range all {
		if e.Kind != KindIntermediate || !slices.Contains(states, e.State) {
			continue
		}
		c, err := e.Cert()
		if err != nil || c == nil {
			return false, err
		}
		if !now.Before(c.NotAfter) {
			continue
		}
		needs, err := e.LeadsTo(root)
		for _, r := range stay {
			if err == nil && needs {
				var also bool
				also, err = e.LeadsTo(r)
				needs = !also
			}
		}
		if err != nil || needs {
			return needs, err
		}
	}
	return false, nil
}
