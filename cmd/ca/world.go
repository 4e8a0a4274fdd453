package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/kube"
	"github.com/signet-mesh/signet/cmd/internal/run"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"

	"github.com/prometheus/client_golang/prometheus"
)

// world is where pods and their proofs come from: Kubernetes, or the configuration.
type world struct {
	pods *identity.Pods
	// stale is since when they are not kept up to date; nil: they always are.
	stale     func() time.Time
	agents    ca.AgentAttestor
	workloads ca.Attestor
	// attestor makes another verifier of tokens over the same pods and keys. Where
	// there is an API server, reviewed has it asked, too.
	attestor func(c attest.Config, reviewed bool) (ca.AgentAttestor, error)
	// tokenKeys are handed to agents.
	tokenKeys ca.TokenKeys
	// ready is nil once the world is known, else why it is not.
	ready func() error
	// synced waits for that. Nobody must be served before.
	synced func(context.Context) error
	// putSecret makes a Secret for TLS hold these files; nil without Kubernetes.
	putSecret func(ctx context.Context, namespace, name string, files map[string][]byte) error
	// loops is the work that keeps it known.
	loops func(*ca.Authority) []run.Job
}

func (c config) world(log *slog.Logger, reg prometheus.Registerer) (world, error) {
	tokens := attest.Config{MaxLifetime: c.Tokens.MaxLifetime, Skew: c.Tokens.Skew, Metrics: reg}
	agents, workloads := tokens, tokens
	agents.Audience, agents.ServiceAccounts = c.Tokens.AgentAudience, c.Agents.ServiceAccounts
	workloads.Audience, workloads.AnyServiceAccount = c.Tokens.Audience, true
	if c.Kubernetes.Enabled {
		return c.cluster(agents, workloads, log, reg)
	}

	pods, err := c.pods()
	if err != nil {
		return world{}, err
	}
	keys, err := attest.OpenKeys(attest.KeysConfig{File: c.Tokens.JWKSFile, Issuer: c.Tokens.Issuer, Log: log})
	if err != nil {
		return world{}, err
	}
	w := world{pods: pods, tokenKeys: keys, ready: keys.Err, synced: func(context.Context) error { return nil },
		loops: func(*ca.Authority) []run.Job { return nil }}
	w.attestor = func(a attest.Config, _ bool) (ca.AgentAttestor, error) {
		a.Issuer, a.Keys, a.Pods = c.Tokens.Issuer, keys, pods
		return attest.New(a)
	}
	if w.agents, err = w.attestor(agents, false); err != nil {
		return world{}, err
	}
	w.workloads, err = w.attestor(workloads, false)
	return w, err
}

// cluster is a world that Kubernetes tells.
func (c config) cluster(agents, workloads attest.Config, log *slog.Logger, reg prometheus.Registerer) (world, error) {
	api, err := run.APIServer(c.Kubernetes.Kubeconfig, c.Kubernetes.ServiceAccountDir)
	if err != nil {
		return world{}, err
	}
	// Two replicas may be on one node and have its name.
	host, err := os.Hostname()
	if err != nil {
		return world{}, fmt.Errorf("naming this replica: %w", err)
	}
	k, err := kube.Open(kube.Config{REST: api, Name: fmt.Sprintf("%s-%d", host, c.Instance), Namespace: c.Kubernetes.Namespace,
		Issuer: c.Tokens.Issuer, Log: log, Metrics: reg})
	if err != nil {
		return world{}, err
	}
	w := world{pods: k.Pods(), stale: k.Stale, tokenKeys: k.TokenKeys(), ready: k.Ready, synced: k.Synced, putSecret: k.PutTLSSecret}
	w.attestor = func(a attest.Config, reviewed bool) (ca.AgentAttestor, error) {
		at, err := k.Attestor(a, reviewed)
		if err != nil {
			return nil, err
		}
		return at, nil
	}
	// An agent's token is worth the pods of a node, so the API server itself has a
	// say, always.
	if w.agents, err = w.attestor(agents, true); err != nil {
		return world{}, err
	}
	if w.workloads, err = w.attestor(workloads, c.Kubernetes.ReviewWorkloads); err != nil {
		return world{}, err
	}
	w.loops = func(a *ca.Authority) []run.Job {
		return []run.Job{func(ctx context.Context) error {
			d := kube.Duties{Trust: a.Trust, CheckPolicy: checkPolicy}
			if c.Istio.PublishRoot {
				d.RootCerts = a.Trust
			}
			return k.Run(ctx, d)
		}}
	}
	return w, nil
}

// checkPolicy says why a policy is not enforced as it is written: the same parser
// decides that as in every agent.
func checkPolicy(object []byte) []kube.PolicyProblem {
	_, problems := authz.Parse("", object)
	var ps []kube.PolicyProblem
	for _, p := range problems {
		if p.Severity != authz.SeverityError {
			continue
		}
		// Which policy it is, and where, the condition says by standing there.
		p.Resource, p.Line = "", 0
		ps = append(ps, kube.PolicyProblem{Reason: "Invalid", Message: p.Error()})
	}
	return ps
}
