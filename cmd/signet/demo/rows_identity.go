package demo

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func checkIdentity(ctx context.Context, s *stage, o *observation) error {
	if err := s.waitProxies(ctx); err != nil {
		return err
	}
	for _, side := range []struct {
		pod   pod
		admin string
	}{{serverPod, s.at.serverAdmin}, {clientPod, s.at.clientAdmin}} {
		c, err := certificate(ctx, side.admin)
		if err != nil {
			return fmt.Errorf("looking at the %s's proxy: %w", side.pod.app, err)
		}
		if c.id != side.pod.id() {
			return fmt.Errorf("the %s's proxy has an SVID of %s, want %s", side.pod.app, c.id, side.pod.id())
		}
		o.note("%s: %s, serial %s, good for %.0f s more", side.pod.app, c.id, brief(c.serial), time.Until(c.until).Seconds())
	}
	return nil
}

// brief is a serial for people: what tells it from others.
func brief(serial string) string {
	if len(serial) <= 12 {
		return serial
	}
	return "…" + serial[len(serial)-12:]
}

func checkMutualTLS(ctx context.Context, s *stage, o *observation) error {
	// Both proxies in a row, each asked for what the other showed it.
	const path = helloPath
	entry := s.at.client
	if o.broken {
		entry = s.at.server
	}
	serverLog, err := s.accessFrom(serverPod)
	if err != nil {
		return err
	}
	clientLog, err := s.accessFrom(clientPod)
	if err != nil {
		return err
	}
	if _, err := expect(ctx, entry, path, 200); err != nil {
		return err
	}
	told := s.service.about(path).xfcc
	if got := xfccValue(told, "URI"); got != clientPod.id() {
		return fmt.Errorf("the server's proxy tells the service that the peer is %q, want %s", got, clientPod.id())
	}
	line, err := serverLog.find(ctx, path, 200)
	if err != nil {
		return err
	}
	if line.Peer != clientPod.id() || line.PeerSerial == "" {
		return fmt.Errorf("the server's proxy saw the peer %q with serial %q, want %s", line.Peer, line.PeerSerial, clientPod.id())
	}
	o.note("server saw %s, serial %s, SHA-256 %.12s…", line.Peer, brief(line.PeerSerial), xfccValue(told, "Hash"))
	if line, err = clientLog.find(ctx, path, 200); err != nil {
		return err
	}
	if line.UpstreamPeer != serverPod.id() {
		return fmt.Errorf("the client's proxy saw the peer %q, want %s", line.UpstreamPeer, serverPod.id())
	}
	o.note("client saw %s", line.UpstreamPeer)

	// And a client of our own, with the client's SVID, for the certificate itself.
	w, err := s.dialServer(ctx, true)
	if err != nil {
		return fmt.Errorf("a TLS connection to the server's proxy: %w", err)
	}
	defer w.close()
	if _, err := w.get(ctx, path); err != nil {
		return fmt.Errorf("GET %s on a TLS connection to the server's proxy: %w", path, err)
	}
	leaf := w.peer()[0]
	o.note("         in a certificate with serial %s by %q, which chains to root.pem", brief(serialText(leaf.SerialNumber)), leaf.Issuer.CommonName)
	return nil
}

func checkNoCertificate(ctx context.Context, s *stage, o *observation) error {
	before := s.service.about(helloPath).count
	w, err := s.dialServer(ctx, o.broken)
	if err == nil {
		defer w.close()
		// With TLS 1.3 the handshake ends for the client before the server has seen
		// that there is no certificate. Wait for what it says to that, before
		// anything is sent.
		if err = w.refusal(time.Second); err == nil {
			if a, err := w.get(ctx, helloPath); err == nil {
				return fmt.Errorf("the server's proxy answers %d to a TLS client without a certificate", a.status)
			}
			return errors.New("the server's proxy does not say that a certificate is required")
		}
	}
	if !strings.Contains(err.Error(), "certificate required") {
		return fmt.Errorf("the server's proxy does not say that a certificate is required: %w", err)
	}
	if s.service.about(helloPath).count != before {
		return errors.New("the request reached the service")
	}
	o.note("%v", err)
	return nil
}

func checkOtherNode(ctx context.Context, s *stage, o *observation) error {
	p := elsewhere
	if o.broken {
		p = clientPod
	}
	return s.checkRefused(ctx, o, p, forAgent, time.Now())
}

func checkExpired(ctx context.Context, s *stage, o *observation) error {
	issued := time.Now().Add(-2 * tokenTTL)
	if o.broken {
		issued = time.Now()
	}
	return s.checkRefused(ctx, o, clientPod, forAgent, issued)
}

func checkAudience(ctx context.Context, s *stage, o *observation) error {
	audience := forCA
	if o.broken {
		audience = forAgent
	}
	return s.checkRefused(ctx, o, clientPod, audience, time.Now())
}

// checkRefused shows the agent a token, and after it one that differs in nothing
// but what should be wrong.
func (s *stage) checkRefused(ctx context.Context, o *observation, p pod, audience string, issued time.Time) error {
	token, err := s.kubelet.token(p, audience, issued)
	if err != nil {
		return err
	}
	agentLog, err := endOf(s.agent.log)
	if err != nil {
		return err
	}
	if _, err := fetchSVID(ctx, s.socket(), token); err == nil {
		return errors.New("the agent gave an SVID for the token")
	} else if status.Code(err) != codes.Unauthenticated {
		return fmt.Errorf("the agent does not answer Unauthenticated: %w", err)
	} else {
		o.note("client: %s: %s", status.Code(err), status.Convert(err).Message())
	}
	// What the client may not know is in the agent's log.
	reason, err := agentLog.refusal(ctx)
	if err != nil {
		return err
	}
	o.note("agent: %s", reason)
	svid, err := s.svidOf(ctx, clientPod)
	if err != nil {
		return fmt.Errorf("a good token is refused as well: %w", err)
	}
	o.note("with a good token: an SVID of %s", svid.ID)
	return nil
}
