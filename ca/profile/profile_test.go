package profile_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/profile"
)

func TestSerialsSortByTime(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 24, 0, 0, 0, 0, time.UTC)
	a, b := profile.NewSerial(0x7f, at), profile.NewSerial(0x7f, at.Add(time.Millisecond))
	if len(a) != profile.SerialLength || a[0] != 0x7f || bytes.Compare(a, b) >= 0 || !profile.SerialTime(a).Equal(at) {
		t.Errorf("%x of %v, %x", a, profile.SerialTime(a), b)
	}
	if bytes.Equal(profile.NewSerial(1, at), profile.NewSerial(1, at)) {
		t.Error("two serials of one millisecond are equal")
	}
}

func TestValidityNeverLeavesTheIssuers(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 500, time.UTC)
	iss := &x509.Certificate{NotBefore: now.Add(-30 * time.Second).Truncate(time.Second), NotAfter: now.Add(10 * time.Minute).Truncate(time.Second)}
	nb, na := profile.Validity(now, time.Hour, time.Minute, iss)
	if !nb.Equal(iss.NotBefore) || !na.Equal(iss.NotAfter) {
		t.Errorf("got %s to %s", nb, na)
	}
	nb, na = profile.Validity(now, time.Minute, time.Second, iss)
	if !nb.Equal(now.Add(-time.Second).Truncate(time.Second)) || !na.Equal(now.Add(time.Minute).Truncate(time.Second)) {
		t.Errorf("got %s to %s", nb, na)
	}
}

func TestRenewAtSpreadsAroundHalfLife(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		left   time.Duration
		random float64
		want   time.Duration
	}{
		{time.Hour, 0, 27 * time.Minute},
		{time.Hour, 0.5, 30 * time.Minute},
		{10 * time.Second, 0, 4500 * time.Millisecond},
		{0, 0.5, 0},
		{-time.Hour, 0.5, 0},
	} {
		if got := profile.RenewAt(now, now.Add(c.left), c.random).Sub(now); got != c.want {
			t.Errorf("left %v, random %v: after %v, want %v", c.left, c.random, got, c.want)
		}
	}
}

// FuzzPublicKey: whatever is taken is a key in its one encoding.
func FuzzPublicKey(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	good, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{})
	f.Add(good[:len(good)-1])
	f.Fuzz(func(t *testing.T, b []byte) {
		pub, err := profile.ParsePublicKey(b, profile.AllKeys)
		if err != nil {
			return
		}
		again, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x was taken and encodes as %x, %v", b, again, err)
		}
	})
}
