// Command signet-agent gives the proxies of one node their identities over SDS
// and answers their ext_authz checks. This file is wiring in reading order.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/source"
	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/cmd/internal/run"
	"github.com/signet-mesh/signet/cmd/internal/version"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/holder"
	"github.com/signet-mesh/signet/sds"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// drain is how long checks in flight may take at the end. Streams of proxies never
// end by themselves and are ended at once: the checks of their proxies wait three
// seconds for the next agent, of which this one takes as little as it can.
const drain = time.Second

// streamWorkers are goroutines that wait for RPCs: more than the SDS streams of most
// nodes, few enough that their stacks take some megabytes at most.
const streamWorkers = 256

// idle is when a connection is closed that has no stream. One with secrets always has;
// one that only carried checks is opened again with the next.
const idle = 10 * time.Minute

// handover is how long a predecessor may take to leave.
const handover = 5 * time.Second

func main() {
	// Checks make much garbage and keep nothing: a quarter of the collections cost a
	// few megabytes and save a fifth of the processor. GOGC still decides where it is set.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "signet-agent:", err)
		os.Exit(1)
	}
}

func execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := &cobra.Command{Use: "signet-agent", Short: "The node agent of Signet", Version: version.Current().String(), SilenceUsage: true, SilenceErrors: true}
	var path, node string
	serve := &cobra.Command{Use: "serve", Short: "Serve the node's proxies until interrupted", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return serve(cmd.Context(), path, node, stdout, stderr) }}
	config := &cobra.Command{Use: "config", Short: "Look at the configuration"}
	show := &cobra.Command{Use: "print", Short: "Print the effective configuration, defaults included", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := loadConfig(path, node)
			if err != nil {
				return err
			}
			return c.print(stdout)
		}}
	for _, c := range []*cobra.Command{serve, show} {
		c.Flags().StringVar(&path, "config", "/etc/signet/agent.yaml", "configuration `FILE`")
		c.Flags().StringVar(&node, "node", "", "`NAME` of the node, instead of what the configuration says")
	}
	config.AddCommand(show)
	root.AddCommand(serve, config)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}

