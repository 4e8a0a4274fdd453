package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/storage/etcd"

	"github.com/prometheus/client_golang/prometheus"
)

// storageConfig says where state and issuance log are; without anything they are in
// dataDir.
type storageConfig struct {
	Etcd etcdConfig `yaml:"etcd"`
}

type etcdConfig struct {
	// Endpoints are the members, https://HOST:PORT. None: state and log are in dataDir.
	Endpoints []string `yaml:"endpoints"`
	// CAFile holds the roots that members are verified by. Empty: the system's.
	CAFile string `yaml:"caFile"`
	// CertFile and KeyFile prove to members who this is; read at each connection.
	CertFile string `yaml:"certFile"`
	KeyFile  string `yaml:"keyFile"`
	// Username, and a file with the password, log in where etcd has authentication on.
	Username     string `yaml:"username"`
	PasswordFile string `yaml:"passwordFile"`
	// Prefix is put before every key.
	Prefix string `yaml:"prefix"`
	// Timeout is how long one request to one member may take.
	Timeout time.Duration `yaml:"timeout"`
	// OwnerTTL is how long others wait for what a replica that died held.
	OwnerTTL time.Duration `yaml:"ownerTTL"`
}

func defaultStorage() (c storageConfig) {
	c.Etcd.Prefix, c.Etcd.Timeout, c.Etcd.OwnerTTL = "/signet/", 3*time.Second, 10*time.Second
	return c
}

func (c etcdConfig) enabled() bool { return len(c.Endpoints) > 0 }

// check refuses what says that etcd is meant and does not say where it is, and the like.
func (c etcdConfig) check() error {
	switch {
	case !c.enabled() && (c.CAFile != "" || c.CertFile != "" || c.KeyFile != "" || c.Username != "" || c.PasswordFile != ""):
		return errors.New("storage.etcd.endpoints is empty, but other keys of storage.etcd are set: name the members, or remove them")
	case (c.CertFile == "") != (c.KeyFile == ""):
		return errors.New("storage.etcd.certFile and storage.etcd.keyFile: both or neither")
	case (c.Username == "") != (c.PasswordFile == ""):
		return errors.New("storage.etcd.username and storage.etcd.passwordFile: both or neither")
	}
	return nil
}

// sharedState refuses a configuration of replicas of which each would be as good as the
// root, and what is wrong with storage.etcd, before anything is connected to.
func (c config) sharedState() error {
	if err := c.Storage.Etcd.check(); err != nil || !c.Storage.Etcd.enabled() {
		return err
	}
	cfg := ca.Config{Instance: c.Instance}
	c.Authority.apply(&cfg)
	return cfg.CheckShared()
}

// open connects to what replicas share, if anything is, and has cfg use it. The result
// disconnects.
func (c storageConfig) open(ctx context.Context, cfg *ca.Config) (func() error, error) {
	if !c.Etcd.enabled() {
		return func() error { return nil }, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("storage.etcd: %w", err)
	}
	s, err := c.Etcd.open(ctx, fmt.Sprintf("%s/%d", name, os.Getpid()), cfg.Log, cfg.Metrics)
	if err != nil {
		return nil, err
	}
	// A process of this replica that died has its log for so long, and a little more.
	cfg.Shared = ca.Shared{Store: s, Files: s.Files(), LogWait: c.Etcd.OwnerTTL + 5*time.Second}
	return s.Close, nil
}

// open connects to etcd. name tells people who it was.
func (c etcdConfig) open(ctx context.Context, name string, log *slog.Logger, reg prometheus.Registerer) (*etcd.Store, error) {
	opt := etcd.Options{Endpoints: c.Endpoints, Username: c.Username, Prefix: c.Prefix, Timeout: c.Timeout, OwnerTTL: c.OwnerTTL, Name: name, Log: log, Metrics: reg}
	if c.PasswordFile != "" {
		b, err := keys.ReadSecret(c.PasswordFile)
		if err != nil {
			return nil, fmt.Errorf("storage.etcd.passwordFile: %w", err)
		}
		opt.Password = string(b)
	}
	var err error
	if opt.TLS, err = c.tls(); err != nil {
		return nil, err
	}
	return etcd.Open(ctx, opt)
}

// tls is the client's side of TLS; nil if nothing is said of it.
func (c etcdConfig) tls() (*tls.Config, error) {
	if c.CAFile == "" && c.CertFile == "" {
		return nil, nil
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		b, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("storage.etcd.caFile: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("storage.etcd.caFile: %s holds no certificate", c.CAFile)
		}
	}
	if c.CertFile != "" {
		load := func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
			if err != nil {
				return nil, fmt.Errorf("storage.etcd.certFile and keyFile: %w", err)
			}
			return &pair, nil
		}
		if _, err := load(); err != nil {
			return nil, err
		}
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	return t, nil
}
