package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/cmd/internal/run"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
)

// config is ca.yaml. docs/configuration.md documents every key; a test holds the
// two together.
type config struct {
	// TrustDomain of every name that the authority gives out. It cannot change
	// once the authority exists.
	TrustDomain string `yaml:"trustDomain"`
	// Instance tells replicas apart, 1 to 127. 0: 1, or where replicas share their state
	// the one that this replica has claimed or claims.
	Instance uint8 `yaml:"instance"`
	// DataDir holds keys, state and issuance log. It must exist and not be open to
	// others.
	DataDir string `yaml:"dataDir"`
	// Storage says where state and issuance log are, if not in DataDir.
	Storage storageConfig `yaml:"storage"`
	// Listen is HOST:PORT for agents.
	Listen string `yaml:"listen"`
	// DNSNames of the serving certificate, beside the SPIFFE ID.
	DNSNames []string `yaml:"dnsNames"`
	// AdminSocket is the Unix socket for operators, mode 0600. Empty: admin.sock in
	// DataDir.
	AdminSocket string `yaml:"adminSocket"`
	// Publish says where the trust bundle is put for agents to pin.
	Publish struct {
		// RootFile gets the roots as PEM, written when the authority serves. Empty:
		// not written.
		RootFile string `yaml:"rootFile"`
	} `yaml:"publish"`
	// Authority says where the authority's own certificates and keys come from.
	Authority authorityConfig `yaml:"authority"`
	SVID      struct {
		TTL      time.Duration `yaml:"ttl"`
		AgentTTL time.Duration `yaml:"agentTTL"`
		MinTTL   time.Duration `yaml:"minTTL"`
		MaxTTL   time.Duration `yaml:"maxTTL"`
		Backdate time.Duration `yaml:"backdate"`
		// AcceptedKeys are the kinds of public keys that are certified.
		AcceptedKeys []string `yaml:"acceptedKeys"`
	} `yaml:"svid"`
	// Kubernetes says that pods and the issuer's keys come from an API server.
	Kubernetes struct {
		Enabled bool `yaml:"enabled"`
		// Kubeconfig says where the API server is. Empty: the pod's own service
		// account.
		Kubeconfig string `yaml:"kubeconfig"`
		// ServiceAccountDir is where the pod finds its service account's credentials.
		ServiceAccountDir string `yaml:"serviceAccountDir"`
		// Namespace of the installation, for the Lease and the ConfigMap.
		Namespace string `yaml:"namespace"`
		// ReviewWorkloads has the API server asked about workloads' tokens too.
		ReviewWorkloads bool `yaml:"reviewWorkloads"`
	} `yaml:"kubernetes"`
	// Tokens says how service-account tokens are verified.
	Tokens struct {
		Issuer   string `yaml:"issuer"`
		JWKSFile string `yaml:"jwksFile"`
		// Audience of workloads' tokens, AgentAudience of agents'.
		Audience      string `yaml:"audience"`
		AgentAudience string `yaml:"agentAudience"`
		// MaxLifetime refuses tokens that are good for longer.
		MaxLifetime time.Duration `yaml:"maxLifetime"`
		// Skew is allowed on the moments before which a token is not good.
		Skew time.Duration `yaml:"skew"`
	} `yaml:"tokens"`
	Agents struct {
		// ServiceAccounts are NAMESPACE/NAME of the accounts that agents run under.
		ServiceAccounts []string `yaml:"serviceAccounts"`
		// TokenEvery is how long an agent may renew without a fresh token.
		TokenEvery time.Duration `yaml:"tokenEvery"`
	} `yaml:"agents"`
	IssuanceLog struct {
		// HeadInterval is how often the head of the issuance log is signed.
		HeadInterval time.Duration `yaml:"headInterval"`
		// Retention is how long records are kept; 0 keeps them for ever.
		Retention time.Duration `yaml:"retention"`
	} `yaml:"issuanceLog"`
	// Istio is the door for Istio's own clients.
	Istio istioConfig `yaml:"istio"`
	// Limits bound what agents and clients can ask for.
	Limits limitsConfig `yaml:"limits"`
	// Workloads lists every pod, agents' own included, where there is no
	// Kubernetes.
	Workloads []workload     `yaml:"workloads"`
	Log       run.LogConfig  `yaml:"log"`
	HTTP      run.HTTPConfig `yaml:"http"`
}

