package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/signet-mesh/signet/ca/external"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/keys"
)

// upstreamPause is how long an upstream that did not sign under another root is not asked
// again, while the present intermediate is good.
const upstreamPause = 30 * time.Second

// askUpstream makes a key and has the command sign it.
func (a *Authority) askUpstream(ctx context.Context, roots []*x509.Certificate) (got external.Issuer, key crypto.Signer, entry journal.Entry, err error) {
	uri, key, err := a.keys.Create(keys.Intermediate)
	if err != nil {
		return external.Issuer{}, nil, journal.Entry{}, err
	}
	defer func() {
		if err != nil {
			// The key certifies nothing; it must not stay behind as if it did.
			err = errors.Join(fmt.Errorf("authority.upstream.exec: %w", err), a.keys.Remove(keys.Intermediate, uri))
		}
	}()
	csr, err := external.Request(key, a.cfg.TrustDomain, a.instance)
	if err != nil {
		return external.Issuer{}, nil, journal.Entry{}, err
	}
	text, err := external.Command{Argv: a.cfg.Upstream.Exec, Timeout: a.cfg.Upstream.Timeout, Env: []string{
		"SIGNET_TRUST_DOMAIN=" + a.cfg.TrustDomain.Name(), fmt.Sprintf("SIGNET_TTL_SECONDS=%d", int64(a.cfg.IntermediateTTL.Seconds())),
	}}.Sign(ctx, external.RequestPEM(csr))
	if err != nil {
		return external.Issuer{}, nil, journal.Entry{}, err
	}
	certs, err := external.Certificates(text)
	if err != nil {
		return external.Issuer{}, nil, journal.Entry{}, fmt.Errorf("what it printed: %w", err)
	}
	got, err = external.Check(certs, external.Profile{TrustDomain: a.cfg.TrustDomain, DNSNames: a.cfg.DNSNames, Key: key.Public(), Roots: roots}, time.Now())
	if err == nil && time.Until(got.Cert.NotAfter) < 2*max(a.cfg.SVID.TTL, a.cfg.SVID.AgentTTL) {
		err = fmt.Errorf("validity: it ends at %s; it must last twice as long as an SVID", got.Cert.NotAfter.Format(time.RFC3339))
	}
	if err != nil {
		return external.Issuer{}, nil, journal.Entry{}, fmt.Errorf("the chain that it printed: %w", err)
	}
	return got, key, journal.ExternalEntry(got.Cert, got.Chain, journal.StateActive, uri), nil
}

func (a *Authority) renewUpstream(ctx context.Context) error {
	roots, err := external.ReadRoots(a.cfg.Upstream.RootFile)
	if err != nil {
		return fmt.Errorf("authority.upstream.rootFile: %w", err)
	}
	got, key, entry, err := a.askUpstream(ctx, roots)
	if err != nil {
		return err
	}
	return a.takeExternal(ctx, got, key, entry, roots, [32]byte{})
}

// followRootFile has the upstream sign another intermediate when the root of the present one
// is not in the file of its roots any more: other replicas, which renew at another time, have
// left that root, or are about to. As long as that fails the present one goes on, and the
// root stays in the bundle for it.
func (a *Authority) followRootFile(ctx context.Context, now time.Time) error {
	if a.cfg.source() != sourceUpstream || a.staged.Load() != nil || now.Before(a.upstreamAgain) {
		return nil
	}
	roots, err := external.ReadRoots(a.cfg.Upstream.RootFile)
	if err != nil {
		return nil // what is in it is asked when an intermediate is due
	}
	if root := a.root.Load(); root == nil || slices.ContainsFunc(roots, root.cert.Equal) {
		a.alarm("upstream root", nil)
		return nil
	}
	if err := a.renewIntermediate(ctx); err != nil {
		a.upstreamAgain = now.Add(upstreamPause)
		a.alarm("upstream root", fmt.Errorf("the root of the intermediate is not in authority.upstream.rootFile any more, and there is no intermediate under another one: %w", err))
		return nil
	}
	a.alarm("upstream root", nil)
	return nil
}
