package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/source"
	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/cmd/internal/run"
	"github.com/signet-mesh/signet/identity/attest"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/klog/v2"
)

// policies are those of a folder or of a cluster.
type policies interface {
	Snapshot() *authz.Snapshot
	Changed() <-chan struct{}
	Ready() error
	Run(context.Context) error
}

// world is where policies and the keys of tokens come from: the API server and the
// authority, or files.
type world struct {
	policies policies
	keys     attest.KeySource
	keysErr  func() error
	// unknownKeys are for the authority to look for; nil where there are files.
	unknownKeys func() ([]string, <-chan struct{})
	// outage reports whether kubelet cannot replace tokens, and since when; nil: it always can.
	outage func() (since time.Time, on bool)
	// exports are saved for a successor, by name.
	exports map[string]export
	// loops is further work.
	loops func(*caclient.Client) []run.Job
}

func (c config) world(saved *saved, td spiffeid.TrustDomain, log *slog.Logger, reg prometheus.Registerer) (world, error) {
	w := world{exports: map[string]export{}, loops: func(*caclient.Client) []run.Job { return nil }}
	if err := c.tokenKeys(&w, saved, log); err != nil {
		return world{}, err
	}
	options := authz.Options{TrustDomain: td, TrustDomainAliases: c.Policies.TrustDomainAliases, RootNamespace: c.Policies.RootNamespace, MultipleProviders: c.Policies.MultipleProviders}
	if v := c.Policies.EnvoyVersion; v != "" {
		var err error
		if options.Envoy, err = authz.ParseEnvoyVersion(v); err != nil {
			return world{}, fmt.Errorf("policies.envoyVersion: %w", err)
		}
	}
	if !c.Kubernetes.Enabled {
		var err error
		w.policies, err = source.OpenFolder(source.Config{Dir: c.Policies.Dir, Options: options, Log: log, Metrics: reg})
		return w, err
	}
	api, err := run.APIServer(c.Kubernetes.Kubeconfig, c.Kubernetes.ServiceAccountDir)
	if err != nil {
		return world{}, err
	}
	api.UserAgent = "signet-agent"
	// client-go logs through klog; what it says goes where ours goes.
	klog.SetSlogLogger(log)
	cluster, err := source.NewCluster(source.ClusterConfig{REST: api, Options: options, Saved: saved.state.Extra[savedPolicies], Log: log, Metrics: reg})
	if err != nil {
		return world{}, err
	}
	o := newOutage()
	saved.load(savedOutage, o.load)
	loops := w.loops
	w.policies, w.outage, w.exports[savedPolicies] = cluster, o.on, cluster.Export
	w.exports[savedOutage] = o.export
	w.loops = func(client *caclient.Client) []run.Job {
		return append(loops(client), func(ctx context.Context) error { return o.watch(ctx, cluster.Contact) })
	}
	return w, nil
}

// tokenKeys are those of a file, or what the authority hands over.
func (c config) tokenKeys(w *world, saved *saved, log *slog.Logger) error {
	if c.Tokens.JWKSFile != "" {
		keys, err := attest.OpenKeys(attest.KeysConfig{File: c.Tokens.JWKSFile, Log: log})
		if err != nil {
			return err
		}
		w.keys, w.keysErr = keys, keys.Err
		return nil
	}
	keys := &attest.Handed{}
	saved.load(savedKeys, keys.Load)
	w.keys, w.keysErr, w.unknownKeys, w.exports[savedKeys] = keys, keys.Err, keys.Unknown, keys.Export
	w.loops = func(client *caclient.Client) []run.Job {
		return []run.Job{func(ctx context.Context) error { return take(ctx, client, keys, log) }}
	}
	return nil
}

// take takes the keys that the authority hands over.
func take(ctx context.Context, client *caclient.Client, keys *attest.Handed, log *slog.Logger) error {
	for {
		k, changed := client.TokenKeys()
		if k.Issuer != "" {
			if err := keys.Hand(k); err != nil {
				log.Error("the authority's keys of tokens are not used; the last good ones stay", "err", err)
			} else {
				log.Info("keys of tokens", "issuer", k.Issuer, "keys", len(k.Keys))
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}
