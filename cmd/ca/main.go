// Command signet-ca is the certificate authority: it issues short-lived SPIFFE
// SVIDs to node agents. This file is wiring in reading order; what is wired lives
// in package ca and below.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/cmd/internal/run"
	"github.com/signet-mesh/signet/cmd/internal/version"
	"github.com/signet-mesh/signet/identity"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

// drain is how long RPCs in flight may take at the end.
const drain = 3 * time.Second

func main() {
	// Issuing makes much garbage and keeps little: a quarter of the collections cost
	// a few megabytes. GOGC still decides where it is set.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "signet-ca:", err)
		os.Exit(1)
	}
}

func execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := &cobra.Command{Use: "signet-ca", Short: "The certificate authority of Signet", Version: version.Current().String(), SilenceUsage: true, SilenceErrors: true}
	var path string
	var accept accepted
	serve := &cobra.Command{Use: "serve", Short: "Serve node agents until interrupted", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return serve(cmd.Context(), path, accept, stderr) }}
	config := &cobra.Command{Use: "config", Short: "Look at the configuration"}
	show := &cobra.Command{Use: "print", Short: "Print the effective configuration, defaults included", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := loadConfig(path)
			if err != nil {
				return err
			}
			return c.print(stdout)
		}}
	for _, c := range []*cobra.Command{serve, show} {
		c.Flags().StringVar(&path, "config", "/etc/signet/ca.yaml", "configuration `FILE`")
	}
	serve.Flags().Uint64Var(&accept.clock, "accept-clock", 0, "accept the system's clock although it is far from the time of the newest `RECORD`, which the error names; it is recorded, and has no effect once anything was recorded after that")
	serve.Flags().Uint64Var(&accept.loss, "accept-log-loss", 0, "accept that the issuance log lost the signed head at this `RECORD`, which the alarm names; it is recorded, and has no effect on any other loss")
	config.AddCommand(show)
	root.AddCommand(serve, config, authorityCommand(stdout))
	root.AddCommand(newStoreCommands()...)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}

// accepted is what an operator accepts at a start, by the number of a record.
type accepted struct{ loss, clock uint64 }

func serve(ctx context.Context, path string, accept accepted, stderr io.Writer) (err error) {
	c, err := loadConfig(path)
	if err != nil {
		return err
	}
	log, err := c.Log.New(stderr)
	if err != nil {
		return err
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	log.Info("signet-ca starts", "version", version.Current().String(), "trust_domain", c.TrustDomain, "pid", os.Getpid())

	cfg, err := c.authority()
	if err != nil {
		return err
	}
	world, err := c.world(log, reg)
	if err != nil {
		return err
	}
	cfg.Pods, cfg.PodsStale, cfg.Agents, cfg.Workloads, cfg.TokenKeys = world.pods, world.stale, world.agents, world.workloads, world.tokenKeys

	cfg.AcceptLogLoss, cfg.AcceptClock, cfg.Built = accept.loss, accept.clock, built()
	cfg.Version, cfg.Log, cfg.Metrics = version.Current().String(), log, reg
	closeState, err := c.Storage.open(ctx, &cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeState()) }()
	authority, err := ca.Open(ctx, cfg)
	if err != nil {
		return err
	}
	// Storage closes last, after everything that could write to it.
	defer func() { err = errors.Join(err, authority.Close()) }()

	health := &run.Health{}
	health.Add("authority", authority.Ready)
	health.AddAlarm("authority", authority.Alarms)
	health.Add("pods and token keys", world.ready)

	adminListener, err := run.ListenUnix(c.AdminSocket, 0o600, 0)
	if err != nil {
		return err
	}
	defer adminListener.Close()
	door, err := c.Istio.open(ctx, istioParts{authority: authority, world: world, reviewed: c.Kubernetes.ReviewWorkloads, skew: c.Tokens.Skew, log: log, metrics: reg})
	if err != nil {
		return err
	}
	if door != nil {
		health.Add("istio", door.Ready)
	}
	return run.InOrder(ctx,
		func(cause error) {
			health.End()
			log.Info("shutting down", "reason", cause)
		},
		append(world.loops(authority), authority.Run, door.run),
		[]run.Job{
			func(ctx context.Context) error { return serveClients(ctx, c, world, authority, door, log) },
			func(ctx context.Context) error {
				return run.ServeGRPC(ctx, authority.NewAdminServer(), adminListener, drain, nil)
			},
			func(ctx context.Context) error {
				return run.ServeHTTP(ctx, c.HTTP, reg, health, log, crlRoute(authority))
			},
		})
}

// built is the time of the commit that this program was made from, where the go command
// recorded it.
func built() (t time.Time) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return t
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.time" {
			t, _ = time.Parse(time.RFC3339, s.Value) // zero: not known
		}
	}
	return t
}

// serveClients listens as soon as the world is known: before that a refused
// connection is the honest answer. The roots are published when all that clients
// reach answers.
func serveClients(ctx context.Context, c config, w world, a *ca.Authority, door *istioDoor, log *slog.Logger) error {
	if err := w.synced(ctx); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return fmt.Errorf("listening for agents: listen: %w", err)
	}
	defer listener.Close()
	serveIstio, err := door.listen()
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return run.ServeGRPC(ctx, a.NewServer(), listener, drain, nil) })
	g.Go(func() error { return serveIstio(ctx) })
	trust, changed := a.Trust()
	if err := publish(c, trust, log); err != nil {
		// The servers end first: their clients are told, and nothing is left behind.
		g.Go(func() error { return err })
	} else {
		g.Go(func() error { return republish(ctx, c, a, changed, log) })
		log.Info("serving agents", "address", listener.Addr().String(), "spiffe_id", a.ID().String())
	}
	return g.Wait()
}

// publish puts the roots where agents pin them, whole or not at all.
func publish(c config, trust *identity.Trust, log *slog.Logger) error {
	path := c.Publish.RootFile
	if path == "" {
		return nil
	}
	if err := run.WriteFile(path, trust.PEM(), fs.FileMode(0o644)); err != nil {
		return fmt.Errorf("publishing roots: publish.rootFile: %w", err)
	}
	log.Info("roots published", "file", filepath.Clean(path), "sequence", trust.Sequence())
	return nil
}

// republish publishes the roots again whenever they have changed.
func republish(ctx context.Context, c config, a *ca.Authority, changed <-chan struct{}, log *slog.Logger) error {
	var retry <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-retry:
		}
		var trust *identity.Trust
		trust, changed = a.Trust()
		retry = nil
		if err := publish(c, trust, log); err != nil {
			log.Error("the roots that agents pin are not up to date; it is tried again", "err", err)
			retry = time.After(5 * time.Second)
		}
	}
}
