package ca

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/external"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// maxSeries bounds the requests that wait at once.
const maxSeries = 128

// ErrImport is why a chain was not imported. Nothing was changed.
var ErrImport = errors.New("the chains were not imported")

// Offline is an authority with an offline root that no process serves, opened to make
// requests and to import what was signed.
type Offline struct{ a *Authority }

// OpenOffline opens the authority in cfg.DataDir, or makes one that has no intermediate
// yet. It fails with storage.ErrLocked while a process serves it: ask that process then.
// Of cfg, what serves agents is not needed.
func OpenOffline(ctx context.Context, cfg Config) (*Offline, error) {
	cfg = cfg.withDefaults()
	if !cfg.OfflineRoot {
		return nil, fmt.Errorf("authority.offlineRoot is not set: this authority's intermediates are signed by %s", sourceNames[cfg.source()])
	}
	cfg.Pods, cfg.Agents, cfg.Workloads, cfg.Metrics = &identity.Pods{}, nobody{}, nobody{}, nil
	if err := cfg.check(); err != nil {
		return nil, err
	}
	var a *Authority
	var dir string
	var err error
	if cfg.shared() {
		a, dir, err = assembleShared(ctx, cfg)
	} else if dir, err = ensureFolder(ctx, cfg); err == nil {
		a, err = assemble(cfg, dir, true)
	} else {
		return nil, err
	}
	if err == nil {
		if err = a.loadJournal(ctx); err != nil {
			err = errors.Join(err, a.closeStorage())
		}
	}
	if err != nil {
		return nil, fmt.Errorf("opening the authority in %s: %w", dir, err)
	}
	return &Offline{a}, nil
}

// nobody attests nobody.
type nobody struct{}

func (nobody) Allows(identity.Workload) bool { return false }

func (nobody) Attest(context.Context, attest.Evidence) (identity.Workload, time.Time, error) {
	return identity.Workload{}, time.Time{}, attest.ErrUnavailable
}

// Close closes it.
func (o *Offline) Close() error { return o.a.closeStorage() }

// Requests is [Authority.Requests].
func (o *Offline) Requests(ctx context.Context, n int) ([][]byte, error) {
	return o.a.Requests(ctx, n)
}

// Import is [Authority.Import].
func (o *Offline) Import(ctx context.Context, chains [][]byte) (Series, error) {
	return o.a.Import(ctx, chains)
}

// Requests are n certificate requests, PKCS#10 in DER, for an offline root to sign.
// Those that wait already come first, and as many as are missing are made, with their
// keys; asking again gives the same. n of 0 gives those that wait.
func (a *Authority) Requests(ctx context.Context, n int) ([][]byte, error) {
	fail := func(err error) ([][]byte, error) {
		return nil, fmt.Errorf("making certificate requests: %w", err)
	}
	if a.cfg.source() != sourceOffline {
		return fail(fmt.Errorf("authority.offlineRoot is not set: this authority's intermediates are signed by %s", sourceNames[a.cfg.source()]))
	}
	if n < 0 || n > maxSeries {
		return fail(fmt.Errorf("%d requests: at most %d", n, maxSeries))
	}
	var out [][]byte
	for _, e := range a.current().Authorities {
		if e.State == journal.StatePending {
			out = append(out, e.Request)
		}
	}
	var made []journal.Entry
	for len(out)+len(made) < n {
		uri, key, err := a.keys.Create(keys.Intermediate)
		var csr []byte
		if err == nil {
			csr, err = external.Request(key, a.cfg.TrustDomain, a.instance)
		}
		if err != nil {
			return fail(err)
		}
		made = append(made, journal.Entry{Kind: journal.KindIntermediate, State: journal.StatePending, Key: uri, Request: csr})
	}
	if len(made) == 0 {
		return out, nil
	}
	// The keys are durable before the journal names them. A crash between leaves keys
	// that certify nothing.
	if err := a.edit(ctx, func(j *journal.Journal) error { j.Authorities = append(j.Authorities, made...); return nil }); err != nil {
		return fail(err)
	}
	for _, e := range made {
		out = append(out, e.Request)
	}
	return out, nil
}

// Series is what an import made.
type Series struct {
	// Intermediates are those that were imported, in the order of their use.
	Intermediates []*x509.Certificate
	// Root is the one that they lead to.
	Root *x509.Certificate
	// End is when the last one ends.
	End time.Time
}

