package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/cmd/internal/run/runtest"
)

func TestEveryKeyIsDocumented(t *testing.T) {
	runtest.KeysAreDocumented(t, config{}, "../../docs/configuration.md", "## signet-agent")
}

func TestBadConfigurationsAreRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "policies"), 0o700); err != nil {
		t.Fatal(err)
	}
	good := "node: node-a\nstateDir: \"\"\nsocket: " + dir + "/agent.sock\npolicies: {dir: " + dir + "/policies}\ntokens: {issuer: \"https://issuer.test\", jwksFile: " + runtest.JWKSFile(t) + "}\n"
	pinned := good + "ca: {rootFile: a, tokenFile: b}\n"
	for name, c := range map[string]struct{ yaml, says string }{
		"an unknown key":                         {"nodes: x\n", `unknown key "nodes"`},
		"a relative socket":                      {"socket: agent.sock\n", "absolute path"},
		"a relative folder of state":             {"stateDir: state\n", "absolute path"},
		"no folder of policies":                  {"node: a\ntokens: {issuer: a, jwksFile: b}\n", "policies.dir"},
		"both worlds":                            {good + "kubernetes: {enabled: true}\n", "policies.dir"},
		"Kubernetes and a file of keys":          {"node: a\nkubernetes: {enabled: true}\ntokens: {issuer: a, jwksFile: b}\n", "hands over"},
		"a kubeconfig without Kubernetes":        {good + "kubernetes: {kubeconfig: a}\n", "kubernetes.enabled"},
		"a kubeconfig that is not there":         {"node: a\nstateDir: \"\"\nsocket: " + dir + "/agent.sock\nkubernetes: {enabled: true, kubeconfig: " + dir + "/nothing}\n", "nothing"},
		"keys of nobody":                         {"node: a\ntokens: {jwksFile: b}\n", "tokens.issuer"},
		"no pin":                                 {good, "ca.rootFile or ca.rootHash is required"},
		"two pins":                               {good + "ca: {rootFile: a, rootHash: b}\n", "give one"},
		"a denial that lets through":             {good + "ca: {rootFile: a, tokenFile: b}\nchecks: {namespaces: {x: {status: 200}}}\n", "namespace x are answered: status 200"},
		"a denial with an unknown key":           {good + "checks: {namespaces: {x: {policy: true}}}\n", "policy"},
		"a provider that fails open":             {pinned + "extensionProviders: [{name: opa, envoyExtAuthzGrpc: {service: opa, port: 9191, failOpen: true}}]\n", `extensionProviders: extension provider "opa": failOpen`},
		"a provider of no kind":                  {pinned + "extensionProviders: [{name: opa}]\n", "exactly one of"},
		"a relative file of records":             {pinned + "records: {file: decisions.jsonl}\n", "records.file"},
		"a share of records above all":           {pinned + "records: {allowed: 2}\n", "from 0 to 1"},
		"a collector that is no URL":             {pinned + "records: {otlp: {endpoint: \"collector:4318\"}}\n", "records.otlp"},
		"a block that is none":                   {strings.Replace(good, "/policies}", "/policies, keys: {allowAddresses: [10.0.0.0/33]}}", 1), "policies.keys.allowAddresses"},
		"roots that are not there":               {strings.Replace(good, "/policies}", "/policies, keys: {rootsFile: /nowhere}}", 1), "policies.keys.rootsFile"},
		"keys that are fetched all the time":     {strings.Replace(good, "/policies}", "/policies, keys: {refresh: 1ms}}", 1), "every 1ms"},
		"no node":                                {strings.Replace(good, "node: node-a\n", "", 1) + "ca: {rootFile: a}\n", "node"},
		"a folder of policies that is not there": {strings.Replace(good, dir+"/policies", dir+"/nothing", 1), "policies"},
		"a folder of state below the socket's":   {strings.Replace(good, `stateDir: ""`, "stateDir: "+dir+"/state", 1), "state"},
		"a socket in the place of a file":        {strings.Replace(good, "agent.sock", "policies", 1) + "ca: {rootFile: a, tokenFile: b}\n", "not a socket"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "agent.yaml")
			if err := os.WriteFile(path, []byte(c.yaml), 0o600); err != nil {
				t.Fatal(err)
			}
			err := execute(context.Background(), []string{"serve", "--config", path}, &bytes.Buffer{}, &bytes.Buffer{})
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %q", err, c.says)
			}
		})
	}
	var out bytes.Buffer
	path := filepath.Join(dir, "agent.yaml")
	if err := os.WriteFile(path, []byte(good), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := execute(context.Background(), []string{"config", "print", "--config", path}, &out, &bytes.Buffer{}); err != nil || !strings.Contains(out.String(), "rootNamespace: istio-system") {
		t.Errorf("%v\n%s", err, out.String())
	}
}
