package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/external"
	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/storage"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// authorityConfig says where the authority's own certificates and keys come from.
type authorityConfig struct {
	RootTTL         time.Duration `yaml:"rootTTL"`
	IntermediateTTL time.Duration `yaml:"intermediateTTL"`
	// Keys are KMS URIs of where keys are made, and what opens them.
	Keys struct {
		Root         string `yaml:"root"`
		Intermediate string `yaml:"intermediate"`
		// PassphraseFile encrypts keys that are files.
		PassphraseFile string `yaml:"passphraseFile"`
		// SignTimeout is how long a key device may take for a signature.
		SignTimeout time.Duration `yaml:"signTimeout"`
	} `yaml:"keys"`
	// RootReplica is the instance of the replica that holds the root's key, where replicas
	// share their state and it is in no device that all reach.
	RootReplica uint8 `yaml:"rootReplica"`
	// OfflineRoot: the root is elsewhere, and signs a series of intermediates in
	// advance.
	OfflineRoot bool `yaml:"offlineRoot"`
	// Cacerts is a folder with an issuer and its key, as Istio has them.
	Cacerts string `yaml:"cacerts"`
	// Upstream has intermediates signed by a command.
	Upstream struct {
		Exec     []string      `yaml:"exec"`
		Timeout  time.Duration `yaml:"timeout"`
		RootFile string        `yaml:"rootFile"`
	} `yaml:"upstream"`
	// CRL says whether and how revoked certificates are published.
	CRL struct {
		Enabled bool `yaml:"enabled"`
		// Lifetime is how long a list is good for.
		Lifetime time.Duration `yaml:"lifetime"`
	} `yaml:"crl"`
	// Propagation is how long a new root is published before it is used.
	Propagation time.Duration `yaml:"propagation"`
	// TaintSpread is how long agents spread the replacement of SVIDs over.
	TaintSpread time.Duration `yaml:"taintSpread"`
}

func defaultAuthority() (c authorityConfig) {
	c.RootTTL, c.IntermediateTTL = 365*24*time.Hour, 7*24*time.Hour
	c.Keys.Root, c.Keys.Intermediate = "softkms:", "softkms:"
	c.Keys.SignTimeout = 15 * time.Second
	c.Upstream.Timeout = 30 * time.Second
	c.Propagation, c.TaintSpread = time.Minute, time.Minute
	return c
}

func (c authorityConfig) apply(cfg *ca.Config) {
	cfg.RootTTL, cfg.IntermediateTTL = c.RootTTL, c.IntermediateTTL
	cfg.Keys = keys.Config{
		PassphraseFile: c.Keys.PassphraseFile, SignTimeout: c.Keys.SignTimeout, Managers: keyManagers(),
		Made: map[string]string{keys.Root: c.Keys.Root, keys.Intermediate: c.Keys.Intermediate},
	}
	cfg.CRL = ca.CRLConfig{Enabled: c.CRL.Enabled, Lifetime: c.CRL.Lifetime}
	cfg.OfflineRoot, cfg.Cacerts, cfg.Propagation = c.OfflineRoot, c.Cacerts, c.Propagation
	cfg.TaintSpread, cfg.RootReplica = c.TaintSpread, c.RootReplica
	cfg.Upstream = ca.UpstreamConfig{Exec: c.Upstream.Exec, Timeout: c.Upstream.Timeout, RootFile: c.Upstream.RootFile}
}

