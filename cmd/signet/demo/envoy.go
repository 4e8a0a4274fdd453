package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// writeBootstraps writes server.yaml and client.yaml with `signet envoy
// bootstrap`, as a user would.
func (s *stage) writeBootstraps(ctx context.Context) error {
	server := []string{"--inbound", s.at.server, "--app", s.service.address, "--admin", s.at.serverAdmin}
	client := []string{"--no-inbound", "--admin", s.at.clientAdmin,
		"--outbound", "server=" + s.at.client + "," + s.at.server + "," + serverPod.id()}
	if s.observer != nil {
		client = append(client, "--outbound", "observer="+s.at.toObserver+","+s.observer.address+","+serverPod.id())
	}
	for _, sidecar := range []struct {
		pod  pod
		args []string
	}{{serverPod, server}, {clientPod, client}} {
		name := sidecar.pod.app
		args := append([]string{"envoy", "bootstrap",
			"--output", filepath.Join(s.dir, name+".yaml"),
			"--socket", s.socket(), "--token-file", s.kubelet.tokenFile(sidecar.pod),
			"--trust-domain", trustDomain, "--node-id", sidecar.pod.name, "--label", "app=" + name, "--access-log",
		}, sidecar.args...)
		if out, err := exec.CommandContext(ctx, s.programs.signet, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("signet %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// startEnvoy starts one of the proxies; it does not wait for it.
func (s *stage) startEnvoy(name string) error {
	p, err := start(name, s.logs(), s.programs.envoy, "-c", filepath.Join(s.dir, name+".yaml"),
		"--concurrency", "2", "--disable-hot-restart", "-l", "warning",
		// The access log is read; by default it is written every 10 s.
		"--file-flush-interval-msec", "20")
	if err != nil {
		return err
	}
	s.watch(p)
	return nil
}

// askAdmin asks an HTTP address of loopback, the admin interface of a proxy or
// the health of a daemon. Any status but 200 is an error.
func askAdmin(ctx context.Context, address, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return nil, err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("http://%s%s answers %s: %.200s", address, path, resp.Status, strings.TrimSpace(string(b)))
	}
	return b, err
}

// shown is a certificate as a proxy tells of it.
type shown struct {
	id, serial string
	until      time.Time
}

// certificate asks a proxy which SVID it has.
func certificate(ctx context.Context, admin string) (shown, error) {
	b, err := askAdmin(ctx, admin, "/certs")
	if err != nil {
		return shown{}, err
	}
	var answer struct {
		Certificates []struct {
			Chain []struct {
				Serial string    `json:"serial_number"`
				Until  time.Time `json:"expiration_time"`
				Names  []struct {
					URI string `json:"uri"`
				} `json:"subject_alt_names"`
			} `json:"cert_chain"`
		} `json:"certificates"`
	}
	if err := json.Unmarshal(b, &answer); err != nil {
		return shown{}, fmt.Errorf("reading the proxy's certificates: %w", err)
	}
	for _, c := range answer.Certificates {
		if len(c.Chain) > 0 && len(c.Chain[0].Names) == 1 {
			leaf := c.Chain[0]
			return shown{leaf.Names[0].URI, leaf.Serial, leaf.Until}, nil
		}
	}
	return shown{}, errors.New("the proxy has no SVID")
}

// poll tries until try succeeds; after patience it gives up with try's last error.
func poll(ctx context.Context, patience time.Duration, try func() error) error {
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-deadline.C:
			return fmt.Errorf("gave up after %s: %w", short(patience), err)
		case <-tick.C:
		}
	}
}
