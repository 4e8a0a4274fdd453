package revocation

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// ListPrefix is what the keys of lists in the store begin with.
const ListPrefix = "crl/"

// ListKey is where the newest list of an authority is stored, DER.
func ListKey(authority []byte) string { return ListPrefix + hex.EncodeToString(authority) }

// Order is a list that is to be signed.
type Order struct {
	// Issuer is the authority; it needs the key usage cRLSign.
	Issuer *x509.Certificate
	// Key is its private key.
	Key crypto.Signer
	// Number is the list's; it is above that of every list before, and durable by now.
	Number uint64
	// From and Until are thisUpdate and nextUpdate.
	From, Until time.Time
	// Revoked are the entries; those of other authorities are left out.
	Revoked Set
}

// CanSign is nil for an authority that may sign lists.
func CanSign(issuer *x509.Certificate) error {
	switch {
	case issuer.KeyUsage&x509.KeyUsageCRLSign == 0:
		return fmt.Errorf("%s does not have the key usage cRLSign, so it cannot sign a CRL: have it made anew, with that", issuer.Subject)
	case len(issuer.SubjectKeyId) == 0:
		return fmt.Errorf("%s has no subject key identifier, by which its CRL would be found", issuer.Subject)
	}
	return nil
}

// Sign makes a list and reads it once more as a relying party does.
func Sign(o Order) (*x509.RevocationList, error) {
	if err := CanSign(o.Issuer); err != nil {
		return nil, err
	}
	t := &x509.RevocationList{Number: new(big.Int).SetUint64(o.Number), ThisUpdate: o.From.UTC(), NextUpdate: o.Until.UTC()}
	for _, e := range o.Revoked.Sorted() {
		if bytes.Equal(e.Authority, o.Issuer.SubjectKeyId) {
			t.RevokedCertificateEntries = append(t.RevokedCertificateEntries, x509.RevocationListEntry{
				SerialNumber: new(big.Int).SetBytes(e.Serial), RevocationTime: e.Revoked.UTC(), ReasonCode: int(e.Reason)})
		}
	}
	der, err := x509.CreateRevocationList(rand.Reader, t, o.Issuer, o.Key)
	if err != nil {
		return nil, fmt.Errorf("signing the CRL of %s: %w", o.Issuer.Subject, err)
	}
	list, err := x509.ParseRevocationList(der)
	if err == nil {
		err = o.check(list, t)
	}
	if err != nil {
		return nil, fmt.Errorf("checking the CRL of %s that was signed: %w", o.Issuer.Subject, err)
	}
	return list, nil
}

// check holds a list against RFC 5280 section 5 and against what was meant.
func (o Order) check(list, want *x509.RevocationList) error {
	if err := Check(list); err != nil {
		return err
	}
	if err := list.CheckSignatureFrom(o.Issuer); err != nil {
		return err
	}
	switch {
	case !bytes.Equal(list.RawIssuer, o.Issuer.RawSubject) || !bytes.Equal(list.AuthorityKeyId, o.Issuer.SubjectKeyId):
		return errors.New("it names another issuer")
	case list.Number.Cmp(want.Number) != 0 || !list.ThisUpdate.Equal(o.From.Truncate(time.Second)) || !list.NextUpdate.Equal(o.Until.Truncate(time.Second)):
		return errors.New("its number or its times are not those that were meant")
	case len(list.RevokedCertificateEntries) != len(want.RevokedCertificateEntries):
		return errors.New("it has other entries than were meant")
	}
	for i, e := range list.RevokedCertificateEntries {
		if w := want.RevokedCertificateEntries[i]; e.SerialNumber.Cmp(w.SerialNumber) != 0 || e.ReasonCode != w.ReasonCode {
			return fmt.Errorf("entry %d is not the one that was meant", i)
		}
	}
	return nil
}

var (
	oidAuthorityKey = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidNumber       = asn1.ObjectIdentifier{2, 5, 29, 20}
)

// Check is nil for a list that relying parties take as it is meant: it has a number,
// an authority key identifier and a nextUpdate (RFC 5280 sections 5.1.2.5, 5.2.1 and
// 5.2.3), and no other extension, critical ones least of all: a delta, an indirect or
// a partitioned list would be read by some as the whole.
func Check(list *x509.RevocationList) error {
	switch {
	case list.Number == nil || list.Number.Sign() < 0 || list.Number.BitLen() > 159:
		return errors.New("it has no number, or a bad one")
	case len(list.AuthorityKeyId) == 0:
		return errors.New("it has no authority key identifier")
	case list.NextUpdate.IsZero() || !list.NextUpdate.After(list.ThisUpdate):
		return errors.New("it does not say until when it is good")
	}
	for _, e := range list.Extensions {
		if e.Critical || !e.Id.Equal(oidAuthorityKey) && !e.Id.Equal(oidNumber) {
			return fmt.Errorf("it has the extension %v", e.Id)
		}
	}
	for _, e := range list.RevokedCertificateEntries {
		if critical(e.Extensions) {
			return fmt.Errorf("the entry of %x has a critical extension", e.SerialNumber)
		}
	}
	return nil
}

func critical(extensions []pkix.Extension) bool {
	for _, e := range extensions {
		if e.Critical {
			return true
		}
	}
	return false
}

// ParseList reads a list of the store.
func ParseList(s storage.Entry) (*x509.RevocationList, error) {
	list, err := x509.ParseRevocationList(s.Value)
	if err == nil {
		err = Check(list)
	}
	if err == nil && s.Key != ListKey(list.AuthorityKeyId) {
		err = errors.New("it is of another authority")
	}
	if err != nil {
		return nil, fmt.Errorf("reading CRL %s: %w", s.Key, err)
	}
	return list, nil
}

// Holds reports whether a list has every entry of its authority that is in the set.
func Holds(list *x509.RevocationList, s Set) bool {
	have := make(map[string]bool, len(list.RevokedCertificateEntries))
	for _, e := range list.RevokedCertificateEntries {
		have[string(e.SerialNumber.Bytes())] = true
	}
	for _, e := range s {
		if bytes.Equal(e.Authority, list.AuthorityKeyId) && !have[string(bytes.TrimLeft(e.Serial, "\x00"))] {
			return false
		}
	}
	return true
}
