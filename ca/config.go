package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/storage"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Attestor verifies evidence. *attest.Attestor is one.
type Attestor interface {
	Attest(ctx context.Context, e attest.Evidence) (w identity.Workload, until time.Time, err error)
}

// AgentAttestor verifies agents' tokens, and knows which accounts agents run under.
type AgentAttestor interface {
	Attestor
	// Allows reports whether w runs under an account whose tokens are accepted.
	Allows(w identity.Workload) bool
}

// TokenKeys knows the keys of the issuer of workloads' tokens.
type TokenKeys interface {
	// Published is what is known now, to be handed to agents, and a channel that is
	// closed when that changes. An empty issuer: nothing is known yet.
	Published() (keys identity.TokenKeys, changed <-chan struct{})
	attest.KeySource
}

// Config is what an Authority is made of.
type Config struct {
	// TrustDomain is required, and cannot change once the authority exists.
	TrustDomain spiffeid.TrustDomain
	// Instance tells replicas apart, 1 to 127; it is the first byte of every
	// serial. 0 means 1.
	Instance uint8
	// DataDir holds the authority's folder. Required. It must exist and not be
	// open to others.
	DataDir string
	// Shared is the state that replicas have in common, and the place of their logs; then
	// DataDir holds this replica's keys alone, and an Instance of 0 means the one that it
	// has claimed, or claims, in the state.
	Shared Shared
	// DNSNames go into the authority's own serving certificate, beside its SPIFFE
	// ID.
	DNSNames []string
	// RootTTL is the life of a new root; 0 means a year. IntermediateTTL is that
	// of an intermediate, renewed at half of it; 0 means 7 days.
	RootTTL, IntermediateTTL time.Duration
	// RootReplica is the instance of the replica that holds the key of this authority's own
	// root, where replicas share their state and the key is not in a device that all
	// reach: it replaces the root, and signs the intermediates of the others. 0: none does.
	RootReplica uint8
	// At most one of the next three says that the root is not this authority's own.
	//
	// OfflineRoot: a root that is kept away signs a series of intermediates in
	// advance; see Request and Import.
	OfflineRoot bool
	// Cacerts is a folder with an issuer and its key, as Istio has them: ca-cert.pem,
	// ca-key.pem, cert-chain.pem, root-cert.pem, or tls.crt, tls.key, ca.crt. Read again
	// when it changes.
	Cacerts string
	// Upstream has each intermediate signed by a command.
	Upstream UpstreamConfig
	// Propagation is how long a new root is published before anything is issued under
	// it, for those who trust it without saying so; 0 means a minute. Agents say so,
	// and are waited for.
	Propagation time.Duration
	// Consumers are others who trust roots without saying so, by name, and how long
	// each takes to have a new one. The longest of them and Propagation is waited for
	// when this authority's own root is replaced.
	Consumers map[string]time.Duration
	// TaintSpread is how long the replacement of SVIDs is spread over when an authority is
	// tainted; 0 means a minute.
	TaintSpread time.Duration
	// CRL says whether and how revoked certificates are published.
	CRL CRLConfig
	// Keys says where the authority's keys are made and how they are opened; the
	// zero value means files in DataDir. Its Folder and Logger are not used.
	Keys keys.Config
	// SVID says how long leaves live.
	SVID SVIDConfig
	// Pods is the authority's own view of the pods that are alive. Required.
	Pods *identity.Pods
	// PodsStale is since when Pods is not kept up to date because what it is read from is
	// away, zero while it is. Agents then forget no pod that is not in Pods, and ask
	// another replica for one that is not known. Nil: it always is kept up to date.
	PodsStale func() time.Time
	// Agents verifies an agent's token: audience signet-ca, an account on the
	// allow-list. An agent whose account was taken off the list is none from then on,
	// whatever its SVID says. Required.
	Agents AgentAttestor
	// Workloads verifies a workload's token: audience signet. Required.
	Workloads Attestor
	// TokenKeys are handed to agents, which verify their proxies' tokens with them;
	// nil: agents have keys of their own.
	TokenKeys TokenKeys
	// TokenEvery is how long an agent may renew without a fresh token; 0 means a
	// day.
	TokenEvery time.Duration
	// HeadInterval is how often the head of a log that grew is signed; 0 means
	// 10 seconds.
	HeadInterval time.Duration
	// LogRetention is how long records of the issuance log are kept, by whole
	// segments; 0 keeps them for ever.
	LogRetention time.Duration
	// AcceptLogLoss is the record at which a signed head was lost that the operator
	// accepts the loss of; 0 for none. Another loss than that stays open.
	AcceptLogLoss uint64
	// AcceptClock is the newest record where the operator accepts the system's clock,
	// although it is far from that record's time; 0 for none. It has no effect once
	// anything was recorded after that.
	AcceptClock uint64
	// Built is when this program was made, before which no clock can be right; zero if
	// that is not known.
	Built time.Time
	// Version goes into Status.
	Version string
	// Log receives what operators should read; nil discards it.
	Log *slog.Logger
	// Metrics is where metrics are registered; nil means nowhere.
	Metrics prometheus.Registerer
	// Limits bound what agents and clients can ask for.
	Limits LimitsConfig
	// LogOptions and StoreOptions pass the storage engine's seams through, for
	// tests. The zero values are right for use.
	LogOptions   storage.LogOptions
	StoreOptions storage.BoltOptions
	// wall is the system's clock; nil means time.Now.
	wall func() time.Time
	// maxBanSerials is maxBanSerials, or in tests less; 0: that.
	maxBanSerials int
}

