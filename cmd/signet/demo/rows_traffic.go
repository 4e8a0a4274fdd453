package demo

import (
	"context"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	// manyConnections is more than Envoy retries at a time by default.
	manyConnections = 64
	// pace is between two requests of one of many connections.
	pace = 100 * time.Millisecond
	// away is how long a killed daemon is left dead. What proxyPatience leaves is
	// for its start, which takes longer on a machine that is busy.
	away = 300 * time.Millisecond
	// proxyPatience is how long a proxy waits for an agent that is away.
	proxyPatience = 3 * time.Second
	// renewedWithin is when the next SVID must have been seen: it comes at about
	// half of its life.
	renewedWithin = svidTTL * 9 / 10
	// wantSerials must be seen of each side.
	wantSerials = 3
)

// serialText is a serial as Envoy writes it: whole bytes.
func serialText(n *big.Int) string { return fmt.Sprintf("%x", n.Bytes()) }

// serverSerial makes a handshake with the server's proxy and returns the serial
// that it showed, and when that expires.
func (s *stage) serverSerial(ctx context.Context) (serial string, until time.Time, err error) {
	w, err := s.dialServer(ctx, true)
	if err != nil {
		return "", time.Time{}, fmt.Errorf("a handshake with the server's proxy: %w", err)
	}
	defer w.close()
	// With TLS 1.3 the client's certificate counts only once something is read.
	if a, err := w.get(ctx, helloPath); err != nil || a.status != 200 {
		return "", time.Time{}, fmt.Errorf("a request after a handshake with the server's proxy: status %d, %w", a.status, err)
	}
	leaf := w.peer()[0]
	return serialText(leaf.SerialNumber), leaf.NotAfter, nil
}

// serials collects the serials that one side shows, in order.
type serials struct {
	seen []string
	last time.Time // when the newest was first seen
}

func (s *serials) add(serial string) {
	if !slices.Contains(s.seen, serial) {
		s.seen, s.last = append(s.seen, serial), time.Now()
	}
}

func (s *serials) String() string {
	text := fmt.Sprintf("%d serials", len(s.seen))
	for _, serial := range s.seen {
		text += " " + brief(serial)
	}
	return text
}

