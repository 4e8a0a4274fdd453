package main

import (
	"fmt"
	"os"
	"time"

	"istio.io/istio/pkg/security"
	"istio.io/istio/security/pkg/nodeagent/cache"
	citadel "istio.io/istio/security/pkg/nodeagent/caclient/providers/citadel"
)

// agent asks for a workload certificate as pilot-agent does: its secret cache makes
// key and CSR, its CA client asks the authority.
type agent struct {
	// Address is HOST:PORT of the authority, SAN the name that it must have.
	Address string `json:"address"`
	SAN     string `json:"san"`
	// RootFile holds the roots that the authority is verified under, in PEM.
	RootFile string `json:"rootFile"`
	// TokenFile holds the token; CertFile and KeyFile the client certificate. Each may
	// be empty.
	TokenFile string `json:"tokenFile"`
	CertFile  string `json:"certFile"`
	KeyFile   string `json:"keyFile"`
	ClusterID string `json:"clusterID"`
	// Namespace and ServiceAccount go into the CSR.
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
	// ECC makes a P-256 key instead of an RSA key of 2048 bits, Istio's default.
	ECC bool `json:"ecc"`
}

// secret is what pilot-agent would hand to Envoy.
type secret struct {
	Chain   string    `json:"chain"`
	Key     string    `json:"key"`
	Root    string    `json:"root"`
	Expires time.Time `json:"expires"`
}

func (a *agent) secret() (*secret, error) {
	opts := &security.Options{
		CAEndpoint: a.Address, CAEndpointSAN: a.SAN, ClusterID: a.ClusterID, TrustDomain: "cluster.local",
		WorkloadNamespace: a.Namespace, ServiceAccount: a.ServiceAccount,
		// pilot-agent's defaults.
		WorkloadRSAKeySize: 2048, SecretTTL: 24 * time.Hour, SecretRotationGracePeriodRatio: 0.5,
		CredFetcher: tokenFile(a.TokenFile),
	}
	if a.ECC {
		opts.ECCSigAlg = "ECDSA"
	}
	client, err := citadel.NewCitadelClient(opts, &citadel.TLSOptions{RootCert: a.RootFile, Cert: a.CertFile, Key: a.KeyFile})
	if err != nil {
		return nil, err
	}
	secrets, err := cache.NewSecretManagerClient(client, opts)
	if err != nil {
		client.Close()
		return nil, err
	}
	defer secrets.Close()
	leaf, err := secrets.GenerateSecret(security.WorkloadKeyCertResourceName)
	if err != nil {
		return nil, fmt.Errorf("asking for a certificate: %w", err)
	}
	root, err := secrets.GenerateSecret(security.RootCertReqResourceName)
	if err != nil {
		return nil, fmt.Errorf("asking for the roots: %w", err)
	}
	return &secret{Chain: string(leaf.CertificateChain), Key: string(leaf.PrivateKey), Root: string(root.RootCert), Expires: leaf.ExpireTime}, nil
}

// tokenFile is where the token lies, read for each call. Istio's own fetcher would
// bring Google's client along.
type tokenFile string

func (f tokenFile) GetPlatformCredential() (string, error) {
	if f == "" {
		return "", nil
	}
	b, err := os.ReadFile(string(f))
	return string(b), err
}

func (tokenFile) GetIdentityProvider() string { return "" }
func (tokenFile) Stop()                       {}
