package main

import (
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/provider"
	"github.com/signet-mesh/signet/authz/record"
	"github.com/signet-mesh/signet/authz/source"
	"github.com/signet-mesh/signet/cmd/internal/run"
	"github.com/signet-mesh/signet/identity/attest"
)

// config is agent.yaml. docs/configuration.md documents every key; a test holds
// the two together.
type config struct {
	// TrustDomain is the one that the authority gives names in.
	TrustDomain string `yaml:"trustDomain"`
	// Node is the name of the node that this agent serves.
	Node string `yaml:"node"`
	// Socket is the Unix socket for the node's proxies, mode 0666: reaching it
	// proves nothing.
	Socket string `yaml:"socket"`
	// StateDir is a folder on a tmpfs for what is needed to serve at once after a
	// restart, keys included. Empty: nothing is saved.
	StateDir string `yaml:"stateDir"`
	// AllowSwap saves state although swap could write it to a disk.
	AllowSwap bool `yaml:"allowSwap"`
	CA        struct {
		// Addresses are HOST:PORT of the authority's replicas.
		Addresses []string `yaml:"addresses"`
		// RootFile or RootHash pins the authority.
		RootFile string `yaml:"rootFile"`
		RootHash string `yaml:"rootHash"`
		// TokenFile holds the agent's own token.
		TokenFile string `yaml:"tokenFile"`
	} `yaml:"ca"`
	// Kubernetes says where policies come from, instead of Policies.Dir.
	Kubernetes struct {
		Enabled bool `yaml:"enabled"`
		// Kubeconfig says where the API server is and with which credentials; empty:
		// those of the pod.
		Kubeconfig string `yaml:"kubeconfig"`
		// ServiceAccountDir is where the pod finds those.
		ServiceAccountDir string `yaml:"serviceAccountDir"`
	} `yaml:"kubernetes"`
	// Tokens says how proxies' tokens are verified. Without JWKSFile the authority
	// hands over the keys.
	Tokens struct {
		Issuer      string        `yaml:"issuer"`
		JWKSFile    string        `yaml:"jwksFile"`
		Audience    string        `yaml:"audience"`
		MaxLifetime time.Duration `yaml:"maxLifetime"`
		Skew        time.Duration `yaml:"skew"`
	} `yaml:"tokens"`
	Policies struct {
		// Dir is the folder of policies.
		Dir string `yaml:"dir"`
		// RootNamespace holds the policies of the whole mesh.
		RootNamespace string `yaml:"rootNamespace"`
		// TrustDomainAliases are further names of TrustDomain in policies.
		TrustDomainAliases []string `yaml:"trustDomainAliases"`
		// EnvoyVersion is that of the proxies; empty means the newest known.
		EnvoyVersion string `yaml:"envoyVersion"`
		// MultipleProviders lets CUSTOM policies of a workload name several providers.
		MultipleProviders bool `yaml:"multipleProviders"`
		// Keys says how the keys of requests' tokens are fetched, which
		// RequestAuthentications name by URI.
		Keys struct {
			Refresh time.Duration `yaml:"refresh"`
			// AllowAddresses are addresses and blocks that are no public ones.
			AllowAddresses []string `yaml:"allowAddresses"`
			AllowPlaintext bool     `yaml:"allowPlaintext"`
			// RootsFile has authorities of servers, beside those of the system.
			RootsFile string `yaml:"rootsFile"`
		} `yaml:"keys"`
	} `yaml:"policies"`
	// ExtensionProviders are those that CUSTOM policies name.
	ExtensionProviders []provider.Spec `yaml:"extensionProviders"`
	// Records says which decisions are recorded, and where.
	Records struct {
		// File is a path, "stdout", or empty.
		File      string `yaml:"file"`
		FileBytes int64  `yaml:"fileBytes"`
		Files     int    `yaml:"files"`
		// Allowed is the share of allowed requests, from 0 to 1.
		Allowed          float64 `yaml:"allowed"`
		AllowedPerSecond int     `yaml:"allowedPerSecond"`
		// Redact are headers that are never shown, Headers and Claims what is shown
		// beside what policies read.
		Redact      []string `yaml:"redact"`
		Headers     []string `yaml:"headers"`
		Claims      []string `yaml:"claims"`
		Query       bool     `yaml:"query"`
		QueueBytes  int      `yaml:"queueBytes"`
		MaxPolicies int      `yaml:"maxPolicies"`
		OTLP        struct {
			Endpoint string            `yaml:"endpoint"`
			Headers  map[string]string `yaml:"headers"`
			Timeout  time.Duration     `yaml:"timeout"`
		} `yaml:"otlp"`
	} `yaml:"records"`
	Checks struct {
		// Denial is what clients of denied requests get, Namespaces what they get in
		// those namespaces instead.
		Denial     denialConfig            `yaml:"denial"`
		Namespaces map[string]denialConfig `yaml:"namespaces"`
	} `yaml:"checks"`
	SDS struct {
		// CRL has proxies check the authority's revocation lists.
		CRL bool `yaml:"crl"`
	} `yaml:"sds"`
	Log  run.LogConfig  `yaml:"log"`
	HTTP run.HTTPConfig `yaml:"http"`
}

