package caclient

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// ErrUnavailable is why nothing was issued while no authority could be reached.
var ErrUnavailable = errors.New("no authority can be reached")

const (
	maxToken   = 16 << 10
	maxMessage = 32 << 20 // the pods of a large node, a large bundle
	// rpcTimeout bounds Attest, and a batch of Issue.
	rpcTimeout = 20 * time.Second
	minBackoff = 100 * time.Millisecond
	maxBackoff = 10 * time.Second
	// minRenewal is the least time between two renewals that succeed, unless an
	// eighth of what is left of the SVID is less: a clock that is ahead must not make the
	// agent renew without pause.
	minRenewal = 10 * time.Second
)

// Credential is the agent's own SVID and what goes with it. It is immutable.
type Credential struct {
	SVID    *x509svid.SVID
	RenewAt time.Time
	// TokenBy is when a renewal needs a fresh token.
	TokenBy time.Time
}

func (c *Credential) valid(now time.Time) bool {
	return c != nil && now.Before(c.SVID.Certificates[0].NotAfter)
}

// Config is what a Client is made of.
type Config struct {
	// Addresses are HOST:PORT of the authority's replicas. At least one. Each agent
	// tries them in an order of its own.
	Addresses []string
	// TrustDomain and Node are the agent's own. Required.
	TrustDomain spiffeid.TrustDomain
	Node        string
	// RootFile (PEM, read again at each contact) or RootHash (SHA-256 of the
	// root's DER in hexadecimal) pins the authority. One is required.
	RootFile, RootHash string
	// TokenFile holds the agent's service-account token, audience signet-ca. It is
	// read at each attestation. Required.
	TokenFile string
	// Pods is filled with the pods of the node. Required.
	Pods *identity.Pods
	// Acknowledged is the trust sequence, at most current, that all streams of this
	// node have taken up, and a channel that is closed when it changes. Nil: every
	// sequence counts as acknowledged when it arrives.
	Acknowledged func(current uint64) (sequence uint64, changed <-chan struct{})
	// Tainted reports whether an SVID that is held on this node is to be replaced because
	// of what a trust calls tainted, and has a channel that is closed when that may have
	// changed. Nil: none is held.
	Tainted func(t *identity.Trust) (held bool, changed <-chan struct{})
	// UnknownKeys are the IDs of keys that tokens named and that TokenKeys does not
	// hold, at most 8, for the authority to look for, and a channel that is closed
	// when they change. Nil: there never are any.
	UnknownKeys func() (ids []string, changed <-chan struct{})
	// Saved and SavedTrust are from before a restart; nil if there is nothing.
	Saved      *Credential
	SavedTrust *identity.Trust
	// SavedLogHeads is what LogHeads returned before a restart.
	SavedLogHeads []byte
	// SavedBans is what SavedBans returned before a restart.
	SavedBans []byte
	// Enforce puts bans in force; it is called by New with those that were saved, and
	// with others before they are acknowledged. Nil: nobody is denied.
	Enforce func(*identity.Bans)
	// Dial connects to one of Addresses; nil means TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Version goes into the authority's log.
	Version string
	// Log is for operators; nil discards it. Metrics may be nil.
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Client talks to the authority for one agent. New makes one, Run does the work.
type Client struct {
	cfg     Config
	pin     pin
	order   *order
	trust   identity.Watched[*identity.Trust]
	cred    identity.Watched[*Credential]
	keys    identity.Watched[identity.TokenKeys]
	bans    identity.Watched[*heldBans] // nil: none were said
	hearing sync.Mutex                  // held while what an authority says is taken; nothing else needs it
	nodeUID atomic.Pointer[string]
	session identity.Watched[*session]
	up      identity.Watched[uint64] // how often the authority was reached after it was not
	heads   heads
	contact contact
	wall    func() time.Time          // the system's clock
	failure atomic.Pointer[error]     // why there is no session; nil while there is one
	warned  atomic.Bool               // the first failure of this process was logged
	told    atomic.Bool               // the state of trust was heard at least once in this process
	judged  atomic.Pointer[time.Time] // when a replica was left last because of how it answered
	synced  atomic.Bool               // the pods of the node were heard at least once in this process
	metrics *metrics
}

// New checks the configuration. It reaches for nothing.
func New(cfg Config) (*Client, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	p, err := newPin(cfg.RootFile, cfg.RootHash)
	errs := []error{err}
	if len(cfg.Addresses) == 0 {
		errs = append(errs, errors.New("ca.addresses: at least one HOST:PORT is required"))
	}
	for _, a := range cfg.Addresses {
		if _, _, err := net.SplitHostPort(a); err != nil {
			errs = append(errs, fmt.Errorf("ca.addresses: %q is not HOST:PORT", a))
		}
	}
	if _, err := identity.AgentID(cfg.TrustDomain, cfg.Node); err != nil {
		errs = append(errs, fmt.Errorf("node: %w", err))
	}
	if cfg.TokenFile == "" {
		errs = append(errs, errors.New("ca.tokenFile: is required"))
	}
	if cfg.Pods == nil {
		errs = append(errs, errors.New("a set of pods is required"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("configuring the authority's client: %w", err)
	}
	c := &Client{cfg: cfg, pin: p, order: newOrder(cfg.Node, cfg.Addresses), wall: time.Now, metrics: newMetrics(cfg.Metrics)}
	if cfg.SavedTrust != nil && cfg.SavedTrust.TrustDomain() == cfg.TrustDomain {
		c.trust.Store(cfg.SavedTrust)
	}
	if cfg.Saved.valid(time.Now()) {
		c.cred.Store(cfg.Saved)
	}
	if err := c.heads.load(cfg.SavedLogHeads); err != nil {
		cfg.Log.Warn("what was saved of issuance logs is not used", "err", err)
	}
	if err := c.loadBans(cfg.SavedBans); err != nil {
		cfg.Log.Error("bans", "err", err)
	}
	notYet := errors.New("not attested yet")
	c.failure.Store(&notYet)
	return c, nil
}

// Trust is the newest state of trust, nil before the first contact, and a channel
// that is closed when it changes.
func (c *Client) Trust() (*identity.Trust, <-chan struct{}) { return c.trust.Load() }

// Credential is the agent's own SVID, nil before the first attestation, and a
// channel that is closed when it changes.
func (c *Client) Credential() (*Credential, <-chan struct{}) { return c.cred.Load() }

// TokenKeys are the keys of the issuer of workloads' tokens, as the authority said
// last, and a channel that is closed when it says something else. The issuer is
// empty before.
func (c *Client) TokenKeys() (identity.TokenKeys, <-chan struct{}) { return c.keys.Load() }

// Reached counts how often the authority was reached after it was not, and has a
// channel that is closed when it is reached again: what failed in the outage can
// be asked for at once.
func (c *Client) Reached() (times uint64, changed <-chan struct{}) { return c.up.Load() }

// NodeUID is the UID of the node as the authority knows it, or empty.
func (c *Client) NodeUID() string {
	if p := c.nodeUID.Load(); p != nil {
		return *p
	}
	return ""
}

// Ready is nil while there is a session with an authority, else the reason why
// there is none.
func (c *Client) Ready() error {
	if p := c.failure.Load(); p != nil {
		return *p
	}
	return nil
}

// Synced reports whether the authority has told the pods of the node since this
// process started.
func (c *Client) Synced() bool { return c.synced.Load() }

// Run attests, renews and keeps sessions until ctx ends; then it returns nil.
// Whatever fails is retried with backoff: an agent never gives up what it has.
func (c *Client) Run(ctx context.Context) error {
	c.contact.tried()
	var old *session
	defer func() {
		if old != nil {
			old.end()
		}
	}()
	overdue := false
	for attempt := 0; ; {
		cred := c.cred.Value()
		var err error
		if !cred.valid(time.Now()) {
			cred, err = c.attest(ctx)
			overdue = false
		}
		if err == nil {
			next := c.open(ctx, cred)
			next.overdue = overdue
			c.session.Store(next)
			if old != nil {
				old.end()
			}
			old = next
			err = c.hold(ctx, next)
			// Who leaves one replica after the other waits longer each time.
			if err == nil || next.served.Load() || next.heard.Load() && !errors.Is(err, errLeft) {
				attempt = 0
			}
			if errors.Is(err, errLeft) {
				c.order.last(next.at.value(), time.Now())
			}
			overdue = errors.Is(err, errOverdue)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			continue // renewed: the next session takes over
		}
		c.failed(err)
		wait := delay(attempt, mathrand.Float64())
		attempt++
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// failed notes why there is no session.
func (c *Client) failed(err error) {
	c.metrics.failures.Inc()
	level := slog.LevelDebug // a warning for each outage, not for each attempt
	if c.failure.Swap(&err) == nil || c.warned.CompareAndSwap(false, true) {
		level = slog.LevelWarn
	}
	c.cfg.Log.Log(context.Background(), level, "no session with the authority; trying again", "node", c.cfg.Node, "err", err)
}

// delay is the time before the next attempt: doubling from 100 ms to 10 s, and
// half of it at random so that agents do not come back together. random is in
// [0, 1).
func delay(attempt int, random float64) time.Duration {
	d := maxBackoff
	if attempt < 10 {
		d = min(maxBackoff, minBackoff<<attempt)
	}
	return d/2 + time.Duration(random*float64(d/2))
}

// hold waits on a session until the credential has been renewed (nil), or the
// session has to be given up.
func (c *Client) hold(ctx context.Context, s *session) error {
	end := s.cred.SVID.Certificates[0].NotAfter
	pause := minRenewal
	if left := time.Until(end); left > 0 {
		pause = min(pause, left/8)
	}
	begun, renewing := time.Now(), false
	renew := time.NewTimer(max(time.Until(s.cred.RenewAt), pause))
	defer renew.Stop()
	if s.overdue {
		renew.Reset(0)
	}
	look := time.NewTicker(lookAgain)
	defer look.Stop()
	for attempt := 0; ; attempt++ {
		if c.contact.silent(time.Now()) {
			c.contact.tried()
			_, err := c.attest(ctx)
			switch {
			case err == nil:
				return nil
			case ctx.Err() != nil:
				return ctx.Err()
			}
			c.failed(err)
		}
		trust, changed := c.trust.Load()
		if at, ok := replaceAt(trust, s.cred, &s.hurried); ok {
			renew.Reset(min(at, max(time.Until(s.cred.RenewAt), 0)))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
			attempt--
			continue
		case err := <-s.refused:
			// The authority does not know this SVID (any more): the pod was replaced
			// or its store was restored. A token is the way back.
			c.cred.Store(nil)
			return err
		case <-s.left:
			return errLeft
		case <-look.C:
			// The timer stands still while the machine sleeps, and the SVID grows old.
			if attempt--; renewing || c.wall().Before(s.cred.RenewAt) || time.Since(begun) < pause {
				continue
			}
		case <-renew.C:
		}
		renewing = true
		cred, err := c.renew(ctx, s)
		if err == nil {
			c.cred.Store(cred)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		c.failed(fmt.Errorf("renewing the agent's SVID: %w", err))
		if !time.Now().Before(end) {
			c.cred.Store(nil)
			return fmt.Errorf("the agent's SVID expired at %s: %w", end.Format(time.RFC3339), err)
		}
		if errors.Is(err, errOverdue) {
			return err
		}
		renew.Reset(min(delay(attempt, mathrand.Float64()), max(time.Until(end), 0)))
	}
}

// replaceAt is in how long the agent's own SVID is to be replaced because a tainted
// authority issued it; false if that is not so, or was said before.
func replaceAt(t *identity.Trust, cred *Credential, said *bool) (in time.Duration, ok bool) {
	if t == nil || *said || !t.Taints(cred.SVID.Certificates[0]) {
		return 0, false
	}
	*said = true
	_, spread := t.Tainted()
	return time.Duration(mathrand.Float64() * float64(spread)), true
}

// renew asks for the next agent SVID, by certificate and, where that is refused
// or a token is due, by token.
func (c *Client) renew(ctx context.Context, s *session) (*Credential, error) {
	if time.Until(s.cred.TokenBy) > 0 {
		cred, err := c.exchange(ctx, s.conn, &capb.AttestRequest{Evidence: &capb.AttestRequest_Renewal{Renewal: &capb.Renewal{}}})
		if err == nil {
			return cred, nil
		}
		switch status.Code(err) {
		case codes.Unauthenticated, codes.PermissionDenied:
		case codes.Unavailable:
			return nil, fmt.Errorf("%w: %w: %w", errOverdue, errLeft, err)
		default:
			return nil, err
		}
		c.cfg.Log.Info("renewal by certificate refused; attesting with the token", "node", c.cfg.Node, "err", err)
	}
	return c.attest(ctx)
}

// attest proves the node with the agent's token, over a connection without a
// client certificate.
func (c *Client) attest(ctx context.Context) (*Credential, error) {
	token, err := readToken(c.cfg.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("attesting: %w", err)
	}
	var at reached
	conn, err := c.dial(nil, &at)
	if err != nil {
		return nil, fmt.Errorf("attesting: %w", err)
	}
	defer conn.Close()
	cred, err := c.exchange(ctx, conn, &capb.AttestRequest{Evidence: &capb.AttestRequest_Token{Token: token}})
	// An authority that has too much to do says so on a connection that is good: to give
	// that up would cost it another handshake for each attempt.
	for attempt := 3; status.Code(err) == codes.ResourceExhausted && attempt < 20; attempt++ {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("attesting: %w", ctx.Err())
		case <-time.After(delay(attempt, mathrand.Float64())):
		}
		cred, err = c.exchange(ctx, conn, &capb.AttestRequest{Evidence: &capb.AttestRequest_Token{Token: token}})
	}
	if err != nil {
		if status.Code(err) == codes.Unavailable {
			c.order.last(at.value(), time.Now()) // it answers, and cannot record or does not know the pod yet
		}
		return nil, fmt.Errorf("attesting: %w", err)
	}
	c.cred.Store(cred)
	c.contact.tried()
	return cred, nil
}

// exchange makes a key, calls Attest and checks the answer.
func (c *Client) exchange(ctx context.Context, conn *grpc.ClientConn, req *capb.AttestRequest) (*Credential, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if req.PublicKey, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		return nil, err
	}
	req.Version = c.cfg.Version
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	resp, err := capb.NewAuthorityClient(conn).Attest(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := c.hear(&capb.WatchTrustResponse{Trust: resp.GetTrust()}); err != nil {
		return nil, err
	}
	chain, renewAt, err := parseSVID(resp.GetSvid())
	if err != nil {
		return nil, err
	}
	want, err := identity.AgentID(c.cfg.TrustDomain, c.cfg.Node)
	if err != nil {
		return nil, err
	}
	id, err := identity.CheckSVID(chain[0])
	if err != nil {
		return nil, err
	}
	if id != want {
		return nil, fmt.Errorf("the authority attested %s, this agent is configured as %s: the token is of another node; check node and ca.tokenFile", id, want)
	}
	if pub, ok := chain[0].PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(key.Public()) {
		return nil, errors.New("the authority certified another key")
	}
	if _, _, err := x509svid.Verify(chain, c.trust.Value(), x509svid.WithTime(identity.VerifiedAt(chain, time.Now()))); err != nil {
		return nil, fmt.Errorf("the agent's new SVID: %w", err)
	}
	c.metrics.notAfter.Set(float64(chain[0].NotAfter.Unix()))
	return &Credential{SVID: &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, RenewAt: renewAt, TokenBy: resp.GetTokenBy().AsTime()}, nil
}

// hear takes what an authority says, one message at a time: at a renewal two sessions are
// open for a moment, and what the earlier one was told before must not follow what the later
// one was told. The keys of tokens and the bans of an authority whose trust is not believed
// are not taken either.
func (c *Client) hear(m *capb.WatchTrustResponse) error {
	c.hearing.Lock()
	defer c.hearing.Unlock()
	if err := c.believe(m.GetTrust()); err != nil {
		return err
	}
	c.learn(m.GetTokenKeys())
	c.heed(m.GetBans())
	return nil
}

// believe takes a state of trust from a recognised authority, unless it is older
// than the one that is known. hearing is held.
func (c *Client) believe(p *capb.Trust) error {
	t, err := parseTrust(c.cfg.TrustDomain, p)
	if err != nil {
		return fmt.Errorf("the authority's trust bundle: %w", err)
	}
	old := c.trust.Value()
	switch {
	case old != nil && t.Sequence() < old.Sequence():
		return fmt.Errorf("the authority's trust bundle has sequence %d, %d is known: an old state was put back; raise the sequence with a restore", t.Sequence(), old.Sequence())
	case old != nil && t.Sequence() == old.Sequence() && (string(t.PEM()) != string(old.PEM()) || string(t.CRLPEM()) != string(old.CRLPEM())):
		return fmt.Errorf("the authority's trust bundle with sequence %d differs from the one that is known: there are two authorities, or one was set up anew; if that was meant, stop the agent, remove its saved state and start it", t.Sequence())
	case old != nil && t.Sequence() == old.Sequence():
		// What was saved does not say what is tainted.
		was, _ := old.Tainted()
		if is, _ := t.Tainted(); slices.EqualFunc(was, is, bytes.Equal) {
			c.told.Store(true)
			return nil
		}
	}
	c.trust.Store(t)
	c.told.Store(true)
	c.cfg.Log.Info("trust changed", "trust_domain", t.TrustDomain().Name(), "sequence", t.Sequence(), "roots", len(t.Roots()))
	return nil
}

func (c *Client) dial(client *tls.Certificate, at *reached) (*grpc.ClientConn, error) {
	cfg := tlsConfig(c.cfg.TrustDomain, c.pin, c.trust.Value, client)
	dial := at.dialer(c.cfg.Dial)
	if client != nil {
		dial = c.contact.dialer(dial)
	}
	return grpc.NewClient("signet:///authority",
		grpc.WithContextDialer(dial),
		grpc.WithResolvers(replicas(c.order.at(time.Now()))),
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithDisableServiceConfig(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 5 * time.Second,
			Backoff: backoff.Config{BaseDelay: minBackoff, Multiplier: 1.6, Jitter: 0.5, MaxDelay: 3 * time.Second}}))
}

func readToken(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("reading the agent's token: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	if err != nil {
		return "", fmt.Errorf("reading the agent's token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if len(b) > maxToken || token == "" {
		return "", fmt.Errorf("reading the agent's token: %s holds %d bytes, which is no token", path, len(b))
	}
	return token, nil
}

func parseSVID(p *capb.X509SVID) ([]*x509.Certificate, time.Time, error) {
	if n := len(p.GetChain()); n == 0 || n > 8 {
		return nil, time.Time{}, fmt.Errorf("the authority sent a chain of %d certificates", n)
	}
	var chain []*x509.Certificate
	for _, der := range p.GetChain() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, time.Time{}, fmt.Errorf("the authority sent a certificate that does not parse: %w", err)
		}
		chain = append(chain, c)
	}
	if err := p.GetRenewAt().CheckValid(); err != nil {
		return nil, time.Time{}, fmt.Errorf("the authority sent no time to renew: %w", err)
	}
	return chain, p.GetRenewAt().AsTime(), nil
}

func parseTrust(td spiffeid.TrustDomain, p *capb.Trust) (*identity.Trust, error) {
	if p.GetTrustDomain() != td.Name() {
		return nil, fmt.Errorf("it is of trust domain %q, this agent is of %s", p.GetTrustDomain(), td.Name())
	}
	var roots []*x509.Certificate
	for _, b := range p.GetBundles() {
		if b.GetTrustDomain() != td.Name() {
			continue
		}
		for _, der := range b.GetX509Authorities() {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, err
			}
			roots = append(roots, c)
		}
	}
	t, err := identity.NewTrust(p.GetSequence(), td, roots)
	if err != nil {
		return nil, err
	}
	var lists []*x509.RevocationList
	for _, der := range p.GetCrls() {
		c, err := x509.ParseRevocationList(der)
		if err != nil {
			return nil, fmt.Errorf("a CRL: %w", err)
		}
		lists = append(lists, c)
	}
	if t, err = t.WithCRLs(lists); err != nil {
		return nil, err
	}
	return t.WithTainted(p.GetTainted(), p.GetTaintSpread().AsDuration()), nil
}