// Import takes chains, in PEM, each the intermediate first and up to the root, which
// may be left out if it is known. All are checked, and all are taken or none: each
// certifies the key of a request that waits, has the profile and path length of an
// intermediate, is in order and valid, and no constraint keeps SVIDs under it from
// verifying; all lead to one root, the authority's own if it has one; and each begins
// before the one that ends before it does, by twice the life of an SVID, so that no
// SVID is cut short. Errors wrap ErrImport where the chains are the reason.
func (a *Authority) Import(ctx context.Context, chains [][]byte) (Series, error) {
	if a.cfg.source() != sourceOffline {
		return Series{}, fmt.Errorf("%w: authority.offlineRoot is not set: this authority's intermediates are signed by %s", ErrImport, sourceNames[a.cfg.source()])
	}
	var out Series
	err := a.edit(ctx, func(j *journal.Journal) error {
		s, err := importChains(j, chains, external.Profile{TrustDomain: a.cfg.TrustDomain, DNSNames: a.cfg.DNSNames, Later: true},
			2*max(a.cfg.SVID.TTL, a.cfg.SVID.AgentTTL), time.Now().Round(0))
		if err != nil {
			return fmt.Errorf("%w: %w", ErrImport, err)
		}
		out = s
		return nil
	})
	if err != nil {
		return Series{}, err
	}
	a.cfg.Log.Info("intermediates imported", "count", len(out.Intermediates), "series_end", out.End)
	return out, nil
}

func importChains(j *journal.Journal, chains [][]byte, p external.Profile, overlap time.Duration, now time.Time) (Series, error) {
	if len(chains) == 0 || len(chains) > maxSeries {
		return Series{}, fmt.Errorf("%d chains: 1 to %d", len(chains), maxSeries)
	}
	var err error
	if p.Roots, err = j.Roots(); err != nil {
		return Series{}, err
	}
	var out Series
	for i, text := range chains {
		fail := func(err error) (Series, error) { return Series{}, fmt.Errorf("chain %d: %w", i+1, err) }
		certs, err := external.Certificates(text)
		if err != nil {
			return fail(err)
		}
		at := slices.IndexFunc(j.Authorities, func(e journal.Entry) bool { return e.State == journal.StatePending && certifies(e, certs[0]) })
		if at < 0 {
			return fail(fmt.Errorf("key: no request that waits is for the key of %s: the intermediate comes first in a file, and each is imported once", certs[0].Subject))
		}
		if p.Key, err = j.Authorities[at].Public(); err != nil {
			return fail(err)
		}
		iss, err := external.Check(certs, p, now)
		if err != nil {
			return fail(err)
		}
		if out.Root != nil && !out.Root.Equal(iss.Root) {
			return fail(fmt.Errorf("it leads to another root (%s) than the one before (%s)", iss.Root.Subject, out.Root.Subject))
		}
		out.Root, out.Intermediates = iss.Root, append(out.Intermediates, iss.Cert)
		e := journal.ExternalEntry(iss.Cert, iss.Chain, journal.StateNext, j.Authorities[at].Key)
		j.Authorities[at] = e
	}
	if len(p.Roots) == 0 {
		j.Authorities = append(j.Authorities, journal.RootEntries([]*x509.Certificate{out.Root})...)
	}
	slices.SortFunc(out.Intermediates, byStart)
	if out.End, err = checkSeries(j, overlap, now); err != nil {
		return Series{}, err
	}
	j.SeriesStart, j.SeriesEnd = now, out.End
	return out, nil
}

// certifies reports whether a certificate is of the entry's key.
func certifies(e journal.Entry, c *x509.Certificate) bool {
	r, err := x509.ParseCertificateRequest(e.Request)
	return err == nil && bytes.Equal(r.RawSubjectPublicKeyInfo, c.RawSubjectPublicKeyInfo)
}

func byStart(a, b *x509.Certificate) int {
	return cmp.Or(a.NotBefore.Compare(b.NotBefore), a.NotAfter.Compare(b.NotAfter))
}

// checkSeries checks that there is always one that can sign, from now to the end.
func checkSeries(j *journal.Journal, overlap time.Duration, now time.Time) (end time.Time, err error) {
	var series []*x509.Certificate
	for _, e := range j.Authorities {
		if e.Kind == journal.KindIntermediate && (e.State == journal.StateActive || e.State == journal.StateNext) {
			c, err := e.Cert()
			if err != nil {
				return end, err
			}
			series = append(series, c)
		}
	}
	slices.SortFunc(series, byStart)
	for _, c := range series {
		switch {
		case !now.Before(c.NotAfter):
			continue
		case end.IsZero() && c.NotBefore.After(now):
			return end, fmt.Errorf("order: the first of the series, %s, is not valid before %s, so nothing could be issued until then", c.Subject, c.NotBefore.Format(time.RFC3339))
		case !end.IsZero() && c.NotBefore.After(end.Add(-overlap)):
			return end, fmt.Errorf("order: %s begins at %s, and what comes before it ends at %s: they must overlap by %v, or SVIDs would be cut short", c.Subject, c.NotBefore.Format(time.RFC3339), end.Format(time.RFC3339), overlap)
		case !end.IsZero() && !c.NotAfter.After(end):
			return end, fmt.Errorf("order: %s ends at %s, no later than one that begins before it: it would never be used", c.Subject, c.NotAfter.Format(time.RFC3339))
		}
		end = c.NotAfter
	}
	return end, nil
}

