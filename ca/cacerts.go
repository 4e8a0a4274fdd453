package ca

import (
	"context"
	"crypto"
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

// watchFolder takes an issuer that replaced the former one. What is wrong with the new
// files is an alarm: the former one goes on.
func (a *Authority) watchFolder(ctx context.Context) error {
	f, key, err := a.readFolder()
	a.alarm("cacerts", err)
	if err != nil || f.Hash == a.folderHash {
		return nil
	}
	if s := a.staged.Load(); s != nil && s.hash == f.Hash {
		return nil
	}
	if err := a.takeExternal(ctx, f.Issuer, key, folderEntry(f.Issuer), f.Roots, f.Hash); err != nil {
		return fmt.Errorf("taking the new issuer in %s: %w", a.cfg.Cacerts, err)
	}
	return nil
}
