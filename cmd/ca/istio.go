package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/istio"
	"github.com/signet-mesh/signet/cmd/internal/run"
	"github.com/signet-mesh/signet/identity/attest"

	"github.com/prometheus/client_golang/prometheus"
)

// istioConfig is the section istio of ca.yaml.
type istioConfig struct {
	// Listen is HOST:PORT of Istio's certificate RPC. Empty: not served.
	Listen string `yaml:"listen"`
	// DNSNames of its serving certificate; Istio's clients verify one of them.
	DNSNames []string `yaml:"dnsNames"`
	// Audience of the tokens of Istio's clients.
	Audience string `yaml:"audience"`
	// FirstPartyAudience also accepts tokens of the API server's own audience, which
	// Istio sends where it is told to use first-party-jwt. Empty: refused.
	FirstPartyAudience string `yaml:"firstPartyAudience"`
	// MaxTokenLifetime refuses tokens that are good for longer; Istio asks for 12 h.
	MaxTokenLifetime time.Duration `yaml:"maxTokenLifetime"`
	// ClusterIDs are accepted as the client's cluster.
	ClusterIDs []string `yaml:"clusterIDs"`
	// MaxTTL is the longest life of a certificate; longer requests get it. Zero: the
	// value of svid.ttl.
	MaxTTL time.Duration `yaml:"maxTTL"`
	// NodeAccounts may ask for the certificates of the pods on their node.
	NodeAccounts []string `yaml:"nodeAccounts"`
	// RenewalFor are accounts whose certificates renew themselves without a token,
	// until MaxTokenAge after the last one.
	RenewalFor  []string      `yaml:"renewalFor"`
	MaxTokenAge time.Duration `yaml:"maxTokenAge"`
	// AnyPodOf are nodes all of whose pods are believed on their tokens alone.
	// Standalone only.
	AnyPodOf []string `yaml:"anyPodOf"`
	// PublishRoot keeps the ConfigMap istio-ca-root-cert in every namespace. Kubernetes
	// only.
	PublishRoot bool `yaml:"publishRoot"`
	// Istiod is the serving certificate that is made for istiod itself.
	Istiod struct {
		// Folder gets tls.crt, tls.key and ca.crt. Empty: not made.
		Folder string `yaml:"folder"`
		// Secret, in Namespace, gets them instead. Kubernetes only.
		Secret         string   `yaml:"secret"`
		Namespace      string   `yaml:"namespace"`
		ServiceAccount string   `yaml:"serviceAccount"`
		DNSNames       []string `yaml:"dnsNames"`
	} `yaml:"istiod"`
}

func istioDefaults() istioConfig {
	var c istioConfig
	c.DNSNames = []string{"istiod.istio-system.svc"}
	c.Audience = "istio-ca"
	c.MaxTokenLifetime = 12*time.Hour + 5*time.Minute
	c.ClusterIDs = []string{"Kubernetes"}
	c.MaxTokenAge = istio.DefaultMaxTokenAge
	c.Istiod.Namespace, c.Istiod.ServiceAccount = "istio-system", "istiod"
	c.Istiod.DNSNames = []string{"istiod.istio-system.svc"}
	return c
}

// complete checks the section against the rest of the configuration and fills in
// what follows from it.
func (c *istioConfig) complete(all config) error {
	if c.MaxTTL == 0 {
		c.MaxTTL = all.SVID.TTL
	}
	switch {
	case len(c.AnyPodOf) > 0 && all.Kubernetes.Enabled:
		return errors.New("istio.anyPodOf: is for machines without Kubernetes; here the API server says which pods there are")
	case len(c.AnyPodOf) > 0 && c.Listen == "":
		return errors.New("istio.anyPodOf: is of no use without istio.listen")
	case (c.PublishRoot || c.Istiod.Secret != "") && !all.Kubernetes.Enabled:
		return errors.New("istio.publishRoot and istio.istiod.secret: need kubernetes.enabled")
	case c.Istiod.Secret != "" && c.Istiod.Folder != "":
		return errors.New("both istio.istiod.folder and istio.istiod.secret are set; choose one")
	case (c.PublishRoot || c.Istiod.Secret != "" || c.Istiod.Folder != "") && c.Listen == "":
		return errors.New("istio.publishRoot and istio.istiod: are of no use without istio.listen")
	case c.Listen == "":
		return nil
	}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("istio."+format, args...)) }
	if c.MaxTTL < all.SVID.MinTTL || c.MaxTTL > all.SVID.MaxTTL {
		bad("maxTTL %v: must be between svid.minTTL (%v) and svid.maxTTL (%v)", c.MaxTTL, all.SVID.MinTTL, all.SVID.MaxTTL)
	}
	for _, a := range []string{all.Tokens.Audience, all.Tokens.AgentAudience} {
		if a == c.Audience || a == c.FirstPartyAudience {
			bad("audience: %q is also that of tokens for Signet's own services; a token for one must not pass at the other", a)
		}
	}
	if c.Audience == "" || c.Audience == c.FirstPartyAudience {
		bad("audience: is required, and another than istio.firstPartyAudience")
	}
	if len(c.DNSNames) == 0 || len(c.ClusterIDs) == 0 {
		bad("dnsNames and istio.clusterIDs: must not be empty")
	}
	return errors.Join(errs...)
}

