package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	structuraldefaulting "k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	kubeyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	apicrds "istio.io/istio/manifests"
	"istio.io/istio/pkg/config/crd"
	"istio.io/istio/pkg/config/schema/collections"
	"istio.io/istio/pkg/webhooks/validation/server"
)

// admission is what a cluster with Istio says to a resource.
type admission struct {
	Accepted bool `json:"accepted"`
	// By says who refused: "yaml", "crd" or "webhook".
	By       string   `json:"by,omitempty"`
	Message  string   `json:"message,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
}

// gate is the CRD schemas (with CEL) and the validation webhook.
type gate struct {
	crds       *crd.Validator
	structural map[schema.GroupVersionKind]*structuralschema.Structural
	webhook    http.Handler
}

func newGate() (*gate, error) {
	// The chart's file is what `helm install istio-base` applies.
	f, err := apicrds.FS.Open("charts/base/files/crd-all.gen.yaml")
	if err != nil {
		return nil, fmt.Errorf("opening the CRDs: %w", err)
	}
	defer f.Close()
	g := &gate{structural: map[schema.GroupVersionKind]*structuralschema.Structural{}}
	var crds []apiextensions.CustomResourceDefinition
	for d := kubeyaml.NewYAMLOrJSONDecoder(f, 512<<10); ; {
		var v1 apiextensionsv1.CustomResourceDefinition
		if err := d.Decode(&v1); err == io.EOF {
			break
		} else if err != nil {
			return nil, fmt.Errorf("reading the CRDs: %w", err)
		}
		if v1.Spec.Group != "security.istio.io" {
			continue
		}
		var in apiextensions.CustomResourceDefinition
		if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(&v1, &in, nil); err != nil {
			return nil, err
		}
		crds = append(crds, in)
		for _, v := range in.Spec.Versions {
			s := v.Schema
			if s == nil {
				s = in.Spec.Validation
			}
			st, err := structuralschema.NewStructural(s.OpenAPIV3Schema)
			if err != nil {
				return nil, err
			}
			g.structural[schema.GroupVersionKind{Group: in.Spec.Group, Version: v.Name, Kind: in.Spec.Names.Kind}] = st
		}
	}
	if g.crds, err = crd.NewValidatorFromCRDsWithOptions(crds, crd.WithoutCRDValidation()); err != nil {
		return nil, fmt.Errorf("compiling the CRDs: %w", err)
	}
	mux := http.NewServeMux()
	if _, err := server.New(server.Options{Schemas: collections.Istio, DomainSuffix: "cluster.local", Mux: mux}); err != nil {
		return nil, err
	}
	g.webhook = mux
	return g, nil
}

// admit is `kubectl apply` of one document: the strict reading of the API server,
// the schema of the CRD with its CEL rules, then the webhook.
func (g *gate) admit(text string) (*admission, error) {
	raw, err := yaml.YAMLToJSONStrict([]byte(text))
	if err != nil {
		return &admission{By: "yaml", Message: err.Error()}, nil
	}
	var u unstructured.Unstructured
	if err := u.UnmarshalJSON(raw); err != nil {
		return &admission{By: "yaml", Message: err.Error()}, nil
	}
	// As the API server does: null for a field that cannot be null is absence.
	if s, ok := g.structural[u.GroupVersionKind()]; ok {
		structuraldefaulting.PruneNonNullableNullsWithoutDefaults(u.Object, s)
	}
	if err := g.crds.ValidateCustomResource(&u); err != nil {
		return &admission{By: "crd", Message: err.Error()}, nil
	}
	if raw, err = json.Marshal(u.Object); err != nil {
		return nil, err
	}
	return g.ask(&u, raw)
}

func (g *gate) ask(u *unstructured.Unstructured, raw []byte) (*admission, error) {
	review, err := json.Marshal(map[string]any{
		"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
		"request": map[string]any{
			"uid": "1", "operation": "CREATE", "name": u.GetName(), "namespace": u.GetNamespace(),
			"kind":   map[string]string{"group": u.GroupVersionKind().Group, "version": u.GroupVersionKind().Version, "kind": u.GetKind()},
			"object": json.RawMessage(raw),
		},
	})
	if err != nil {
		return nil, err
	}
	req := httptest.NewRequest(http.MethodPost, "/validate", bytes.NewReader(review))
	req.Header.Set("Content-Type", "application/json")
	rec := httptest.NewRecorder()
	g.webhook.ServeHTTP(rec, req)
	var out struct {
		Response struct {
			Allowed  bool     `json:"allowed"`
			Warnings []string `json:"warnings"`
			Status   struct {
				Message string `json:"message"`
			} `json:"status"`
		} `json:"response"`
	}
	if err := json.Unmarshal(rec.Body.Bytes(), &out); err != nil {
		return nil, fmt.Errorf("the webhook said %d %s: %w", rec.Code, strings.TrimSpace(rec.Body.String()), err)
	}
	a := &admission{Accepted: out.Response.Allowed, Message: out.Response.Status.Message, Warnings: out.Response.Warnings}
	if !a.Accepted {
		a.By = "webhook"
	}
	return a, nil
}
