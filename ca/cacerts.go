package ca

import (
	"bytes"
	"context"
	"crypto"
	"fmt"
	"time"

	"github.com/signet-mesh/signet/ca/external"
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

func folderEntry(iss external.Issuer) journalEntry { return externalEntry(iss, stateActive, "") }

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
	if a.current().isOf(f) {
		a.intermediate.Store(iss)
		return nil
	}
	var added []journalEntry
	for _, e := range rootEntries(f.Roots) {
		if !hasRoot(a.current(), e) {
			added = append(added, e)
		}
	}
	if len(added) > 0 {
		err = a.changeTrust(ctx, func(j *journal) error { j.Authorities = append(j.Authorities, added...); return nil })
	}
	if err == nil {
		err = a.take(ctx, iss, folderEntry(f.Issuer), f.Roots)
	}
	return err
}

// isOf reports whether the journal has the issuer and the roots of a folder.
func (j journal) isOf(f external.Folder) bool {
	roots, issuer := 0, false
	for _, e := range j.Authorities {
		switch {
		case e.State != stateActive:
		case e.Kind == kindRoot:
			roots++
		default:
			issuer = bytes.Equal(e.Certificate, f.Cert.Raw)
		}
	}
	for _, e := range rootEntries(f.Roots) {
		if !hasRoot(j, e) {
			return false
		}
	}
	return issuer && roots == len(f.Roots)
}

func hasRoot(j journal, e journalEntry) bool {
	for _, o := range j.Authorities {
		if o.Kind == kindRoot && string(o.Certificate) == string(e.Certificate) {
			return true
		}
	}
	return false
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
