package run

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/transport"
)

// ServiceAccountDir is where Kubernetes mounts the credentials of a pod's service
// account.
const ServiceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// APIServer says where the API server is, and as whom to speak to it: as the file
// kubeconfig says or, if that is empty, as Kubernetes tells every pod, by the
// variables KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT and by the files token
// and ca.crt in dir. Both are read again while they are used, the token every minute
// and after the API server has refused it. It contacts nobody.
//
// Unlike rest.InClusterConfig it never falls back to the certificate authorities of
// the system, and dir may be another folder than [ServiceAccountDir].
func APIServer(kubeconfig, dir string) (*rest.Config, error) {
	if kubeconfig != "" {
		c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if err != nil {
			return nil, fmt.Errorf("connecting to Kubernetes: kubernetes.kubeconfig: reading %s: %w", kubeconfig, err)
		}
		return c, nil
	}
	c, err := inPod(dir)
	if err != nil {
		return nil, fmt.Errorf("connecting to Kubernetes: kubernetes.kubeconfig is empty and this is no pod with a service account: %w", err)
	}
	return c, nil
}

func inPod(dir string) (*rest.Config, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set")
	}
	token, roots := filepath.Join(dir, "token"), filepath.Join(dir, "ca.crt")
	if b, err := os.ReadFile(token); err != nil {
		return nil, fmt.Errorf("reading the token: %w", err)
	} else if len(b) == 0 {
		return nil, fmt.Errorf("reading the token: %s is empty", token)
	}
	b, err := os.ReadFile(roots)
	if err != nil {
		return nil, fmt.Errorf("reading what the API server is verified under: %w", err)
	}
	if !x509.NewCertPool().AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("reading what the API server is verified under: %s holds no certificate", roots)
	}
	c := &rest.Config{Host: "https://" + net.JoinHostPort(host, port), TLSClientConfig: rest.TLSClientConfig{CAFile: roots}}
	// rest.Config.BearerTokenFile would not look at the file when the API server
	// refuses what was in it.
	c.Wrap(transport.ResettableTokenSourceWrapTransport(transport.NewCachedFileTokenSource(token)))
	return c, nil
}