func checkRotation(ctx context.Context, s *stage, o *observation) (err error) {
	load := startTraffic(ctx, s.at.client, helloPath, 4, 20*time.Millisecond)
	ended := false
	defer func() {
		if !ended {
			load.end()
		}
	}()
	if o.broken {
		s.ca.signal(syscall.SIGSTOP)
		defer s.ca.signal(syscall.SIGCONT)
	}
	var server, client serials
	var firstEnds time.Time // when the first certificate of the server expires
	for {
		serial, until, err := s.serverSerial(ctx)
		if err != nil {
			return err
		}
		server.add(serial)
		if firstEnds.IsZero() {
			firstEnds = until
		}
		if serial, err = s.observer.peerSerial(ctx, s); err != nil {
			return err
		}
		client.add(serial)
		if len(server.seen) >= wantSerials && len(client.seen) >= wantSerials && time.Now().After(firstEnds) {
			break
		}
		for _, side := range []struct {
			name string
			serials
		}{{"server", server}, {"client", client}} {
			if time.Since(side.last) > renewedWithin {
				return fmt.Errorf("no new serial of the %s for %s; its SVIDs live %s", side.name, short(renewedWithin), short(svidTTL))
			}
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	rep := load.end()
	ended = true
	o.note("seen of the server by its peer: %s", &server)
	o.note("seen of the client by its peer: %s", &client)
	o.note("%s; the first certificate has expired meanwhile", rep)
	return rep.err(4)
}

// underTraffic runs f under traffic on many connections, with a second of it
// before and after, and adds what was seen.
func (s *stage) underTraffic(ctx context.Context, o *observation, f func() (from, to time.Time, err error)) error {
	load := startTraffic(ctx, s.at.client, helloPath, manyConnections, pace)
	from, to, err := func() (from, to time.Time, err error) {
		if err := pause(ctx, time.Second); err != nil {
			return from, to, err
		}
		if n := load.failures(); n > 0 {
			return from, to, fmt.Errorf("%d requests failed before anything was killed", n)
		}
		if from, to, err = f(); err != nil {
			return from, to, err
		}
		return from, to, pause(ctx, time.Second)
	}()
	rep := load.end()
	if err != nil {
		// What the traffic saw may say more than that.
		return errors.Join(err, rep.err(manyConnections))
	}
	n := rep.during(from, to)
	o.note("%s; %d were under way while it was away", rep, n)
	if err := rep.err(manyConnections); err != nil {
		return err
	}
	if n < manyConnections {
		return fmt.Errorf("only %d requests were under way while it was away; that shows nothing", n)
	}
	return nil
}

func checkAgentRestart(ctx context.Context, s *stage, o *observation) error {
	old := s.agent.pid
	err := s.underTraffic(ctx, o, func() (from, to time.Time, err error) {
		from = time.Now()
		s.agent.kill()
		if o.broken {
			err := pause(ctx, proxyPatience+time.Second)
			return from, time.Now(), err
		}
		if err := pause(ctx, away); err != nil {
			return from, to, err
		}
		err = s.startAgent(ctx)
		to = time.Now()
		if err == nil {
			o.note("agent %d killed (SIGKILL), %d serves %s later", old, s.agent.pid, short(to.Sub(from)))
		}
		return from, to, err
	})
	if o.broken {
		err = errors.Join(err, s.startAgent(ctx))
	}
	return errors.Join(err, s.reconnected(ctx))
}

// reconnected waits until both proxies have their SDS streams at the agent again.
// They come back with a backoff of their own, which is long against an SVID's life
// of seconds; rows that make handshakes must not begin before.
func (s *stage) reconnected(ctx context.Context) error {
	for _, admin := range []string{s.at.serverAdmin, s.at.clientAdmin} {
		err := poll(ctx, 2*startWithin, func() error {
			b, err := askAdmin(ctx, admin, "/stats?filter=connected_state")
			if err == nil && strings.Count(string(b), "connected_state: 1") < 2 {
				err = fmt.Errorf("it says %q", b)
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("waiting for the SDS streams of the proxy with admin interface %s: %w", admin, err)
		}
	}
	return nil
}

// agentBack starts the agent and waits until it is as if it had not been away.
func (s *stage) agentBack(ctx context.Context) error {
	if err := s.startAgent(ctx); err != nil {
		return err
	}
	if _, err := expect(ctx, s.at.client, helloPath, 200); err != nil {
		return fmt.Errorf("after the agent was back: %w", err)
	}
	return s.reconnected(ctx)
}

func checkAgentAway(ctx context.Context, s *stage, o *observation) (err error) {
	if !o.broken {
		s.agent.kill()
		defer func() { err = errors.Join(err, s.agentBack(ctx)) }()
	}
	before := s.service.about(helloPath).count
	began := time.Now()
	if _, err := expect(ctx, s.at.client, helloPath, 403); err != nil {
		return err
	}
	if s.service.about(helloPath).count != before {
		return errors.New("the request reached the service")
	}
	o.note("GET %s 403 after %s without an agent; it did not reach the service; 200 once the agent was back", helloPath, short(time.Since(began)))
	return nil
}

func checkCARestart(ctx context.Context, s *stage, o *observation) error {
	old := s.ca.pid
	return s.underTraffic(ctx, o, func() (from, to time.Time, err error) {
		from = time.Now()
		s.ca.kill()
		if err := pause(ctx, away); err != nil {
			return from, to, err
		}
		if !o.broken {
			if err := s.startCA(ctx); err != nil {
				return from, to, err
			}
		}
		to = time.Now()
		// Rotation goes on once the server shows an SVID that was issued after the
		// kill. NotAfter is in whole seconds, cut off.
		for {
			serial, until, err := s.serverSerial(ctx)
			if err != nil {
				return from, to, err
			}
			if until.Add(-svidTTL).After(from) {
				o.note("authority %d killed (SIGKILL), %d serves %s later and has issued serial %s", old, s.ca.pid, short(to.Sub(from)), brief(serial))
				return from, to, nil
			}
			if time.Since(to) > renewedWithin {
				return from, to, fmt.Errorf("no new SVID for %s: nobody issues", short(renewedWithin))
			}
			if err := pause(ctx, 100*time.Millisecond); err != nil {
				return from, to, err
			}
		}
	})
}
