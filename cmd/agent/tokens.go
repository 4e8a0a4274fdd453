package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/source"
	"github.com/signet-mesh/signet/authz/token"
	"github.com/signet-mesh/signet/identity"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// requestTokens verifies the tokens of requests whose proxy did not.
type requestTokens struct {
	verifier *token.Verifier
	keys     *source.KeySets
	rules    *identity.Watched[[]*authz.TokenRule]
}

func (c config) requestTokens(saved *saved, log *slog.Logger, reg prometheus.Registerer) (*requestTokens, error) {
	k := c.Policies.Keys
	cfg := source.KeySetsConfig{Refresh: k.Refresh, AllowPlaintext: k.AllowPlaintext, Saved: saved.state.Extra[savedRequestKeys], Log: log, Metrics: reg}
	for _, text := range k.AllowAddresses {
		block, err := parseBlock(text)
		if err != nil {
			return nil, fmt.Errorf("policies.keys.allowAddresses: %w", err)
		}
		cfg.AllowAddresses = append(cfg.AllowAddresses, block)
	}
	if k.RootsFile != "" {
		var err error
		if cfg.Roots, err = rootsWith(k.RootsFile); err != nil {
			return nil, fmt.Errorf("policies.keys.rootsFile: %w", err)
		}
	}
	t := &requestTokens{rules: &identity.Watched[[]*authz.TokenRule]{}}
	cfg.Rules = t.rules.Load
	var err error
	if t.keys, err = source.NewKeySets(cfg); err != nil {
		return nil, err
	}
	t.verifier, err = token.New(token.Config{Keys: t.keys, Metrics: reg})
	return t, err
}

// parseBlock reads 10.0.0.0/8 or 10.0.0.1.
func parseBlock(text string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%q is neither an address nor a block like 10.0.0.0/8", text)
	}
	return p.Masked(), nil
}

// rootsWith are the authorities of the system and those of a file.
func rootsWith(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool() // a system without any
	}
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s has no certificate in PEM", path)
	}
	return roots, nil
}

// watch keeps the rules those by which tokens are verified for the pods of a node,
// until ctx ends.
func (t *requestTokens) watch(ctx context.Context, policies policies, pods *identity.Pods, node string) error {
	for {
		policiesChanged := policies.Changed()
		snapshot := policies.Snapshot()
		onNode, podsChanged := pods.OnNode(node)
		programs := map[*authz.Program]bool{}
		known := map[*authz.TokenRule]bool{}
		var rules []*authz.TokenRule
		for _, pod := range onNode {
			p := snapshot.For(pod)
			if programs[p] {
				continue
			}
			programs[p] = true
			for _, r := range p.Verifies() {
				if !known[r] {
					known[r] = true
					rules = append(rules, r)
				}
			}
		}
		if !slices.Equal(rules, t.rules.Value()) {
			t.rules.Store(rules)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-policiesChanged:
		case <-podsChanged:
		}
	}
}

// Claims is [extauthz.Tokens].
func (t *requestTokens) Claims(ctx context.Context, p *authz.Program, r *authz.Request) extauthz.Verified {
	found := t.verifier.Verify(ctx, p, r, time.Now())
	switch found.Status {
	case token.Good:
		r.Claims = found.Claims
		return extauthz.Verified{Upstream: upstream(&found, r)}
	case token.Missing:
		return extauthz.Verified{Upstream: upstream(&found, r)}
	}
	err := fmt.Errorf("verifying the request's token: %s", found.Status)
	if rule := found.Rule; rule != nil {
		err = fmt.Errorf("verifying the request's token by RequestAuthentication %s/%s rule %d: %s", rule.Namespace, rule.Name, rule.Index, found.Status)
	}
	if found.Status == token.TooManyKeys {
		err = fmt.Errorf("%w: more than %d keys would have to be tried; give the tokens, and the keys of the set, a kid", err, token.MaxSignatures)
	}
	return extauthz.Verified{Refused: found.Status.Text(), Forbidden: found.Status.HTTP() == 403, Err: err}
}

// upstream is what the proxy changes of a request, or nil.
func upstream(found *token.Result, r *authz.Request) *authv3.OkHttpResponse {
	if len(found.SetHeaders)+len(found.RemoveHeaders)+len(found.RemoveParams) == 0 {
		return nil
	}
	ok := &authv3.OkHttpResponse{HeadersToRemove: found.RemoveHeaders}
	for _, p := range found.RemoveParams {
		// As they stand in the path, because the proxy compares them so: ext_authz does
		// not undo their encoding, and other filters and applications do.
		ok.QueryParametersToRemove = append(ok.QueryParametersToRemove, authz.ParamNames(r.Path, p)...)
	}
	set := map[string]bool{}
	for _, h := range found.SetHeaders {
		ok.Headers = append(ok.Headers, &corev3.HeaderValueOption{
			Header: &corev3.HeaderValue{Key: h.Name, Value: h.Value},
			//lint:ignore SA1019 this is the field that every Envoy's ext_authz filter reads; append_action is not
			Append: wrapperspb.Bool(set[h.Name]), // another value of the same header
		})
		set[h.Name] = true
	}
	return ok
}
