package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"time"

	"github.com/signet-mesh/signet/storage"
)

var (
	RenewAt        = renewAt
	Validity       = validity
	NewSerial      = newSerial
	ParsePublicKey = parsePublicKey
	ValidDNSName   = validDNSName
)

// WrapKeys replaces the signing keys of root and intermediate.
func (a *Authority) WrapKeys(wrap func(crypto.Signer) crypto.Signer) {
	root := *a.root
	root.key = wrap(root.key)
	a.root = &root
	inter := *a.intermediate.Load()
	inter.key = wrap(inter.key)
	a.intermediate.Store(&inter)
}

func (a *Authority) Root() *x509.Certificate         { return a.root.cert }
func (a *Authority) Intermediate() *x509.Certificate { return a.intermediate.Load().cert }
func (a *Authority) Log() *storage.FileLog           { return a.log }
func (a *Authority) Store() *storage.Bolt            { return a.store }
func (a *Authority) SignHead(ctx context.Context) error {
	return a.signHead(ctx)
}
func (a *Authority) VerifyHead(h storage.Head) bool { return a.verifyHead(h) }
func (a *Authority) RenewIntermediate(ctx context.Context) error {
	return a.renewIntermediate(ctx)
}

// SetClock makes the authority see another time, and forget the newest it saw.
func (a *Authority) SetClock(now func() time.Time, newest time.Time) {
	a.clock.mu.Lock()
	defer a.clock.mu.Unlock()
	a.clock.wall, a.clock.newest = now, newest
}

// Agents is the number of agent SVIDs on record.
func (a *Authority) Agents() int { return len(a.agents.status()) }

// ClockAt is what the clock says when the wall says t, and something was recorded
// at newest.
func ClockAt(t, newest time.Time) (time.Time, error) {
	c := &clock{wall: func() time.Time { return t }}
	c.recorded(newest)
	return c.now()
}
