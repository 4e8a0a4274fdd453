package revocation_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"encoding/pem"

	"github.com/signet-mesh/signet/ca/revocation"
	"github.com/signet-mesh/signet/storage"
)

func authority(t testing.TB, usage x509.KeyUsage) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "an authority"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: usage}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c, key
}

func entry(authority, serial []byte, reason revocation.Reason, now time.Time) revocation.Entry {
	return revocation.Entry{Serial: serial, SPIFFEID: "spiffe://a.b/ns/x/sa/y", Authority: authority, Reason: reason, By: "uid 0", Revoked: now, Until: now.Add(time.Hour)}
}

// TestAList has what RFC 5280 section 5 asks for, and openssl reads it.
func TestAList(t *testing.T) {
	t.Parallel()
	c, key := authority(t, x509.KeyUsageCertSign|x509.KeyUsageCRLSign)
	now := time.Now()
	set := revocation.Set{}
	for i, reason := range []revocation.Reason{0, 1, 2, 3, 4, 5, 9, 10} {
		set = set.With(entry(c.SubjectKeyId, []byte{1, 2, byte(i)}, reason, now.Add(time.Duration(i)*time.Second)))
	}
	other := set.With(entry([]byte("another"), []byte{9, 9}, 1, now))
	list, err := revocation.Sign(revocation.Order{Issuer: c, Key: key, Number: 1 << 21, From: now.Add(-time.Minute), Until: now.Add(time.Hour), Revoked: other})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.RevokedCertificateEntries) != 8 || list.Number.Uint64() != 1<<21 || !revocation.Holds(list, other) {
		t.Errorf("%d entries, number %v", len(list.RevokedCertificateEntries), list.Number)
	}
	if revocation.Holds(list, set.With(entry(c.SubjectKeyId, []byte{5}, 1, now))) {
		t.Error("it is said to hold what it does not")
	}
	dir := t.TempDir()
	ca, crl := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "crl.pem")
	for path, b := range map[string]*pem.Block{ca: {Type: "CERTIFICATE", Bytes: c.Raw}, crl: {Type: "X509 CRL", Bytes: list.Raw}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("openssl", "crl", "-in", crl, "-CAfile", ca, "-noout", "-text").CombinedOutput()
	text := string(out)
	for _, want := range []string{"verify OK", "Version 2", "X509v3 CRL Number", "Key Compromise", "Superseded", "Cessation Of Operation"} {
		if err != nil || !strings.Contains(text, want) {
			t.Fatalf("openssl, %v, does not say %q:\n%s", err, want, text)
		}
	}
	if strings.Contains(text, "critical") {
		t.Errorf("a critical extension:\n%s", text)
	}
}

func TestWhoMayNotSignAList(t *testing.T) {
	t.Parallel()
	c, key := authority(t, x509.KeyUsageCertSign)
	if _, err := revocation.Sign(revocation.Order{Issuer: c, Key: key, Number: 1, From: time.Now(), Until: time.Now().Add(time.Hour)}); err == nil || !strings.Contains(err.Error(), "cRLSign") {
		t.Errorf("an authority without cRLSign: %v", err)
	}
	good, key := authority(t, x509.KeyUsageCertSign|x509.KeyUsageCRLSign)
	_, wrong := authority(t, x509.KeyUsageCRLSign)
	if _, err := revocation.Sign(revocation.Order{Issuer: good, Key: wrong, Number: 1, From: time.Now(), Until: time.Now().Add(time.Hour)}); err == nil {
		t.Error("another key signed it")
	}
	if _, err := revocation.Sign(revocation.Order{Issuer: good, Key: key, Number: 1, From: time.Now(), Until: time.Now().Add(-time.Hour)}); err == nil {
		t.Error("a list that is over before it begins")
	}
}

// TestCheckRefusesListsThatMeanSomethingElse: a delta, for one, is not the whole.
func TestCheckRefusesListsThatMeanSomethingElse(t *testing.T) {
	t.Parallel()
	c, key := authority(t, x509.KeyUsageCRLSign)
	now := time.Now()
	for name, extension := range map[string]pkix.Extension{
		"a delta":                {Id: []int{2, 5, 29, 27}, Critical: true, Value: []byte{2, 1, 1}},
		"a part":                 {Id: []int{2, 5, 29, 28}, Critical: true, Value: []byte{0x30, 0}},
		"an unknown extension":   {Id: []int{1, 2, 3}, Value: []byte{5, 0}},
		"one that is no part of": {Id: []int{2, 5, 29, 46}, Value: []byte{0x30, 0}},
	} {
		der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: now, NextUpdate: now.Add(time.Hour), ExtraExtensions: []pkix.Extension{extension}}, c, key)
		if err != nil {
			t.Fatal(err)
		}
		list, err := x509.ParseRevocationList(der)
		if err == nil {
			err = revocation.Check(list)
		}
		if err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

func TestEntriesAreStoredAsTheyAre(t *testing.T) {
	t.Parallel()
	now := time.Now().UTC().Truncate(time.Second)
	e := entry([]byte{1}, []byte{0, 1, 2}, 1, now)
	b, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := revocation.Parse(storage.Entry{Key: revocation.Key(e.Serial), Value: b})
	if err != nil || got.SPIFFEID != e.SPIFFEID || !got.Until.Equal(e.Until) || got.Reason != e.Reason || string(got.Serial) != string(e.Serial) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := revocation.Parse(storage.Entry{Key: revocation.Key([]byte{9}), Value: b}); err == nil {
		t.Error("under another serial it is taken")
	}
	newer := strings.Replace(string(b), `"version":1`, `"version":2`, 1)
	if _, err := revocation.Parse(storage.Entry{Key: revocation.Key(e.Serial), Value: []byte(newer)}); !errors.Is(err, storage.ErrNewerFormat) {
		t.Errorf("a newer version: %v", err)
	}
	for name, edit := range map[string]func(*revocation.Entry){
		"no serial":     func(e *revocation.Entry) { e.Serial = nil },
		"no issuer":     func(e *revocation.Entry) { e.Authority = nil },
		"a hold":        func(e *revocation.Entry) { e.Reason = 6 },
		"removeFromCRL": func(e *revocation.Entry) { e.Reason = 8 },
		"no end":        func(e *revocation.Entry) { e.Until = time.Time{} },
		"much to say":   func(e *revocation.Entry) { e.Comment = strings.Repeat("x", 501) },
	} {
		bad := e
		edit(&bad)
		if _, err := bad.Encode(); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	for _, name := range revocation.Reasons() {
		if r, err := revocation.ParseReason(name); err != nil || r.String() != name {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
	if _, err := revocation.ParseReason("certificateHold"); err == nil {
		t.Error("a hold is a reason")
	}
}

// TestAnEntryStaysUntilAListOfAfterItsEnd: RFC 5280 section 5.1.2.6.
func TestAnEntryStaysUntilAListOfAfterItsEnd(t *testing.T) {
	t.Parallel()
	now := time.Now()
	e := entry([]byte{1}, []byte{1}, 1, now)
	set := revocation.Set{}.With(e)
	for after, want := range map[time.Duration]int{0: 1, time.Hour: 1, 3 * time.Hour: 1, 3*time.Hour + time.Second: 0} {
		said, over := set.Split(now.Add(after), 2*time.Hour)
		if len(said) != want || len(over) != 1-want {
			t.Errorf("after %v: %d said, %d over", after, len(said), len(over))
		}
	}
}