// denialConfig is an extauthz.Denial.
type denialConfig struct {
	Status int    `yaml:"status"`
	Text   string `yaml:"text"`
	// JSON makes the body an object with status and text.
	JSON    bool              `yaml:"json"`
	Headers map[string]string `yaml:"headers"`
	// Reason adds the header x-signet-reason.
	Reason bool `yaml:"reason"`
}

// denials are what clients of denied requests get, in the mesh and by namespace.
func (c config) denials() (extauthz.Denial, map[string]extauthz.Denial) {
	namespaces := make(map[string]extauthz.Denial, len(c.Checks.Namespaces))
	for ns, d := range c.Checks.Namespaces {
		namespaces[ns] = extauthz.Denial(d)
	}
	return extauthz.Denial(c.Checks.Denial), namespaces
}

// defaults is the configuration of an empty file.
func defaults() config {
	var c config
	c.TrustDomain = "cluster.local"
	c.Socket = "/run/signet/agent.sock"
	c.StateDir = "/run/signet-agent"
	c.CA.Addresses = []string{"signet-ca.signet-system.svc:8443"}
	c.CA.TokenFile = "/var/run/secrets/tokens/signet-ca"
	c.Kubernetes.ServiceAccountDir = run.ServiceAccountDir
	c.Tokens.Audience = "signet"
	c.Tokens.MaxLifetime, c.Tokens.Skew = attest.DefaultMaxLifetime, attest.DefaultSkew
	c.Policies.RootNamespace = "istio-system"
	c.Records.File, c.Records.FileBytes, c.Records.Files = toStdout, record.DefaultFileBytes, record.DefaultFiles
	c.Records.AllowedPerSecond, c.Records.Redact = record.DefaultAllowedPerSecond, record.DefaultRedacted()
	c.Records.QueueBytes, c.Records.MaxPolicies = record.DefaultQueueBytes, record.DefaultMaxPolicies
	c.Records.OTLP.Timeout = record.DefaultOTLPTimeout
	c.Policies.Keys.Refresh = source.DefaultKeyRefresh
	c.Log = run.LogConfig{Format: "text", Level: "info"}
	c.HTTP.Listen = ":9102"
	return c
}

// loadConfig reads the file. node, if not empty, is the node instead of what it says.
func loadConfig(path, node string) (config, error) {
	c := defaults()
	if err := run.LoadConfig(path, &c); err != nil {
		return config{}, err
	}
	if node != "" {
		c.Node = node
	}
	bad := func(format string, args ...any) (config, error) {
		return config{}, fmt.Errorf("reading configuration %s: "+format, append([]any{path}, args...)...)
	}
	switch {
	case c.Socket == "" || !filepath.IsAbs(c.Socket):
		return bad("socket %q: must be an absolute path", c.Socket)
	case c.StateDir != "" && !filepath.IsAbs(c.StateDir):
		return bad("stateDir %q: must be an absolute path, or empty to save nothing", c.StateDir)
	case c.Tokens.JWKSFile != "" && c.Tokens.Issuer == "":
		return bad("tokens.jwksFile is set, but not tokens.issuer: say whose keys they are")
	case c.Kubernetes.Enabled && c.Policies.Dir != "":
		return bad("both kubernetes.enabled and policies.dir are set: policies come from the API server or from a folder, not from both; remove one")
	case c.Kubernetes.Enabled && c.Tokens.JWKSFile != "":
		return bad("both kubernetes.enabled and tokens.jwksFile are set: the authority hands over the API server's keys; remove one")
	case !c.Kubernetes.Enabled && c.Kubernetes.Kubeconfig != "":
		return bad("kubernetes.kubeconfig is set, but not kubernetes.enabled: set it too, or remove it")
	case !c.Kubernetes.Enabled && c.Policies.Dir == "":
		return bad("policies.dir is required where kubernetes.enabled is not set")
	}
	return c, nil
}

func (c config) print(w io.Writer) error { return run.PrintConfig(w, c) }
