package kubetest

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"
)

// Apply applies manifests as kubectl apply does on the server's side. A path is a
// YAML file of one or more documents, or a folder of such files.
func (c *Cluster) Apply(tb testing.TB, paths ...string) {
	tb.Helper()
	for _, path := range paths {
		files := []string{path}
		if info, err := os.Stat(path); err != nil {
			tb.Fatal(err)
		} else if info.IsDir() {
			if files, err = filepath.Glob(filepath.Join(path, "*.yaml")); err != nil || len(files) == 0 {
				tb.Fatalf("no manifests in %s: %v", path, err)
			}
			slices.Sort(files)
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				tb.Fatal(err)
			}
			c.apply(tb, file, b)
		}
	}
}

// ApplyYAML is [Cluster.Apply] of a text.
func (c *Cluster) ApplyYAML(tb testing.TB, text string) {
	tb.Helper()
	c.apply(tb, "text", []byte(text))
}

func (c *Cluster) apply(tb testing.TB, origin string, manifests []byte) {
	tb.Helper()
	resources, err := dynamic.NewForConfig(c.admin)
	if err != nil {
		tb.Fatal(err)
	}
	known, err := discovery.NewDiscoveryClientForConfig(c.admin)
	if err != nil {
		tb.Fatal(err)
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(known))
	reader := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(manifests)))
	for {
		doc, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			tb.Fatalf("%s: %v", origin, err)
		}
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(doc, &object.Object); err != nil {
			tb.Fatalf("%s: %v", origin, err)
		}
		if len(object.Object) == 0 {
			continue
		}
		kind := object.GroupVersionKind()
		mapping, err := mapper.RESTMapping(kind.GroupKind(), kind.Version)
		if err != nil {
			tb.Fatalf("%s: %v", origin, err)
		}
		var client dynamic.ResourceInterface = resources.Resource(mapping.Resource)
		if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
			namespace := object.GetNamespace()
			if namespace == "" {
				namespace = metav1.NamespaceDefault
			}
			client = resources.Resource(mapping.Resource).Namespace(namespace)
		}
		if _, err := client.Apply(tb.Context(), object.GetName(), object, metav1.ApplyOptions{FieldManager: "kubetest", Force: true}); err != nil {
			tb.Fatalf("applying %s: %s %s: %v", origin, kind.Kind, object.GetName(), err)
		}
	}
}
