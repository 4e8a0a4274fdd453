package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	kubeyaml "k8s.io/apimachinery/pkg/util/yaml"

	meshconfig "istio.io/api/mesh/v1alpha1"
	"istio.io/istio/pilot/pkg/config/kube/crd"
	"istio.io/istio/pilot/pkg/config/memory"
	"istio.io/istio/pilot/pkg/features"
	"istio.io/istio/pilot/pkg/model"
	"istio.io/istio/pilot/pkg/networking"
	"istio.io/istio/pilot/pkg/networking/plugin/authn"
	"istio.io/istio/pilot/pkg/networking/plugin/authz"
	memregistry "istio.io/istio/pilot/pkg/serviceregistry/memory"
	"istio.io/istio/pkg/config/host"
	"istio.io/istio/pkg/config/mesh"
	"istio.io/istio/pkg/config/mesh/meshwatcher"
	"istio.io/istio/pkg/config/schema/collections"
	"istio.io/istio/pkg/config/schema/kind"
	"istio.io/istio/pkg/config/schema/resource"
	"istio.io/istio/pkg/util/sets"
)

// build asks for the filters of one workload.
type build struct {
	// Resources are YAML documents. They are not validated again: admission is
	// a question of its own, and what got past it is built.
	Resources     string            `json:"resources"`
	Namespace     string            `json:"namespace"`
	Labels        map[string]string `json:"labels"`
	RootNamespace string            `json:"rootNamespace"`
	TrustDomain   string            `json:"trustDomain"`
	Aliases       []string          `json:"aliases"`
	// Providers are the names of the mesh's external authorizers, each a gRPC
	// service NAME.providers.svc.cluster.local:9000.
	Providers []string `json:"providers"`
	// ManyProviders is PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS.
	ManyProviders bool `json:"manyProviders"`
	// Ports are those whose mutual-TLS mode is wanted.
	Ports []uint32 `json:"ports"`
}

// filters are those that Istio puts in front of the workload, in its order.
type filters struct {
	// HTTP are the filters of HTTP filter chains: CUSTOM, JWT, AUDIT, DENY, ALLOW.
	HTTP []json.RawMessage `json:"http"`
	// TCP are the filters of other filter chains.
	TCP []json.RawMessage `json:"tcp"`
	// Mode is the mode of ports without one of their own; Modes is that of Ports.
	Mode  string            `json:"mode"`
	Modes map[uint32]string `json:"modes"`
	// OwnPorts are the ports that have a mode of their own.
	OwnPorts []uint32 `json:"ownPorts"`
}

type pilot struct {
	jwks *model.JwksResolver
}

func newPilot() *pilot {
	return &pilot{jwks: model.NewJwksResolver(time.Hour, time.Hour, time.Hour, time.Millisecond)}
}

func (p *pilot) build(b *build) (*filters, error) {
	features.EnableMultipleCustomAuthzProviders = b.ManyProviders
	push, err := p.push(b)
	if err != nil {
		return nil, err
	}
	proxy := &model.Proxy{
		ID: "workload", Type: model.SidecarProxy, ConfigNamespace: b.Namespace, Labels: b.Labels,
		Metadata:     &model.NodeMetadata{Labels: b.Labels, Namespace: b.Namespace},
		IstioVersion: model.MaxIstioVersion,
	}
	out := &filters{HTTP: []json.RawMessage{}, TCP: []json.RawMessage{}, Modes: map[uint32]string{}}
	custom := authz.NewBuilder(authz.Custom, push, proxy, false)
	peer := authn.NewBuilder(push, proxy)
	local := authz.NewBuilder(authz.Local, push, proxy, false)
	// The order of listener_builder.go.
	const inbound = networking.ListenerClassSidecarInbound
	if err := appendJSON(&out.HTTP, custom.BuildHTTP(inbound)); err != nil {
		return nil, err
	}
	if err := appendJSON(&out.HTTP, peer.BuildHTTP(inbound)); err != nil {
		return nil, err
	}
	if err := appendJSON(&out.HTTP, local.BuildHTTP(inbound)); err != nil {
		return nil, err
	}
	if err := appendJSON(&out.TCP, custom.BuildTCP()); err != nil {
		return nil, err
	}
	if err := appendJSON(&out.TCP, local.BuildTCP()); err != nil {
		return nil, err
	}
	for i, m := range peer.ForPassthrough() {
		if i == 0 {
			out.Mode = m.Mode.String()
			continue
		}
		out.OwnPorts = append(out.OwnPorts, m.Port)
		out.Modes[m.Port] = m.Mode.String()
	}
	for _, port := range b.Ports {
		out.Modes[port] = peer.ForPort(port).Mode.String()
	}
	return out, nil
}