// istioParts is what the door is made of, besides its configuration.
type istioParts struct {
	authority *ca.Authority
	world     world
	reviewed  bool // tokens go to the API server too
	skew      time.Duration
	log       *slog.Logger
	metrics   prometheus.Registerer
}

// istioDoor is the door and where it listens; nil is none.
type istioDoor struct {
	*istio.Door
	address  string
	dnsNames []string
	log      *slog.Logger
}

// open makes the door, if there is to be one.
func (c istioConfig) open(ctx context.Context, p istioParts) (*istioDoor, error) {
	if c.Listen == "" {
		return nil, nil
	}
	cfg := istio.Config{Authority: p.authority, Pods: p.world.pods, ClusterIDs: c.ClusterIDs, DNSNames: c.DNSNames, MaxTTL: c.MaxTTL,
		NodeAccounts: c.NodeAccounts, RenewalFor: c.RenewalFor, MaxTokenAge: c.MaxTokenAge, AnyPodOf: c.AnyPodOf, Log: p.log, Metrics: p.metrics}
	verifier := func(audience string, extended bool) error {
		a, err := p.world.attestor(attest.Config{Audience: audience, AnyServiceAccount: true, MaxLifetime: c.MaxTokenLifetime,
			Skew: p.skew, AnyPodOf: c.AnyPodOf, Extended: extended, Metrics: p.metrics}, p.reviewed)
		cfg.Tokens = append(cfg.Tokens, a)
		return err
	}
	if err := verifier(c.Audience, false); err != nil {
		return nil, err
	}
	if c.FirstPartyAudience != "" {
		if err := verifier(c.FirstPartyAudience, true); err != nil {
			return nil, err
		}
	}
	if i := c.Istiod; i.Folder != "" || i.Secret != "" {
		cfg.Istiod = &istio.Istiod{Namespace: i.Namespace, ServiceAccount: i.ServiceAccount, DNSNames: i.DNSNames, Deliver: istio.Folder(i.Folder)}
		if i.Secret != "" {
			cfg.Istiod.Deliver = func(ctx context.Context, files map[string][]byte) error {
				ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
				defer cancel()
				return p.world.putSecret(ctx, i.Namespace, i.Secret, files)
			}
		}
	}
	if len(c.AnyPodOf) > 0 {
		p.log.Warn("ISTIO.ANYPODOF IS SET: whoever can sign tokens is every pod of these nodes, no pod is looked up; never use this beside a cluster", "nodes", c.AnyPodOf)
	}
	d, err := istio.New(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &istioDoor{Door: d, address: c.Listen, dnsNames: c.DNSNames, log: p.log}, nil
}

// run is the door's background work.
func (d *istioDoor) run(ctx context.Context) error {
	if d == nil {
		return nil
	}
	return d.Run(ctx)
}

// listen opens the port; what it returns serves there until its context ends.
func (d *istioDoor) listen() (run.Job, error) {
	if d == nil {
		return func(context.Context) error { return nil }, nil
	}
	l, err := net.Listen("tcp", d.address)
	if err != nil {
		return nil, fmt.Errorf("listening for Istio's clients: istio.listen: %w", err)
	}
	d.log.Info("serving Istio's clients", "address", l.Addr().String(), "dns_names", d.dnsNames)
	return func(ctx context.Context) error { return run.ServeGRPC(ctx, d.NewServer(), l, drain, nil) }, nil
}
