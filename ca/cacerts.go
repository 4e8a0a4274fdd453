package ca

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/signet-mesh/signet/ca/external"
	"github.com/signet-mesh/signet/ca/journal"
)

// readFolder reads the shared issuer. Its key is in memory only; the folder is where
// it is kept.
func (a *Authority) readFolder() (external.Folder, crypto.Signer, error) {
	f, key, err := external.ReadFolder(a.cfg.Cacerts, external.Profile{TrustDomain: a.cfg.TrustDomain, DNSNames: a.cfg.DNSNames},
		a.keys.Parse, time.Now())
	if err != nil {
		return external.Folder{}, nil, fmt.Errorf("authority.cacerts: %w", err)
	}
	return f, key, nil
}

func folderEntry(iss external.Issuer) journal.Entry {
	return journal.ExternalEntry(iss.Cert, iss.Chain, journal.StateActive, "")
}

// loadFolder takes the issuer in the folder at the start. One that replaced the former
// one while the authority was down is used at once: the former one's key is gone.
func (a *Authority) loadFolder(ctx context.Context) error {
	f, key, err := a.readFolder()
	if err != nil {
		return err
	}
	a.root.Store(&issuer{cert: f.Root})
	a.folderHash = f.Hash
	iss := &issuer{cert: f.Cert, key: key, chain: f.Chain}
	if a.current().IsOf(f.Cert, f.Roots) {
		a.intermediate.Store(iss)
		return nil
	}
	var added []journal.Entry
	for _, e := range journal.RootEntries(f.Roots) {
		if !a.current().HasRoot(e) {
			added = append(added, e)
		}
	}
	if len(added) > 0 {
		err = a.changeTrust(ctx, func(j *journal.Journal) error { j.Authorities = append(j.Authorities, added...); return nil })
	}
	if err == nil {
		err = a.take(ctx, iss, folderEntry(f.Issuer), f.Roots)
	}
	return err
}

// folderGood is a folder that was found to be good, and when it has to be checked again
// although nothing in it has changed.
type folderGood struct {
	hash       [sha256.Size]byte
	at, before time.Time
}

// holds reports whether the folder is what it was, and needs no look inside.
func (g folderGood) holds(hash [sha256.Size]byte, now time.Time) bool {
	return hash == g.hash && !now.Before(g.at) && now.Before(g.before)
}

// folderLook is how long what has not changed is taken for good.
const folderLook = 10 * time.Minute

func goodFolder(f external.Folder, now time.Time) folderGood {
	g := folderGood{hash: f.Hash, at: now, before: now.Add(folderLook)}
	for _, c := range append([]*x509.Certificate{f.Cert, f.Root}, f.Chain...) {
		if c.NotAfter.Before(g.before) {
			g.before = c.NotAfter
		}
	}
	return g
}

// watchFolder takes an issuer that replaced the former one. What is wrong with the new
// files is an alarm: the former one goes on.
func (a *Authority) watchFolder(ctx context.Context) error {
	// known is what is used, or will be.
	known := func(hash [sha256.Size]byte) bool {
		s := a.staged.Load()
		return hash == a.folderHash || s != nil && s.hash == hash
	}
	now := time.Now()
	if hash, err := external.FolderHash(a.cfg.Cacerts); err == nil && known(hash) && a.folderGood.holds(hash, now) {
		return nil // nor did an alarm end or begin
	}
	f, key, err := a.readFolder()
	a.alarm("cacerts", err)
	a.folderGood = folderGood{}
	if err != nil {
		return nil
	}
	a.folderGood = goodFolder(f, now)
	if known(f.Hash) {
		return nil
	}
	if err := a.takeExternal(ctx, f.Issuer, key, folderEntry(f.Issuer), f.Roots, f.Hash); err != nil {
		return fmt.Errorf("taking the new issuer in %s: %w", a.cfg.Cacerts, err)
	}
	return nil
}