func appendJSON[M proto.Message](to *[]json.RawMessage, ms []M) error {
	for _, m := range ms {
		b, err := protojson.Marshal(m)
		if err != nil {
			return err
		}
		*to = append(*to, b)
	}
	return nil
}

// push is the state of a control plane that has seen the resources.
func (p *pilot) push(b *build) (*model.PushContext, error) {
	m := mesh.DefaultMeshConfig()
	m.RootNamespace = b.RootNamespace
	m.TrustDomain = b.TrustDomain
	m.TrustDomainAliases = b.Aliases
	services := map[host.Name]map[string]*model.Service{}
	for _, name := range b.Providers {
		hostname := host.Name(name + ".providers.svc.cluster.local")
		services[hostname] = map[string]*model.Service{"providers": {Hostname: hostname}}
		m.ExtensionProviders = append(m.ExtensionProviders, &meshconfig.MeshConfig_ExtensionProvider{
			Name: name,
			Provider: &meshconfig.MeshConfig_ExtensionProvider_EnvoyExtAuthzGrpc{
				EnvoyExtAuthzGrpc: &meshconfig.MeshConfig_ExtensionProvider_EnvoyExternalAuthorizationGrpcProvider{
					Service: "providers/" + string(hostname), Port: 9000,
				},
			},
		})
	}
	store := memory.MakeSkipValidation(collections.Pilot)
	for d := kubeyaml.NewYAMLOrJSONDecoder(strings.NewReader(b.Resources), 512<<10); ; {
		var obj crd.IstioKind
		if err := d.Decode(&obj); err == io.EOF {
			break
		} else if err != nil {
			return nil, fmt.Errorf("reading the resources: %w", err)
		}
		gvk := obj.GroupVersionKind()
		schema, ok := collections.Pilot.FindByGroupVersionAliasesKind(resource.FromKubernetesGVK(&gvk))
		if !ok {
			return nil, fmt.Errorf("the resource %s is of an unknown kind", gvk)
		}
		c, err := crd.ConvertObject(schema, &obj, "cluster.local")
		if err != nil {
			return nil, fmt.Errorf("%s %s/%s: %w", gvk.Kind, obj.Namespace, obj.Name, err)
		}
		// Resource versions would only matter for updates.
		c.ResourceVersion = ""
		if c.Namespace == "" {
			c.Namespace = "default" // as kubectl
		}
		if _, err := store.Create(*c); err != nil {
			return nil, fmt.Errorf("%s %s/%s: %w", gvk.Kind, c.Namespace, c.Name, err)
		}
	}
	env := model.NewEnvironment()
	env.ConfigStore = store
	env.Watcher = meshwatcher.NewTestWatcher(m)
	env.ServiceDiscovery = memregistry.NewServiceDiscovery()
	env.Init()
	// A state before, with the services and nothing else, so that only the
	// security policies are read.
	before := model.NewPushContext()
	before.ServiceIndex.HostnameAndNamespace = services
	before.InitDone.Store(true)
	push := model.NewPushContext()
	push.InitContext(env, before, &model.PushRequest{ConfigsUpdated: sets.New(
		model.ConfigKey{Kind: kind.AuthorizationPolicy},
		model.ConfigKey{Kind: kind.PeerAuthentication},
		model.ConfigKey{Kind: kind.RequestAuthentication},
	)})
	push.JwtKeyResolver = p.jwks
	return push, nil
}