type workload struct {
	Namespace      string            `yaml:"namespace"`
	ServiceAccount string            `yaml:"serviceAccount"`
	Pod            string            `yaml:"pod"`
	PodUID         string            `yaml:"podUID"`
	Node           string            `yaml:"node"`
	NodeUID        string            `yaml:"nodeUID,omitempty"`
	Labels         map[string]string `yaml:"labels,omitempty"`
	Addresses      []string          `yaml:"addresses,omitempty"`
	UnixUID        *uint32           `yaml:"unixUID,omitempty"`
}

// defaults is the configuration of an empty file.
func defaults() config {
	var c config
	c.TrustDomain = "cluster.local"
	c.Storage = defaultStorage()
	c.DataDir = "/var/lib/signet-ca"
	c.Listen = ":8443"
	c.Authority = defaultAuthority()
	c.SVID.TTL, c.SVID.AgentTTL, c.SVID.MinTTL, c.SVID.MaxTTL, c.SVID.Backdate = time.Hour, time.Hour, time.Minute, 24*time.Hour, time.Minute
	c.SVID.AcceptedKeys = slices.Clone(profile.AllKeys)
	c.Tokens.Audience, c.Tokens.AgentAudience = "signet", "signet-ca"
	c.Tokens.MaxLifetime, c.Tokens.Skew = attest.DefaultMaxLifetime, attest.DefaultSkew
	c.Kubernetes.Namespace, c.Kubernetes.ServiceAccountDir = "signet-system", run.ServiceAccountDir
	c.Agents.ServiceAccounts = []string{"signet-system/signet-agent"}
	c.Agents.TokenEvery = 24 * time.Hour
	c.IssuanceLog.HeadInterval, c.IssuanceLog.Retention = 10*time.Second, 90*24*time.Hour
	c.Istio = istioDefaults()
	c.Limits = limitsConfig{AgentRate: 200, AgentBurst: 4000, IdentityRate: 5, IdentityBurst: 300, ClientRate: 100, ClientBurst: 2000,
		Connections: 32768, Handshakes: 128, HandshakesPerAddress: 64}
	c.Log = run.LogConfig{Format: "text", Level: "info"}
	c.HTTP.Listen = ":9101"
	return c
}

func loadConfig(path string) (config, error) {
	c := defaults()
	if err := run.LoadConfig(path, &c); err != nil {
		return config{}, err
	}
	if c.AdminSocket == "" {
		c.AdminSocket = filepath.Join(c.DataDir, "admin.sock")
	}
	if err := c.oneWorld(); err != nil {
		return config{}, fmt.Errorf("reading configuration %s: %w", path, err)
	}
	if c.Tokens.Audience == c.Tokens.AgentAudience {
		return config{}, fmt.Errorf("reading configuration %s: tokens.audience and tokens.agentAudience are both %q: a workload's token must not pass for an agent's", path, c.Tokens.Audience)
	}
	if len(c.Agents.ServiceAccounts) == 0 {
		return config{}, fmt.Errorf("reading configuration %s: agents.serviceAccounts is empty: no agent could attest", path)
	}
	if err := c.sharedState(); err != nil {
		return config{}, fmt.Errorf("reading configuration %s: %w", path, err)
	}
	if err := c.Limits.check(); err != nil {
		return config{}, fmt.Errorf("reading configuration %s: %w", path, err)
	}
	if err := c.Istio.complete(c); err != nil {
		return config{}, fmt.Errorf("reading configuration %s: %w", path, err)
	}
	return c, nil
}

// limitsConfig bounds what agents and clients can ask for.
type limitsConfig struct {
	// AgentRate is how many SVIDs an agent may ask for in a second, AgentBurst how many
	// at once; the others are the same for a SPIFFE ID on a node, and for a client of
	// Istio's RPC.
	AgentRate     int `yaml:"agentRate"`
	AgentBurst    int `yaml:"agentBurst"`
	IdentityRate  int `yaml:"identityRate"`
	IdentityBurst int `yaml:"identityBurst"`
	ClientRate    int `yaml:"clientRate"`
	ClientBurst   int `yaml:"clientBurst"`
	// Connections are open at once at each port, Handshakes under way at once, and
	// HandshakesPerAddress those of one address.
	Connections          int `yaml:"connections"`
	Handshakes           int `yaml:"handshakes"`
	HandshakesPerAddress int `yaml:"handshakesPerAddress"`
}

