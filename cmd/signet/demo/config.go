package demo

import (
	"fmt"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"go.yaml.in/yaml/v3"
)

// svidTTL is how long SVIDs live: seconds, so that their rotation is seen. They
// are renewed at about half of it.
const svidTTL = 10 * time.Second

// daemonConfigs are ca.yaml and agent.yaml.
var daemonConfigs = template.Must(template.New("").Funcs(template.FuncMap{"quote": quoteYAML}).Parse(`
{{- define "ca.yaml" -}}
# The authority of the demo.
trustDomain: {{.TrustDomain}}
instance: 1
dataDir: {{quote .CADir}}
listen: {{quote .CA}}
dnsNames: [localhost]
publish:
  rootFile: {{quote .RootFile}}
svid:
  # Seconds, so that rotation is seen. Use the defaults for anything else.
  ttl: {{.SVIDTTL}}
  minTTL: 1s
tokens:
  issuer: {{quote .Issuer}}
  jwksFile: {{quote .JWKSFile}}
agents:
  serviceAccounts: [{{.AgentPod.Namespace}}/{{.AgentPod.ServiceAccount}}]
# Instead of Kubernetes: the pods that there are.
workloads:
{{- range .Pods}}
  - namespace: {{.Namespace}}
    serviceAccount: {{.ServiceAccount}}
    pod: {{.Name}}
    podUID: {{quote .UID}}
    node: {{.Node}}
    nodeUID: {{quote .NodeUID}}
    labels: {app: {{.App}}}
{{- end}}
http:
  listen: {{quote .CAHTTP}}
{{end}}

{{- define "agent.yaml" -}}
# The agent of {{.AgentPod.Node}}.
trustDomain: {{.TrustDomain}}
node: {{.AgentPod.Node}}
socket: {{quote .Socket}}
# What lets it serve at once after a restart; never below the socket's folder.
stateDir: {{quote .StateDir}}
# The keys of a demo may be swapped out.
allowSwap: true
ca:
  addresses: [{{quote .CA}}]
  rootFile: {{quote .RootFile}}
  tokenFile: {{quote .AgentToken}}
tokens:
  issuer: {{quote .Issuer}}
  jwksFile: {{quote .JWKSFile}}
policies:
  dir: {{quote .PolicyDir}}
http:
  listen: {{quote .AgentHTTP}}
{{end}}`))

// quoteYAML renders a string as a YAML scalar.
func quoteYAML(s string) (string, error) {
	b, err := yaml.Marshal(&yaml.Node{Kind: yaml.ScalarNode, Style: yaml.DoubleQuotedStyle, Value: s})
	return strings.TrimSpace(string(b)), err
}

// configPod is a pod as the templates see it.
type configPod struct {
	Namespace, ServiceAccount, Name, UID, Node, NodeUID, App string
}

func toConfig(p pod) configPod {
	return configPod{p.namespace, p.serviceAccount, p.name, p.uid, p.node, p.nodeUID, p.app}
}

// writeConfigs writes ca.yaml and agent.yaml.
func (s *stage) writeConfigs() error {
	data := struct {
		TrustDomain, CADir, CA, CAHTTP, RootFile, Issuer, JWKSFile string
		SVIDTTL                                                    time.Duration
		Socket, StateDir, AgentToken, PolicyDir, AgentHTTP         string
		AgentPod                                                   configPod
		Pods                                                       []configPod
	}{
		TrustDomain: trustDomain, CADir: filepath.Join(s.dir, "ca"), CA: s.at.ca, CAHTTP: s.at.caHTTP, RootFile: s.rootFile(),
		Issuer: s.issuer.URL(), JWKSFile: filepath.Join(s.dir, "issuer", "jwks.json"), SVIDTTL: svidTTL,
		Socket: s.socket(), StateDir: s.stateDir, AgentToken: s.kubelet.tokenFile(agentPod), PolicyDir: filepath.Join(s.dir, "policies"),
		AgentHTTP: s.at.agentHTTP, AgentPod: toConfig(agentPod),
	}
	for _, p := range allPods() {
		data.Pods = append(data.Pods, toConfig(p))
	}
	for _, name := range []string{"ca.yaml", "agent.yaml"} {
		var b strings.Builder
		err := daemonConfigs.ExecuteTemplate(&b, name, data)
		if err == nil {
			err = replaceFile(s.dir, filepath.Join(s.dir, name), b.String())
		}
		if err != nil {
			return fmt.Errorf("writing %s: %w", name, err)
		}
	}
	return nil
}
