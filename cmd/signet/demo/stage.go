package demo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/signet-mesh/signet/identity/attest/devissuer"

	"golang.org/x/sys/unix"
)

const (
	// startWithin is how long a program may take until it serves.
	startWithin = 20 * time.Second
	// maxDir keeps the longest path of a socket in D, with the prefix that it has
	// while it is made, below the limit of the kernel, 107 bytes.
	maxDir = 84
)

// addresses are HOST:PORT on loopback.
type addresses struct {
	ca, caHTTP, agentHTTP string
	// server is where the server's proxy takes requests, mutual TLS and plaintext.
	server, serverAdmin string
	// client is where the client's proxy takes requests to the server, toObserver
	// where it takes those to the observer.
	client, clientAdmin, toObserver string
}

// stage is everything that runs. One goroutine uses it; only svidOf and trust
// are for any.
type stage struct {
	dir      string // D
	stateDir string // of the agent; empty where there is no tmpfs
	keep     bool   // the files in D stay, and there is no observer
	programs programs
	issuer   *devissuer.Issuer
	kubelet  *kubelet
	service  *service
	observer *observer // nil in keep
	at       addresses

	ca, agent *process
	running   []*process // all that were ever started
	// fail ends the context that everything runs under, with the reason.
	fail context.CancelCauseFunc
	wg   sync.WaitGroup
	stop context.CancelFunc // of the goroutines in wg
}

func (s *stage) socket() string   { return filepath.Join(s.dir, "agent.sock") }
func (s *stage) rootFile() string { return filepath.Join(s.dir, "root.pem") }
func (s *stage) logs() string     { return filepath.Join(s.dir, "logs") }

// open starts everything. The proxies may not be ready when it returns. After an
// error, too, close must be called.
func (s *stage) open(ctx context.Context, o options) (err error) {
	ctx, s.stop = context.WithCancel(ctx)
	if err := s.makeFolders(); err != nil {
		return err
	}
	for file, content := range basePolicies() {
		if err := s.setPolicy(file, content); err != nil {
			return err
		}
	}
	if err := s.issueTokens(ctx, o); err != nil {
		return err
	}
	own, at, err := claimPorts(8)
	if err != nil {
		return err
	}
	s.at = addresses{at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]}
	s.service = startService(own)
	if !s.keep {
		if s.observer, err = startObserver(s); err != nil {
			return err
		}
	}
	if err := errors.Join(s.writeConfigs(), s.writeBootstraps(ctx)); err != nil {
		return err
	}
	if err := s.startCA(ctx); err != nil {
		return err
	}
	if err := s.startAgent(ctx); err != nil {
		return err
	}
	return errors.Join(s.startEnvoy(serverPod.app), s.startEnvoy(clientPod.app))
}

func (s *stage) makeFolders() (err error) {
	for _, sub := range []string{"ca", "policies", "logs", "tokens", "tokens/" + agentPod.app, "tokens/" + serverPod.app, "tokens/" + clientPod.app} {
		if err := os.Mkdir(filepath.Join(s.dir, sub), 0o700); err != nil {
			return fmt.Errorf("setting up: %w", err)
		}
	}
	if s.stateDir, err = makeStateDir(filepath.Base(s.dir)); err != nil {
		return fmt.Errorf("setting up: making the agent's folder for state: %w", err)
	}
	s.issuer, _, err = devissuer.Create(filepath.Join(s.dir, "issuer"), devissuer.Options{})
	return err
}

// issueTokens gives the pods their tokens, and new ones from then on.
func (s *stage) issueTokens(ctx context.Context, o options) error {
	s.kubelet = &kubelet{dir: filepath.Join(s.dir, "tokens"), issuers: map[string]*devissuer.Issuer{}}
	for _, p := range allPods() {
		s.kubelet.issuers[p.app] = s.issuer
	}
	if o.broken == rowIdentity {
		foreign, err := devissuer.New(devissuer.Options{URL: s.issuer.URL()})
		if err != nil {
			return err
		}
		s.kubelet.issuers[serverPod.app] = foreign
	}
	if err := s.kubelet.project(); err != nil {
		return err
	}
	s.wg.Go(func() {
		if err := s.kubelet.run(ctx); err != nil {
			s.fail(err)
		}
	})
	return nil
}