func (l limitsConfig) check() error {
	for _, n := range []int{l.AgentRate, l.AgentBurst, l.IdentityRate, l.IdentityBurst, l.ClientRate, l.ClientBurst} {
		if n < 0 {
			return errors.New("limits: a rate or a burst is negative; 0 is no limit")
		}
	}
	if l.Connections < 1 || l.Handshakes < 1 || l.HandshakesPerAddress < 1 {
		return errors.New("limits.connections, limits.handshakes and limits.handshakesPerAddress: must be at least 1")
	}
	return nil
}

// oneWorld refuses a configuration of which it cannot be said whether Kubernetes or
// the file itself knows who is who.
func (c config) oneWorld() error {
	k := c.Kubernetes
	switch {
	case k.Enabled && len(c.Workloads) > 0:
		return errors.New("both kubernetes.enabled and workloads are set: pods come from the API server or from the list, not from both; remove one")
	case k.Enabled && c.Tokens.JWKSFile != "":
		return errors.New("both kubernetes.enabled and tokens.jwksFile are set: the API server publishes its keys itself; remove one")
	case k.Enabled && k.Namespace == "":
		return errors.New("kubernetes.namespace is empty: name the namespace of this installation")
	case k.Enabled:
		return nil
	case k.Kubeconfig != "" || k.ReviewWorkloads:
		return errors.New("kubernetes.kubeconfig or kubernetes.reviewWorkloads is set, but not kubernetes.enabled: set it too, or remove them")
	case c.Tokens.Issuer == "" || c.Tokens.JWKSFile == "":
		return errors.New("tokens.issuer and tokens.jwksFile are required where kubernetes.enabled is not set")
	}
	return nil
}

// pods makes the set of pods from the static list, refusing what could not be
// told apart or named.
func (c config) pods() (*identity.Pods, error) {
	td, err := identity.ParseTrustDomain(c.TrustDomain)
	if err != nil {
		return nil, err
	}
	var errs []error
	var list []identity.Workload
	seen := map[string]int{}
	for i, w := range c.Workloads {
		bad := func(format string, args ...any) {
			errs = append(errs, fmt.Errorf("workloads[%d] (%s/%s): "+format, append([]any{i, w.Namespace, w.Pod}, args...)...))
		}
		id := identity.Workload{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, Pod: w.Pod, PodUID: w.PodUID,
			Node: w.Node, NodeUID: w.NodeUID, Labels: w.Labels, UnixUID: w.UnixUID}
		if w.PodUID == "" || w.Pod == "" || w.Node == "" {
			bad("pod, podUID and node are required")
		}
		if _, err := id.ID(td); err != nil {
			bad("%w", err)
		}
		if first, ok := seen[w.PodUID]; ok {
			bad("podUID %s is also that of workloads[%d]", w.PodUID, first)
		}
		seen[w.PodUID] = i
		for _, a := range w.Addresses {
			ip, err := netip.ParseAddr(a)
			if err != nil {
				bad("address %q is not an IP address", a)
			}
			id.Addresses = append(id.Addresses, ip)
		}
		list = append(list, id)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	pods := &identity.Pods{}
	pods.Replace(list)
	return pods, nil
}

// authority is the configuration of package ca, without what main wires.
func (c config) authority() (ca.Config, error) {
	td, err := identity.ParseTrustDomain(c.TrustDomain)
	if err != nil {
		return ca.Config{}, fmt.Errorf("trustDomain: %w", err)
	}
	cfg := ca.Config{
		TrustDomain: td, Instance: c.Instance, DataDir: c.DataDir, DNSNames: c.DNSNames,
		SVID:       ca.SVIDConfig{TTL: c.SVID.TTL, AgentTTL: c.SVID.AgentTTL, MinTTL: c.SVID.MinTTL, MaxTTL: c.SVID.MaxTTL, Backdate: c.SVID.Backdate, AcceptedKeys: c.SVID.AcceptedKeys},
		TokenEvery: c.Agents.TokenEvery, HeadInterval: c.IssuanceLog.HeadInterval, LogRetention: c.IssuanceLog.Retention,
		Limits: ca.LimitsConfig(c.Limits),
	}
	c.Authority.apply(&cfg)
	if c.Istio.Listen != "" {
		// They learn of roots with their certificates.
		cfg.Consumers = map[string]time.Duration{"Istio's door": c.Istio.MaxTTL}
	}
	return cfg, nil
}

func (c config) print(w io.Writer) error { return run.PrintConfig(w, c) }
