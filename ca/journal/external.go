package journal

import (
	"bytes"
	"crypto/x509"
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