// authorityCommand is what an operator does with an offline root.
func authorityCommand(stdout io.Writer) *cobra.Command {
	group := &cobra.Command{Use: "authority", Short: "Have an offline root sign this authority's intermediates"}
	var path, out string
	var count int
	csr := &cobra.Command{Use: "csr", Short: "Print requests for a series of intermediates, PEM; asking again prints the same", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var requests [][]byte
			err := withAuthority(cmd.Context(), path,
				func(a *ca.Offline) (err error) {
					requests, err = a.Requests(cmd.Context(), count)
					return err
				},
				func(a capb.AdminClient) error {
					resp, err := a.CreateRequests(cmd.Context(), &capb.CreateRequestsRequest{Count: uint32(max(count, 0))})
					requests = resp.GetRequests()
					return err
				})
			if err != nil {
				return err
			}
			return writeRequests(stdout, out, requests)
		}}
	csr.Flags().IntVar(&count, "count", 12, "how many requests there should be; 0 prints those that wait")
	csr.Flags().StringVar(&out, "out", "", "write each to a file in this `FOLDER` instead: 01.csr, 02.csr, …")
	load := &cobra.Command{Use: "import CHAIN.pem…", Short: "Take what the root signed: all files, or none", Args: cobra.MinimumNArgs(1),
		Long: "Take what the root signed: all files, or none. Each file holds an intermediate first, then what signed it, up to the root, which may be left out once it is known.",
		RunE: func(cmd *cobra.Command, files []string) error {
			var chains [][]byte
			for _, f := range files {
				text, err := os.ReadFile(f)
				if err != nil {
					return fmt.Errorf("importing intermediates: %w", err)
				}
				chains = append(chains, text)
			}
			var got *capb.ImportChainsResponse
			err := withAuthority(cmd.Context(), path,
				func(a *ca.Offline) error {
					s, err := a.Import(cmd.Context(), chains)
					if err == nil {
						got = &capb.ImportChainsResponse{Root: s.Root.Raw, SeriesEnd: timestamppb.New(s.End)}
						for _, c := range s.Intermediates {
							got.Intermediates = append(got.Intermediates, c.Raw)
						}
					}
					return err
				},
				func(a capb.AdminClient) (err error) {
					got, err = a.ImportChains(cmd.Context(), &capb.ImportChainsRequest{Chains: chains})
					return err
				})
			if err != nil {
				return err
			}
			return printSeries(stdout, got)
		}}
	for _, c := range []*cobra.Command{csr, load} {
		c.Flags().StringVar(&path, "config", "/etc/signet/ca.yaml", "configuration `FILE`")
	}
	group.AddCommand(csr, load)
	return group
}

// withAuthority works on the authority's folder, or, while it is being served, asks the
// daemon on its admin socket.
func withAuthority(ctx context.Context, path string, offline func(*ca.Offline) error, online func(capb.AdminClient) error) error {
	c, err := loadConfig(path)
	if err != nil {
		return err
	}
	cfg, err := c.authority()
	if err != nil {
		return err
	}
	cfg.StoreOptions.LockTimeout = 200 * time.Millisecond
	closeState, err := c.Storage.open(ctx, &cfg)
	if err != nil {
		return err
	}
	defer closeState()
	cfg.Shared.LogWait = cfg.StoreOptions.LockTimeout
	a, err := ca.OpenOffline(ctx, cfg)
	if err == nil {
		return errors.Join(offline(a), a.Close())
	}
	if !errors.Is(err, storage.ErrLocked) {
		return err
	}
	conn, err := grpc.NewClient("unix:"+c.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("asking the authority on %s: %w", c.AdminSocket, err)
	}
	defer conn.Close()
	if err := online(capb.NewAdminClient(conn)); err != nil {
		return fmt.Errorf("asking the authority on %s: %s", c.AdminSocket, status.Convert(err).Message())
	}
	return nil
}

func writeRequests(stdout io.Writer, dir string, requests [][]byte) error {
	for i, der := range requests {
		text := external.RequestPEM(der)
		if dir == "" {
			if _, err := stdout.Write(text); err != nil {
				return err
			}
			continue
		}
		name := filepath.Join(dir, fmt.Sprintf("%02d.csr", i+1))
		if err := os.WriteFile(name, text, 0o644); err != nil {
			return fmt.Errorf("writing requests: %w", err)
		}
		fmt.Fprintln(stdout, name)
	}
	return nil
}

func printSeries(stdout io.Writer, got *capb.ImportChainsResponse) error {
	for _, der := range got.GetIntermediates() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		fmt.Fprintf(stdout, "intermediate %x  %s to %s\n", c.SubjectKeyId, c.NotBefore.Format(time.RFC3339), c.NotAfter.Format(time.RFC3339))
	}
	fmt.Fprintf(stdout, "root SHA-256 %x\n", sha256.Sum256(got.GetRoot()))
	fmt.Fprintf(stdout, "imported %d; the series ends at %s\n", len(got.GetIntermediates()), got.GetSeriesEnd().AsTime().Format(time.RFC3339))
	return nil
}