// makeStateDir makes a folder on a tmpfs, with a name that begins like D's: where
// the agent saves keys must be memory. Without a tmpfs there is none, and the agent
// does without.
func makeStateDir(name string) (string, error) {
	for _, dir := range []string{"/dev/shm", os.Getenv("XDG_RUNTIME_DIR")} {
		var st unix.Statfs_t
		if dir == "" || unix.Statfs(dir, &st) != nil || st.Type != unix.TMPFS_MAGIC {
			continue
		}
		if made, err := os.MkdirTemp(dir, name+"-"); !errors.Is(err, fs.ErrPermission) {
			return made, err
		}
	}
	return "", nil
}

// watch makes the end of a child that nobody wanted the end of everything.
func (s *stage) watch(p *process) {
	s.running = append(s.running, p)
	s.wg.Go(func() {
		<-p.ended
		if err := p.surprise(); err != nil {
			s.fail(err)
		}
	})
}

// startCA starts the authority and waits until it is ready.
func (s *stage) startCA(ctx context.Context) (err error) {
	if s.ca, err = start("signet-ca", s.logs(), s.programs.ca, "serve", "--config", filepath.Join(s.dir, "ca.yaml")); err != nil {
		return err
	}
	s.watch(s.ca)
	err = poll(ctx, startWithin, func() error {
		_, err := askAdmin(ctx, s.at.caHTTP, "/readyz")
		return err
	})
	if err != nil {
		return fmt.Errorf("waiting for signet-ca: %w", err)
	}
	return nil
}

// startAgent starts the agent and waits until it serves on its socket.
func (s *stage) startAgent(ctx context.Context) (err error) {
	if s.agent, err = start("signet-agent", s.logs(), s.programs.agent, "serve", "--config", filepath.Join(s.dir, "agent.yaml")); err != nil {
		return err
	}
	s.watch(s.agent)
	err = poll(ctx, startWithin, func() error {
		c, err := net.Dial("unix", s.socket())
		if err == nil {
			c.Close()
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("waiting for signet-agent: %w", err)
	}
	return nil
}

// waitProxies waits until both proxies have their SVIDs and listen.
func (s *stage) waitProxies(ctx context.Context) error {
	for _, proxy := range []struct{ name, admin string }{{serverPod.app, s.at.serverAdmin}, {clientPod.app, s.at.clientAdmin}} {
		err := poll(ctx, startWithin, func() error {
			_, err := askAdmin(ctx, proxy.admin, "/ready")
			return err
		})
		if err != nil {
			return fmt.Errorf("waiting for the %s's proxy, which is ready only with an SVID: %w", proxy.name, err)
		}
	}
	return nil
}

// close ends everything and waits for it. Unless they should be kept the files
// go too; the agent's keys go always.
func (s *stage) close() error {
	if s.stop != nil {
		s.stop()
	}
	var ending sync.WaitGroup
	for _, p := range s.running {
		ending.Go(p.end)
	}
	ending.Wait()
	s.wg.Wait()
	if s.service != nil {
		s.service.stop()
	}
	if s.observer != nil {
		s.observer.stop()
	}
	var errs []error
	if s.stateDir != "" {
		errs = append(errs, os.RemoveAll(s.stateDir))
	}
	if !s.keep {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cleaning up: %w", err)
	}
	return nil
}

// claimPorts finds n addresses on loopback for daemons that come and go. Nobody
// listens on them, and nobody gets one by chance while a daemon is restarted: they
// are outside of the range from which the kernel takes ports for outgoing
// connections, and follow a port on which own listens. Every demo takes its ports
// that way, so that one whose own is taken looks elsewhere.
func claimPorts(n int) (own net.Listener, addresses []string, err error) {
	low, high := 20000, 32768
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		var first, last int
		if _, err := fmt.Sscan(string(b), &first, &last); err == nil && first > low+1000 {
			high = min(high, first)
		}
	}
	block := n + 1
	for range 1000 {
		port := low + block*mathrand.IntN((high-low)/block)
		own, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		addresses = nil
		for i := 1; i <= n; i++ {
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port+i))
			if err != nil {
				break
			}
			addresses = append(addresses, l.Addr().String())
			l.Close()
		}
		if len(addresses) == n {
			return own, addresses, nil
		}
		own.Close()
	}
	return nil, nil, fmt.Errorf("finding %d free ports in a row on 127.0.0.1 between %d and %d: there are none", block, low, high)
}