// advance makes the next intermediate of the series the active one, if its time has
// come. That there is none is for the alarm to say, until there is no other.
func (a *Authority) advance(ctx context.Context, now time.Time) error {
	j := a.current()
	present := a.intermediate.Load()
	var next *x509.Certificate
	var entry journal.Entry
	for _, e := range j.Authorities {
		if e.State != journal.StateNext {
			continue
		}
		c, err := e.Cert()
		if err != nil {
			return err
		}
		usable := !now.Before(c.NotBefore) && now.Before(c.NotAfter) && (present == nil || c.NotAfter.After(present.cert.NotAfter))
		if usable && (next == nil || c.NotAfter.Before(next.NotAfter)) {
			next, entry = c, e
		}
	}
	if next == nil {
		if present == nil || !now.Before(present.cert.NotAfter) {
			return errors.New("no intermediate of the series is valid now: have more signed (`signet-ca authority csr`, `signet-ca authority import`)")
		}
		return nil
	}
	key, err := a.keys.Open(keys.Intermediate, entry.Key, next.PublicKey)
	if err != nil {
		return err
	}
	iss, err := issuerOf(entry, key)
	if err != nil {
		return err
	}
	root, err := a.rootOf(iss, j)
	if err != nil {
		return err
	}
	if present == nil || !now.Before(present.cert.NotAfter) {
		if err := a.take(ctx, iss, entry, nil); err != nil {
			return err
		}
		a.root.Store(&issuer{cert: root})
		return nil
	}
	return a.use(ctx, &staged{issuer: iss, entry: entry, root: root})
}

// seriesAlarm is 1 when less than a third is left of the life of an offline root's
// series, 2 when less than a tenth is.
func (a *Authority) seriesAlarm(now time.Time) int {
	j := a.current()
	if j.SeriesEnd.IsZero() {
		return 0
	}
	life, left := j.SeriesEnd.Sub(j.SeriesStart), j.SeriesEnd.Sub(now)
	switch {
	case left < life/10:
		return 2
	case left < life/3:
		return 1
	}
	return 0
}

// watchExternal looks at what others sign: it raises the alarm of an offline root's
// series, and takes a shared issuer that was replaced.
func (a *Authority) watchExternal(ctx context.Context, now time.Time) error {
	switch a.cfg.source() {
	case sourceFolder:
		return a.watchFolder(ctx)
	case sourceOffline:
		part := map[int]string{1: "a third", 2: "a tenth"}[a.seriesAlarm(now)]
		if part == "" {
			a.alarm("series", nil)
			break
		}
		a.alarm("series", fmt.Errorf("less than %s is left of the series of intermediates, which ends at %s: have more signed (`signet-ca authority csr`, `signet-ca authority import`)", part, a.current().SeriesEnd.Format(time.RFC3339)))
	}
	return nil
}

// CreateRequests implements signet.ca.v1.Admin.
func (s admin) CreateRequests(ctx context.Context, q *capb.CreateRequestsRequest) (*capb.CreateRequestsResponse, error) {
	if s.a.cfg.source() != sourceOffline {
		return nil, status.Error(codes.FailedPrecondition, "this authority has no offline root (authority.offlineRoot)")
	}
	out, err := s.a.Requests(ctx, int(min(q.GetCount(), maxSeries+1)))
	if err != nil {
		s.a.cfg.Log.Error("making certificate requests failed", "err", err)
		return nil, status.Error(codes.Internal, err.Error()) // an operator may know
	}
	return &capb.CreateRequestsResponse{Requests: out}, nil
}

// ImportChains implements signet.ca.v1.Admin.
func (s admin) ImportChains(ctx context.Context, q *capb.ImportChainsRequest) (*capb.ImportChainsResponse, error) {
	out, err := s.a.Import(ctx, q.GetChains())
	if errors.Is(err, ErrImport) {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err != nil {
		s.a.cfg.Log.Error("importing intermediates failed", "err", err)
		return nil, status.Error(codes.Internal, err.Error()) // an operator may know
	}
	return out.proto(), nil
}

func (s Series) proto() *capb.ImportChainsResponse {
	resp := &capb.ImportChainsResponse{Root: s.Root.Raw, SeriesEnd: timestamppb.New(s.End)}
	for _, c := range s.Intermediates {
		resp.Intermediates = append(resp.Intermediates, c.Raw)
	}
	return resp
}
