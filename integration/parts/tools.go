package parts

import (
	"context"
	"io"
	"os"
	"path/filepath"
)

// Tools returns the folder that holds the programs of the tools module in dir
// (buf, staticcheck, protoc-gen-go, protoc-gen-go-grpc), building them if that
// module, at these versions and with this Go, was not built before.
func Tools(ctx context.Context, dir string, progress io.Writer) (Part, error) {
	m := goModule{name: "go", title: "buf and staticcheck", dir: dir, packages: []string{"tool"}}
	key, err := m.key()
	if err != nil {
		return Part{}, err
	}
	target, origin, err := m.build(ctx, progress)
	if err != nil {
		return Part{}, err
	}
	return Part{"go tools", key, target, origin}, nil
}

// FindEtcd looks for the etcd of the module below root, the product's folder, in
// the cache. The error wraps [ErrMissing] if it was not built yet.
func FindEtcd(root string) (Part, error) { return find(etcd(root), "etcd", EtcdVersion) }

// BuildEtcd is [FindEtcd], and builds what is missing, which takes a minute.
// progress gets a line before.
func BuildEtcd(ctx context.Context, root string, progress io.Writer) (Part, error) {
	return build(ctx, etcd(root), "etcd", EtcdVersion, progress)
}

// FindEtcdTools looks for the folder of etcdctl and etcdutl, of the same module, in the
// cache. The error wraps [ErrMissing] if they were not built yet.
func FindEtcdTools(root string) (Part, error) {
	return find(etcdTools(root), "etcd's tools", EtcdVersion)
}

// BuildEtcdTools is [FindEtcdTools], and builds what is missing. progress gets a line
// before.
func BuildEtcdTools(ctx context.Context, root string, progress io.Writer) (Part, error) {
	return build(ctx, etcdTools(root), "etcd's tools", EtcdVersion, progress)
}

// FindAPIServer looks for the kube-apiserver of the module below root, the
// product's folder, in the cache. The error wraps [ErrMissing] if it was not built
// yet.
func FindAPIServer(root string) (Part, error) {
	return find(apiServer(root), "kube-apiserver", KubernetesVersion)
}

// BuildAPIServer is [FindAPIServer], and builds what is missing, which takes five
// minutes. progress gets a line before.
func BuildAPIServer(ctx context.Context, root string, progress io.Writer) (Part, error) {
	return build(ctx, apiServer(root), "kube-apiserver", KubernetesVersion, progress)
}

// FindIstio looks for Istio's compiler and admission, the program of the module
// integration/istio below root, in the cache. The error wraps [ErrMissing] if it
// was not built yet.
func FindIstio(root string) (Part, error) { return find(istio(root), "istio", IstioVersion) }

// BuildIstio is [FindIstio], and builds what is missing, which takes four minutes.
// progress gets a line before.
func BuildIstio(ctx context.Context, root string, progress io.Writer) (Part, error) {
	return build(ctx, istio(root), "istio", IstioVersion, progress)
}

// FindStepCA looks for step-ca, the program of the module integration/stepca below
// root, in the cache. The error wraps [ErrMissing] if it was not built yet.
func FindStepCA(root string) (Part, error) { return find(stepCA(root), "step-ca", StepCAVersion) }

// BuildStepCA is [FindStepCA], and builds what is missing, which takes a minute.
// progress gets a line before.
func BuildStepCA(ctx context.Context, root string, progress io.Writer) (Part, error) {
	return build(ctx, stepCA(root), "step-ca", StepCAVersion, progress)
}

// Versions that the modules below integration/ ask for; a test holds the two
// together.
const (
	EtcdVersion       = "3.6.16"
	KubernetesVersion = "1.37.2"
	StepCAVersion     = "0.30.2"
	IstioVersion      = "0.0.0-20260827124520-eed52ebb66ad"
)

func etcd(root string) goModule {
	return goModule{
		name: "etcd-" + EtcdVersion, title: "etcd " + EtcdVersion + " (a minute)", dir: filepath.Join(root, "integration", "etcd"),
		packages: []string{"go.etcd.io/etcd/server/v3"}, output: "etcd", ldflags: "-s -w",
	}
}

func etcdTools(root string) goModule {
	return goModule{
		name: "etcd-tools-" + EtcdVersion, title: "etcdctl and etcdutl " + EtcdVersion, dir: filepath.Join(root, "integration", "etcd"),
		packages: []string{"go.etcd.io/etcd/etcdctl/v3", "go.etcd.io/etcd/etcdutl/v3"}, ldflags: "-s -w",
	}
}

func apiServer(root string) goModule {
	// Without these it says v0.0.0-master.
	const stamp = "k8s.io/component-base/version"
	return goModule{
		name: "kube-apiserver-" + KubernetesVersion, title: "kube-apiserver " + KubernetesVersion + " (five minutes)",
		dir:      filepath.Join(root, "integration", "kubernetes"),
		packages: []string{"k8s.io/kubernetes/cmd/kube-apiserver"}, output: "kube-apiserver",
		ldflags: "-s -w -X " + stamp + ".gitVersion=v" + KubernetesVersion + " -X " + stamp + ".gitMajor=1 -X " + stamp + ".gitMinor=37",
	}
}

func istio(root string) goModule {
	return goModule{
		name: "istio", title: "Istio's compiler and admission (four minutes)", dir: filepath.Join(root, "integration", "istio"),
		packages: []string{"."}, output: "istio", ldflags: "-s -w",
	}
}

func stepCA(root string) goModule {
	return goModule{
		name: "step-ca-" + StepCAVersion, title: "step-ca " + StepCAVersion + " (a minute)", dir: filepath.Join(root, "integration", "stepca"),
		packages: []string{"."}, output: "stepca", ldflags: "-s -w",
	}
}

func find(m goModule, name, version string) (Part, error) {
	target, err := m.find()
	if err != nil {
		return Part{}, err
	}
	return Part{name, version, filepath.Join(target, m.output), "cache"}, nil
}

func build(ctx context.Context, m goModule, name, version string, progress io.Writer) (Part, error) {
	target, origin, err := m.build(ctx, progress)
	if err != nil {
		return Part{}, err
	}
	return Part{name, version, filepath.Join(target, m.output), origin}, nil
}

// Root is the product's folder: the nearest one above the working directory that
// holds integration/kubernetes/go.mod.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "integration", "kubernetes", "go.mod")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", &os.PathError{Op: "finding the product's folder above the working directory", Path: "integration/kubernetes/go.mod", Err: os.ErrNotExist}
		}
		dir = up
	}
}