func serve(ctx context.Context, path, node string, stdout, stderr io.Writer) error {
	c, err := loadConfig(path, node)
	if err != nil {
		return err
	}
	log, err := c.Log.New(stderr)
	if err != nil {
		return err
	}
	td, err := identity.ParseTrustDomain(c.TrustDomain)
	if err != nil {
		return fmt.Errorf("trustDomain: %w", err)
	}
	// gRPC's own logging of messages would write private keys to a file.
	if os.Getenv("GRPC_BINARY_LOG_FILTER") != "" {
		return errors.New("GRPC_BINARY_LOG_FILTER is set: it would log every secret that is served; unset it")
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	log.Info("signet-agent starts", "version", version.Current().String(), "trust_domain", td.Name(), "node", c.Node, "pid", os.Getpid())

	// What a predecessor saved: with it the agent serves before it reaches the
	// authority. One agent at a time has it: a predecessor that is still leaving would
	// save its state over this one's.
	saved, err := openSaved(c, td, log)
	if err != nil {
		return err
	}
	defer saved.Close()
	pods := &identity.Pods{}
	pods.Replace(saved.state.Pods)

	// Policies before the socket: a check must never meet an agent without them,
	// except that it denies.
	world, err := c.world(saved, td, log, reg)
	if err != nil {
		return err
	}
	tokens, err := c.requestTokens(saved, log, reg)
	if err != nil {
		return err
	}
	world.exports[savedRequestKeys] = tokens.keys.Export
	// Bans come before policies, and those that were saved before the first check.
	bans := source.NewBans(world.policies.Snapshot, log, reg)
	attestor, err := attest.New(attest.Config{Issuer: c.Tokens.Issuer, Audience: c.Tokens.Audience, Keys: world.keys, Pods: pods, Node: c.Node,
		AnyServiceAccount: true, MaxLifetime: c.Tokens.MaxLifetime, Skew: c.Tokens.Skew, Outage: world.outage, Metrics: reg})
	if err != nil {
		return err
	}
	saved.load(savedTokens, attestor.Load)
	world.exports[savedTokens] = attestor.Export
	gate, err := attest.NewGate(attest.GateConfig{Attestor: attestor, Pods: pods, Log: log, Metrics: reg})
	if err != nil {
		return err
	}

	// They need each other: the client reports what the streams have acknowledged, and
	// which SVIDs are held.
	var streams *sds.Server
	var svids *holder.Holder
	client, err := caclient.New(caclient.Config{
		Addresses: c.CA.Addresses, TrustDomain: td, Node: c.Node,
		RootFile: c.CA.RootFile, RootHash: c.CA.RootHash, TokenFile: c.CA.TokenFile,
		Pods: pods, Saved: saved.credential(), SavedTrust: saved.state.Trust, SavedLogHeads: saved.state.Extra[extraLogHeads],
		SavedBans: saved.state.Extra[savedBans], Enforce: func(b *identity.Bans) { bans.Put(b) },
		UnknownKeys: world.unknownKeys,
		Acknowledged: func(current uint64) (uint64, <-chan struct{}) {
			return saved.acknowledged(streams.Acknowledged(current))
		},
		Tainted: func(t *identity.Trust) (bool, <-chan struct{}) {
			changed := svids.Changed()
			return svids.Holds(t), changed
		},
		Version: version.Current().String(), Log: log, Metrics: reg,
	})
	if err != nil {
		return err
	}
	world.exports[savedBans] = client.SavedBans
	svids, err = holder.New(holder.Config{
		TrustDomain: td, Issuer: client, Pods: pods, Node: c.Node,
		Trust: func() *identity.Trust { t, _ := client.Trust(); return t },
		Saved: saved.state.SVIDs, Log: log, Metrics: reg,
	})
	if err != nil {
		return err
	}
	secrets, err := sds.NewSecrets(sds.SecretsConfig{TrustDomain: td, SVIDs: svids, Trust: client.Trust, CRL: c.SDS.CRL, Metrics: reg})
	if err != nil {
		return err
	}
	if streams, err = sds.New(sds.Config{Source: secrets, Log: log, Metrics: reg}); err != nil {
		return err
	}
	providers, err := c.providers(reg)
	if err != nil {
		return err
	}
	defer providers.Close()
	records, err := c.recorder(stdout, log, reg)
	if err != nil {
		return err
	}
	denial, denials := c.denials()
	checks, err := extauthz.New(extauthz.Config{Snapshot: bans.Snapshot, Tokens: tokens, Providers: providers, Records: records,
		Denial: denial, Denials: denials, Log: log, Metrics: reg})
	if err != nil {
		return err
	}

	creds, err := attest.Credentials(attest.ConnectionsConfig{Metrics: reg})
	if err != nil {
		return err
	}
	open := run.NewStreams()
	server := grpc.NewServer(
		grpc.Creds(creds), grpc.ForceServerCodecV2(extauthz.Codec()),
		// The tap comes before any message is read: nobody without a proof makes the
		// agent hold more than headers.
		grpc.InTapHandle(gate.Tap),
		grpc.UnaryInterceptor(gate.Unary), grpc.ChainStreamInterceptor(open.Intercept, gate.Stream),
		// A goroutine of its own for each check would grow its stack each time, which
		// takes longer than to decide. Streams that stay keep workers for themselves;
		// where none is left gRPC starts goroutines as before.
		grpc.NumStreamWorkers(streamWorkers),
		// Bounds of what one proxy can make the agent hold; a CheckRequest has
		// some kilobytes, and Envoy opens another connection where streams run out.
		grpc.MaxRecvMsgSize(256<<10), grpc.MaxHeaderListSize(32<<10), grpc.MaxConcurrentStreams(1000),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idle, Time: time.Minute, Timeout: 20 * time.Second}),
	)
	streams.Register(server)
	checks.Register(server)
	listener, err := run.ListenUnix(c.Socket, 0o666, handover)
	if err != nil {
		return err
	}
	defer listener.Close()
	log.Info("serving proxies", "socket", filepath.Clean(c.Socket))

	health := &run.Health{}
	health.Add("authority", client.Ready)
	health.Add("pods", func() error {
		if !client.Synced() && pods.Len() == 0 {
			return errors.New("the authority has not told the pods of this node yet")
		}
		return nil
	})
	health.Add("svids", svids.Health)
	health.Add("policies", world.policies.Ready)
	health.Add("token keys", world.keysErr)
	return run.InOrder(ctx,
		func(cause error) {
			health.End()
			log.Info("shutting down", "reason", cause)
		},
		append(world.loops(client),
			client.Run, svids.Run, world.policies.Run, tokens.keys.Run, records.Run,
			func(ctx context.Context) error { return tokens.watch(ctx, world.policies, pods, c.Node) },
			func(ctx context.Context) error { return bans.Follow(ctx, client.Bans) },
			func(ctx context.Context) error { return retry(ctx, client, svids) },
			func(ctx context.Context) error { return review(ctx, client, svids) },
			func(ctx context.Context) error { return saved.keep(ctx, client, svids, pods, c.Node, world.exports) },
		),
		[]run.Job{
			func(ctx context.Context) error { return run.ServeGRPC(ctx, server, listener, drain, open) },
			func(ctx context.Context) error { return run.ServeHTTP(ctx, c.HTTP, reg, health, log) },
		})
}

// retry has the holder ask again at once for what failed while the authority was
// away.
func retry(ctx context.Context, client *caclient.Client, svids *holder.Holder) error {
	for {
		_, again := client.Reached()
		select {
		case <-ctx.Done():
			return nil
		case <-again:
			svids.Retry()
		}
	}
}

// review has SVIDs replaced that are good no more, by what is trusted or banned now.
func review(ctx context.Context, client *caclient.Client, svids *holder.Holder) error {
	for {
		_, trustChanged := client.Trust()
		bans, bansChanged := client.Bans()
		svidsChanged := svids.Changed() // one under way may be of before
		svids.Review(bans)
		select {
		case <-ctx.Done():
			return nil
		case <-trustChanged:
		case <-bansChanged:
		case <-svidsChanged:
		}
	}
}
