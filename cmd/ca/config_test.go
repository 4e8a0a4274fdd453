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
	runtest.KeysAreDocumented(t, config{}, "../../docs/configuration.md", "## signet-ca")
}

func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestWhatIsPrintedIsTheSameConfiguration: print, read, print is the identity.
func TestWhatIsPrintedIsTheSameConfiguration(t *testing.T) {
	show := func(path string) string {
		t.Helper()
		var out, errs bytes.Buffer
		if err := execute(context.Background(), []string{"config", "print", "--config", path}, &out, &errs); err != nil {
			t.Fatalf("%v\n%s", err, errs.String())
		}
		return out.String()
	}
	first := show(write(t, withKeys(t)+"svid: {ttl: 10m}\nworkloads:\n- {namespace: a, serviceAccount: b, pod: c, podUID: d, node: e, labels: {f: g}, unixUID: 7}\n"))
	if again := show(write(t, first)); again != first {
		t.Errorf("printed\n%s\nread and printed\n%s", first, again)
	}
	for _, want := range []string{"ttl: 10m0s", "agentTTL: 1h0m0s", "unixUID: 7", "admin.sock"} {
		if !strings.Contains(first, want) {
			t.Errorf("%q is missing in\n%s", want, first)
		}
	}
}

func TestBadConfigurationsAreRefused(t *testing.T) {
	const w = "workloads:\n- {namespace: a, serviceAccount: b, pod: c, podUID: d, node: e}\n"
	for name, c := range map[string]struct{ yaml, says string }{
		"an unknown key":                     {"trustdomain: x\n", `line 1: unknown key "trustdomain"`},
		"an unknown key below another":       {"svid:\n  tll: 1h\n", `line 2: unknown key "tll"`},
		"a key given twice":                  {"listen: a\nlisten: b\n", "already defined"},
		"a wrong type":                       {"instance: many\n", "line 1"},
		"a duration without a unit":          {"svid: {ttl: 10}\n", `line 1: "10" is not a duration`},
		"broken YAML":                        {"svid: {ttl: 1h\n", "yaml"},
		"two documents":                      {"listen: a\n---\nlisten: b\n", "more than one YAML document"},
		"one audience for both":              {strings.Replace(withKeys(t), "{", "{audience: a, agentAudience: a, ", 1), "must not pass for an agent's"},
		"no account for agents":              {withKeys(t) + "agents: {serviceAccounts: []}\n", "no agent could attest"},
		"a trust domain that is none":        {withKeys(t) + "trustDomain: A/b\n", "trust domain"},
		"two workloads with one UID":         {withKeys(t) + w + "- {namespace: a, serviceAccount: b, pod: c2, podUID: d, node: e}\n", "also that of workloads[0]"},
		"a workload without a node":          {withKeys(t) + "workloads:\n- {namespace: a, serviceAccount: b, pod: c, podUID: d}\n", "node are required"},
		"a workload that has no name":        {withKeys(t) + "workloads:\n- {namespace: a/b, serviceAccount: b, pod: c, podUID: d, node: e}\n", "workloads[0]"},
		"a workload without an address":      {withKeys(t) + "workloads:\n- {namespace: a, serviceAccount: b, pod: c, podUID: d, node: e, addresses: [x]}\n", "not an IP address"},
		"etcd and the root in a file":        {withKeys(t) + "storage: {etcd: {endpoints: [\"https://a:2379\"]}}\n", "each replica would hold the key of the root"},
		"a way to a root that is elsewhere":  {withKeys(t) + "storage: {etcd: {endpoints: [\"https://a:2379\"]}}\nauthority: {rootReplica: 1, keys: {root: \"pkcs11:token=a\"}}\n", "needs no way to it"},
		"a root's replica without others":    {withKeys(t) + "authority: {rootReplica: 1}\n", "storage.etcd"},
		"etcd without members":               {withKeys(t) + "storage: {etcd: {caFile: a}}\n", "storage.etcd.endpoints is empty"},
		"half a pair for etcd":               {withKeys(t) + "storage: {etcd: {endpoints: [\"https://a:2379\"], certFile: a}}\n", "both or neither"},
		"a user of etcd without a password":  {withKeys(t) + "storage: {etcd: {endpoints: [\"https://a:2379\"], username: a}}\n", "both or neither"},
		"roots of etcd that are not there":   {withKeys(t) + "authority: {offlineRoot: true}\nstorage: {etcd: {endpoints: [\"https://a:2379\"], caFile: /nonexistent}}\n", "storage.etcd.caFile"},
		"a password of etcd for everybody":   {withKeys(t) + "authority: {offlineRoot: true}\nstorage: {etcd: {endpoints: [\"https://a:2379\"], username: a, passwordFile: " + openToAll(t) + "}}\n", "is open to others"},
		"members of which some are in clear": {withKeys(t) + "authority: {offlineRoot: true}\nstorage: {etcd: {endpoints: [\"https://a:2379\", \"http://b:2379\"]}}\n", "protected on some paths only"},
		"no issuer":                          {w, "tokens.issuer"},
		"Kubernetes and workloads":           {"kubernetes: {enabled: true}\n" + w, "not from both"},
		"Kubernetes and a file of keys":      {withKeys(t) + "kubernetes: {enabled: true}\n", "publishes its keys itself"},
		"Kubernetes without a namespace":     {"kubernetes: {enabled: true, namespace: \"\"}\n", "name the namespace"},
		"a kubeconfig for nothing":           {withKeys(t) + "kubernetes: {kubeconfig: /x}\n", "but not kubernetes.enabled"},
		"Kubernetes where there is none":     {"kubernetes: {enabled: true}\n", "this is no pod"},
		"a kubeconfig that is not there":     {"kubernetes: {enabled: true, kubeconfig: /nonexistent}\n", "kubernetes.kubeconfig: reading"},
		"log of an unknown format":           {withKeys(t) + "log: {format: xml}\n", "log.format"},
		"log of an unknown level":            {withKeys(t) + "log: {level: loud}\n", "log.level"},
		"SVIDs that live too short":          {withKeys(t) + "svid: {ttl: 1s}\n", "svid.minTTL"},
		"any pod beside Kubernetes":          {"kubernetes: {enabled: true}\nistio: {listen: \":0\", anyPodOf: [a]}\n", "without Kubernetes"},
		"a root for Istio without a cluster": {withKeys(t) + "istio: {listen: \":0\", publishRoot: true}\n", "need kubernetes.enabled"},
		"a Secret without a cluster":         {withKeys(t) + "istio: {listen: \":0\", istiod: {secret: a}}\n", "need kubernetes.enabled"},
		"two places for istiod":              {"kubernetes: {enabled: true}\nistio: {listen: \":0\", istiod: {secret: a, folder: b}}\n", "choose one"},
		"a place for istiod alone":           {withKeys(t) + "istio: {istiod: {folder: b}}\n", "of no use"},
		"any pod without Istio":              {withKeys(t) + "istio: {anyPodOf: [a]}\n", "of no use"},
		"one audience for two doors":         {withKeys(t) + "istio: {listen: \":0\", audience: signet}\n", "must not pass at the other"},
		"the audience of agents at one":      {withKeys(t) + "istio: {listen: \":0\", firstPartyAudience: signet-ca}\n", "must not pass at the other"},
		"no audience for Istio":              {withKeys(t) + "istio: {listen: \":0\", audience: \"\"}\n", "is required"},
		"lives beyond the maximum":           {withKeys(t) + "istio: {listen: \":0\", maxTTL: 25h}\n", "istio.maxTTL"},
		"no cluster for Istio":               {withKeys(t) + "istio: {listen: \":0\", clusterIDs: []}\n", "must not be empty"},
		"a pattern for node accounts":        {withKeys(t) + "dataDir: DATA\nistio: {listen: \":0\", nodeAccounts: [\"*/*\"]}\n", "not allowed here"},
		"tokens of more than a day":          {withKeys(t) + "dataDir: DATA\nistio: {listen: \":0\", maxTokenLifetime: 48h}\n", "maximum lifetime"},
		"a folder that is not there":         {withKeys(t) + "dataDir: /nonexistent/signet\n", "does not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			var out, errs bytes.Buffer
			err := execute(context.Background(), []string{"serve", "--config", write(t, strings.Replace(c.yaml, "DATA", private(t), 1))}, &out, &errs)
			if err == nil || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(c.says)) {
				t.Errorf("got %v, want %q", err, c.says)
			}
			if strings.Contains(err.Error(), "main.config") {
				t.Errorf("the error speaks of Go types: %v", err)
			}
		})
	}
	if err := execute(context.Background(), []string{"serve", "--config", "/nonexistent.yaml"}, &bytes.Buffer{}, &bytes.Buffer{}); err == nil {
		t.Error("a missing file was taken")
	}
	if err := execute(context.Background(), []string{"serve", "--config", write(t, strings.Repeat("#", 17<<20))}, &bytes.Buffer{}, &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("a huge file: %v", err)
	}
}

// withKeys is configuration that gets past the token keys.
func withKeys(t testing.TB) string {
	t.Helper()
	return "tokens: {issuer: \"https://issuer.test\", jwksFile: " + runtest.JWKSFile(t) + "}\n"
}

// openToAll is a file that everybody may read.
func openToAll(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(path, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// private is a folder that an authority can be made in.
func private(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}
