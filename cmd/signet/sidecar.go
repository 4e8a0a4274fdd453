package main

import (
	"bytes"
	"embed"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// sidecar is everything that an Envoy bootstrap is rendered from. Its parts are
// valid by construction: see the parse functions in this package.
type sidecar struct {
	NodeID, Cluster string
	Labels          []label
	Socket          string
	TokenSecret     string
	Admin           *endpoint
	// PeerPrefixes are what the URI SAN of an inbound peer may begin with.
	PeerPrefixes []string
	TLSMinimum   string // as Envoy names it: TLSv1_2 or TLSv1_3
	AccessLog    bool
	Retries      uint32
	Inbound      *inbound
	Outbounds    []outbound
}

type label struct{ Key, Value string }

type inbound struct {
	Listen, App endpoint
	// AppHTTP2 says that the application speaks HTTP/2 without TLS, as gRPC
	// servers do, and not HTTP/1.1.
	AppHTTP2 bool
}

type outbound struct {
	Name             string
	Listen, Upstream endpoint
	IDs              []spiffeid.ID // of which the upstream must be one
}

// ListenerName and ClusterName cannot collide with the fixed names, inbound, app
// and signet-agent.
func (o outbound) ListenerName() string { return "outbound_" + o.Name }
func (o outbound) ClusterName() string  { return "upstream_" + o.Name }

// TLS12 reports whether TLS 1.2 may be spoken.
func (s *sidecar) TLS12() bool { return s.TLSMinimum == "TLSv1_2" }

//go:embed envoy.yaml.tmpl token-secret.yaml.tmpl
var templates embed.FS

// render writes the bootstrap. Equal sidecars give equal bytes.
func (s *sidecar) render(w io.Writer) error {
	t := template.New("").Option("missingkey=error")
	t.Funcs(template.FuncMap{
		"quote":   quote,
		"address": address,
		"indent":  indent,
		"include": func(name string, data any) (string, error) {
			var b bytes.Buffer
			err := t.ExecuteTemplate(&b, name, data)
			return b.String(), err
		},
		"chain": func(s *sidecar, name string) any {
			return struct {
				Root *sidecar
				Name string
			}{s, name}
		},
		"upstream": func(s *sidecar, o outbound) any {
			return struct {
				Root *sidecar
				Name string
				Up   outbound
			}{s, o.ListenerName(), o}
		},
	})
	return execute(t, w, "envoy.yaml.tmpl", s)
}

// renderTokenSecret writes the file that the bootstrap refers to as TokenSecret.
func renderTokenSecret(w io.Writer, tokenFile string) error {
	t := template.New("").Funcs(template.FuncMap{"quote": quote})
	return execute(t, w, "token-secret.yaml.tmpl", struct{ TokenFile, Dir string }{tokenFile, filepath.Dir(tokenFile)})
}

// execute writes nothing unless the whole template could be executed.
func execute(t *template.Template, w io.Writer, name string, data any) error {
	if _, err := t.ParseFS(templates, name); err != nil {
		return err
	}
	var b bytes.Buffer
	if err := t.ExecuteTemplate(&b, name, data); err != nil {
		return err
	}
	_, err := w.Write(b.Bytes())
	return err
}

// quote renders any value as a double-quoted YAML scalar. JSON's escapes are a
// subset of YAML's (YAML 1.2 §1.3), so the scalar ends where it should whatever
// the value holds.
func quote(v any) (string, error) {
	b, err := json.Marshal(fmt.Sprint(v))
	return string(b), err
}

func address(e endpoint) (string, error) {
	host, err := quote(e.Host)
	return fmt.Sprintf("{socket_address: {address: %s, port_value: %d}}", host, e.Port), err
}

// indent puts n spaces before each line that is not empty.
func indent(n int, s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if l != "" {
			lines[i] = strings.Repeat(" ", n) + l
		}
	}
	return strings.Join(lines, "\n")
}