// LimitsConfig bounds what callers can make the authority do. A rate of 0 is no limit; of
// the others 0 means the default.
type LimitsConfig struct {
	// AgentRate is how many items an agent may ask for in a second, AgentBurst how many
	// at once.
	AgentRate, AgentBurst int
	// IdentityRate and IdentityBurst are those of one SPIFFE ID on one node.
	IdentityRate, IdentityBurst int
	// ClientRate and ClientBurst are those of a client of another door, a pod.
	ClientRate, ClientBurst int
	// Connections are open at once at each door; 0 means 32768. Handshakes are under way
	// at once, and HandshakesPerAddress those of one address; 0 means 128 and 64.
	Connections, Handshakes, HandshakesPerAddress int
}

// CRLConfig says how revoked certificates are published: as one certificate
// revocation list (RFC 5280 section 5) of each issuing authority, to agents and over
// HTTP. Revoked certificates are refused by this authority in any case.
type CRLConfig struct {
	// Enabled signs lists. A proxy that checks them refuses what an authority without
	// a list issued, so a new intermediate is used when every agent has its list.
	Enabled bool
	// Lifetime is how long a list is good for. It is signed anew at half of that, and
	// whenever something is revoked. 0 means twice SVID.MaxTTL, which is the least: so
	// SVIDs expire before lists do where the authority is away.
	Lifetime time.Duration
}

// UpstreamConfig says how intermediates are signed elsewhere.
type UpstreamConfig struct {
	// Exec is a program and its arguments: it gets a certificate request, in PEM, on
	// its standard input and prints the chain, the new intermediate first.
	Exec []string
	// Timeout is how long it may take; 0 means 30 seconds.
	Timeout time.Duration
	// RootFile holds the roots, in PEM, that the chain may lead to. Required with Exec.
	RootFile string
}

// SVIDConfig says how long leaves live and how far back they start.
type SVIDConfig struct {
	// TTL is the life of a workload's SVID, AgentTTL that of an agent's and of
	// the authority's own. 0 means an hour.
	TTL, AgentTTL time.Duration
	// MinTTL and MaxTTL bound both; 0 means a minute and 24 hours.
	MinTTL, MaxTTL time.Duration
	// Backdate is how long before now a certificate becomes valid, for clocks
	// that lag; 0 means a minute.
	Backdate time.Duration
	// AcceptedKeys are the kinds of public keys that are certified, out of
	// profile.AllKeys (RSA of 2048 bits and more); nil means all.
	// P-256, which agents use, must be among them.
	AcceptedKeys []string
}

