package main

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/source"
	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/cmd/internal/run"
	"github.com/signet-mesh/signet/identity/attest"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

// outageGrace is how long after the API server is back tokens may still be those
// from before: kubelet looks at a pod's volumes every one to two minutes.
const outageGrace = 5 * time.Minute

// outageStart is how long after a start the first answer may take, if the API server
// was not away.
const outageStart = 10 * time.Second

// world is where policies and the keys of tokens come from: the API server and the
// authority, or files.
type world struct {
	policies interface {
		Snapshot() *authz.Snapshot
		Ready() error
		Run(context.Context) error
	}
	keys    attest.KeySource
	keysErr func() error
	// unknownKeys are for the authority to look for; nil where there are files.
	unknownKeys func() ([]string, <-chan struct{})
	// outage reports whether kubelet cannot replace tokens; nil: it always can.
	outage func() bool
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
	options := authz.Options{TrustDomain: td, TrustDomainAliases: c.Policies.TrustDomainAliases, RootNamespace: c.Policies.RootNamespace}
	if !c.Kubernetes.Enabled {
		var err error
		w.policies, err = source.OpenFolder(source.Config{Dir: c.Policies.Dir, Options: options, Log: log, Metrics: reg})
		return w, err
	}
	api, err := credentials(c.Kubernetes.Kubeconfig)
	if err != nil {
		return world{}, fmt.Errorf("connecting to Kubernetes: %w", err)
	}
	// client-go logs through klog; what it says goes where ours goes.
	klog.SetSlogLogger(log)
	cluster, err := source.NewCluster(source.ClusterConfig{REST: api, Options: options, Saved: saved.state.Extra[savedPolicies], Log: log, Metrics: reg})
	if err != nil {
		return world{}, err
	}
	o := newOutage()
	loops := w.loops
	w.policies, w.outage, w.exports[savedPolicies] = cluster, o.on, cluster.Export
	w.loops = func(client *caclient.Client) []run.Job {
		return append(loops(client), func(ctx context.Context) error { return o.watch(ctx, cluster.Away) })
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

// credentials reads a kubeconfig, or what Kubernetes puts into every pod.
func credentials(kubeconfig string) (*rest.Config, error) {
	var c *rest.Config
	var err error
	if kubeconfig == "" {
		if c, err = rest.InClusterConfig(); err != nil {
			return nil, fmt.Errorf("kubernetes.kubeconfig is empty and this is no pod with a service account: %w", err)
		}
	} else if c, err = clientcmd.BuildConfigFromFlags("", kubeconfig); err != nil {
		return nil, fmt.Errorf("kubernetes.kubeconfig: reading %s: %w", kubeconfig, err)
	}
	c.UserAgent = "signet-agent"
	return c, nil
}

// outage knows whether kubelet cannot replace tokens, by whether the API server
// answers this agent. Until the first answer it may be that nobody can.
type outage struct {
	// over is when the outage is over, in nanoseconds since 1970, or away.
	over atomic.Int64
}

const away = 1<<63 - 1

func newOutage() *outage {
	o := &outage{}
	o.over.Store(away)
	return o
}

func (o *outage) on() bool { return time.Now().UnixNano() < o.over.Load() }

// watch ends when ctx does. An API server that answers at once was not away.
func (o *outage) watch(ctx context.Context, isAway func() (bool, <-chan struct{})) error {
	start, first := time.Now(), true
	for {
		is, changed := isAway()
		switch {
		case is:
			o.over.Store(away)
		case first && time.Since(start) < outageStart:
			o.over.Store(0)
		default:
			o.over.Store(time.Now().Add(outageGrace).UnixNano())
		}
		first = first && is
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}
