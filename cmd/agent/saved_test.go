package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/holder"
)

// TestWhatCannotBeSavedHoldsNothingBack: what is acknowledged is bounded by what a restart
// would find, but where it would find nothing there is nothing to wait for, until state
// is saved again.
func TestWhatCannotBeSavedHoldsNothingBack(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	trust := func(sequence uint64) *identity.Trust {
		tr, err := identity.NewTrust(sequence, spiffeid.RequireTrustDomainFromString("cluster.local"), []*x509.Certificate{root})
		if err != nil {
			t.Fatal(err)
		}
		return tr
	}
	full := errors.New("no space left on device")
	swap := fmt.Errorf("saving agent state: %w: swap; %w", holder.ErrNoState, holder.ErrStateRemoved)

	s := &saved{file: &holder.StateFile{}}
	streams := make(chan struct{})
	for _, step := range []struct {
		name  string
		trust uint64
		err   error
		have  uint64 // acknowledged by the streams
		want  uint64
		told  bool // whoever waits for what is saved hears of it
	}{
		{"saved", 5, nil, 5, 5, true},
		{"the next cannot be saved", 6, full, 6, 5, false},
		{"it is saved", 6, nil, 6, 6, true},
		{"whether there is swap is not known", 7, holder.ErrNoState, 7, 6, false},
		{"there is", 7, swap, 7, 7, true},
		{"another one", 8, swap, 8, 8, false},
		{"without swap, and full", 9, full, 9, 9, false},
		{"saved again", 9, nil, 9, 9, true},
		{"bounded as before", 10, full, 10, 9, false},
		{"the streams are behind", 10, nil, 9, 9, true},
	} {
		_, waiting := s.kept.Load()
		s.note(trust(step.trust), step.err)
		got, changed := s.acknowledged(step.have, streams)
		if got != step.want {
			t.Errorf("%s: acknowledged %d, want %d", step.name, got, step.want)
		}
		told := false
		select {
		case <-waiting:
			told = true
		default:
		}
		if told != step.told {
			t.Errorf("%s: told %v, want %v", step.name, told, step.told)
		}
		if bounded := got < step.have; bounded == (changed == (<-chan struct{})(streams)) {
			t.Errorf("%s: it waits for the wrong one", step.name)
		}
	}
	if got, _ := (&saved{}).acknowledged(7, streams); got != 7 {
		t.Errorf("without a file %d is acknowledged", got)
	}
}