func (c Config) withDefaults() Config {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if c.Instance == 0 && !c.shared() {
		c.Instance = 1
	}
	def(&c.RootTTL, 365*24*time.Hour)
	def(&c.IntermediateTTL, 7*24*time.Hour)
	def(&c.SVID.TTL, time.Hour)
	def(&c.SVID.AgentTTL, time.Hour)
	def(&c.SVID.MinTTL, time.Minute)
	def(&c.SVID.MaxTTL, 24*time.Hour)
	def(&c.SVID.Backdate, time.Minute)
	if c.SVID.AcceptedKeys == nil {
		c.SVID.AcceptedKeys = profile.AllKeys
	}
	def(&c.TokenEvery, 24*time.Hour)
	def(&c.HeadInterval, 10*time.Second)
	def(&c.Upstream.Timeout, 30*time.Second)
	def(&c.Propagation, time.Minute)
	def(&c.TaintSpread, time.Minute)
	def(&c.CRL.Lifetime, 2*c.SVID.MaxTTL)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c Config) check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.TrustDomain.IsZero() {
		bad("trustDomain: is required")
	}
	if c.Instance > 0x7f {
		bad("instance %d: must be 1 to 127", c.Instance)
	}
	if c.DataDir == "" {
		bad("dataDir: is required")
	}
	if c.Pods == nil || c.Agents == nil || c.Workloads == nil {
		bad("a view of the pods and attestors for agents and workloads are required")
	}
	s := c.SVID
	for _, d := range []struct {
		key string
		v   time.Duration
	}{{"svid.ttl", s.TTL}, {"svid.agentTTL", s.AgentTTL}} {
		switch {
		case d.v < s.MinTTL:
			bad("%s %v: is shorter than svid.minTTL (%v); lower that only for tests", d.key, d.v, s.MinTTL)
		case d.v > s.MaxTTL:
			bad("%s %v: is longer than svid.maxTTL (%v); a long-lived SVID cannot be taken back before it expires", d.key, d.v, s.MaxTTL)
		}
	}
	if s.MinTTL < time.Second || s.MaxTTL < s.MinTTL {
		bad("svid.minTTL %v and svid.maxTTL %v: must be at least a second and in order", s.MinTTL, s.MaxTTL)
	}
	if s.Backdate < 0 || s.Backdate > time.Hour {
		bad("svid.backdate %v: must be between 0 and an hour", s.Backdate)
	}
	if c.IntermediateTTL < 2*max(s.TTL, s.AgentTTL) {
		bad("authority.intermediateTTL %v: must be at least twice the longest SVID's, or leaves would be cut short", c.IntermediateTTL)
	}
	if c.RootTTL < 2*c.IntermediateTTL {
		bad("authority.rootTTL %v: must be at least twice authority.intermediateTTL (%v)", c.RootTTL, c.IntermediateTTL)
	}
	if n := btoi(c.OfflineRoot) + btoi(c.Cacerts != "") + btoi(len(c.Upstream.Exec) > 0); n > 1 {
		bad("authority.offlineRoot, authority.cacerts and authority.upstream.exec: only one of them can be")
	}
	if (len(c.Upstream.Exec) > 0) != (c.Upstream.RootFile != "") {
		bad("authority.upstream.exec and authority.upstream.rootFile: both or neither: the roots are pinned, so that the command cannot introduce another")
	}
	if c.source() != sourceOwn && c.Keys.Made[keys.Root] != "" && c.Keys.Made[keys.Root] != "softkms:" {
		bad("authority.keys.root: the root is not this authority's own, so it has no key of it")
	}
	if err := c.Keys.Check(); err != nil {
		bad("%w", err)
	}
	if err := profile.CheckKeyKinds(s.AcceptedKeys); err != nil {
		bad("%w", err)
	}
	if c.shared() {
		if err := c.CheckShared(); err != nil {
			bad("%w", err)
		}
	}
	if c.RootReplica != 0 && !c.shared() {
		bad("authority.rootReplica: there is one replica, which has its root; it is for several (storage.etcd)")
	}
	if c.CRL.Lifetime < 2*s.MaxTTL {
		bad("authority.crl.lifetime %v: must be at least twice svid.maxTTL (%v): a list that expires before the SVIDs do stops all traffic of proxies that check it", c.CRL.Lifetime, s.MaxTTL)
	}
	if c.LogRetention != 0 && c.LogRetention < 2*s.MaxTTL {
		bad("issuanceLog.retention %v: must be at least twice svid.maxTTL (%v): what is still valid must be in the log", c.LogRetention, s.MaxTTL)
	}
	for _, n := range c.DNSNames {
		if !validDNSName(n) {
			bad("dnsNames: %q is not a DNS name in lower case", n)
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("configuring the authority: %w", errors.Join(errs...))
	}
	return nil
}

// validDNSName takes what RFC 1123 §2.1 allows, in lower case, no wildcards: the
// names are those of this authority's own service.
func validDNSName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	label := 0
	for i := range len(s) {
		ch := s[i]
		switch {
		case ch == '.':
			if label == 0 || s[i-1] == '-' {
				return false
			}
			label = 0
			continue
		case ch == '-':
			if label == 0 {
				return false
			}
		case (ch < 'a' || ch > 'z') && (ch < '0' || ch > '9'):
			return false
		}
		if label++; label > 63 {
			return false
		}
	}
	return label > 0 && s[len(s)-1] != '-'
}
