package demo

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// enforcedWithin is how long a change of a policy may take. It takes some
// milliseconds; the rest is for machines that are busy.
const enforcedWithin = 5 * time.Second

// expect makes a request on a connection of its own.
func expect(ctx context.Context, address, path string, status int) (answer, error) {
	a, err := get(ctx, address, path)
	if err == nil && a.status != status {
		err = fmt.Errorf("status %d, want %d: %.80s", a.status, status, a.body)
	}
	if err != nil {
		return a, fmt.Errorf("GET %s at %s: %w", path, address, err)
	}
	return a, nil
}

// becomes makes one request after the other on a connection until the status is
// the one, and returns how many there were.
func becomes(ctx context.Context, w *wire, path string, status int) (n int, err error) {
	deadline := time.Now().Add(enforcedWithin)
	for {
		a, err := w.get(ctx, path)
		if err != nil {
			return n, fmt.Errorf("GET %s: %w", path, err)
		}
		n++
		if a.status == status {
			return n, nil
		}
		if time.Now().After(deadline) {
			return n, fmt.Errorf("GET %s still answers %d after %s, want %d", path, a.status, short(enforcedWithin), status)
		}
	}
}

// change renames a policy into place and measures until a path answers
// otherwise.
func (s *stage) change(ctx context.Context, w *wire, file, content, path string, status int) (took time.Duration, requests int, err error) {
	began := time.Now()
	if err := s.setPolicy(file, content); err != nil {
		return 0, 0, err
	}
	requests, err = becomes(ctx, w, path, status)
	return time.Since(began), requests, err
}

// restore puts a policy of the beginning back and waits until a path, asked
// through one of the proxies' ports, answers as in the beginning.
func (s *stage) restore(ctx context.Context, file, address, path string, status int) error {
	w, err := dialWire(ctx, address, nil)
	if err != nil {
		return err
	}
	defer w.close()
	_, _, err = s.change(ctx, w, file, basePolicies()[file], path, status)
	if err != nil {
		return fmt.Errorf("putting the policies back: %w", err)
	}
	return nil
}

func checkAllow(ctx context.Context, s *stage, o *observation) (err error) {
	if o.broken {
		if err := s.sabotageDeny(ctx, helloPath, 403, helloPath); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.restore(ctx, denyFile, s.at.client, helloPath, 200)) }()
	}
	a, err := expect(ctx, s.at.client, helloPath, 200)
	if err != nil {
		return err
	}
	o.note("GET %s 200 %q", helloPath, a.body)
	if _, err := expect(ctx, s.at.client, ordersPath, 200); err != nil {
		return err
	}
	if _, err := expect(ctx, s.at.server, ordersPath, 403); err != nil {
		return err
	}
	o.note("GET %s 200 for the client, 403 for somebody without an identity", ordersPath)
	return nil
}

// sabotageDeny makes the DENY policy close other paths, and waits until a path
// answers accordingly.
func (s *stage) sabotageDeny(ctx context.Context, path string, status int, closed ...string) error {
	w, err := dialWire(ctx, s.at.client, nil)
	if err != nil {
		return err
	}
	defer w.close()
	_, _, err = s.change(ctx, w, denyFile, closing(serverPod.app, closed...), path, status)
	return err
}

func checkDeny(ctx context.Context, s *stage, o *observation) (err error) {
	if o.broken {
		if err := s.sabotageDeny(ctx, adminPath, 200, "/another"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.restore(ctx, denyFile, s.at.client, adminPath, 403)) }()
	}
	before := s.service.about(adminPath).count
	from, err := s.accessFrom(serverPod)
	if err != nil {
		return err
	}
	if _, err := expect(ctx, s.at.client, adminPath, 403); err != nil {
		return err
	}
	line, err := from.find(ctx, adminPath, 403)
	if err != nil {
		return err
	}
	switch {
	case line.Policy != denyPolicy:
		return fmt.Errorf("the server's proxy says that policy %q denied it, want %s", line.Policy, denyPolicy)
	case s.service.about(adminPath).count != before:
		return errors.New("the request reached the service")
	}
	o.note("GET %s 403 by AuthorizationPolicy %s (%s); it did not reach the service", adminPath, line.Policy, line.Reason)
	return nil
}

func checkStrict(ctx context.Context, s *stage, o *observation) (err error) {
	open, err := dialWire(ctx, s.at.server, nil)
	if err != nil {
		return err
	}
	defer open.close()
	a, err := open.get(ctx, helloPath)
	if err != nil {
		return fmt.Errorf("GET %s in plaintext: %w", helloPath, err)
	}
	if a.status != 200 {
		return fmt.Errorf("GET %s in plaintext under PERMISSIVE: status %d, want 200", helloPath, a.status)
	}
	o.note("PERMISSIVE: GET %s in plaintext 200", helloPath)

	mode := "STRICT"
	if o.broken {
		mode = "PERMISSIVE"
	}
	defer func() { err = errors.Join(err, s.restore(ctx, meshFile, s.at.server, helloPath, 200)) }()
	took, _, err := s.change(ctx, open, meshFile, meshPolicy(mode), helloPath, 403)
	if err != nil {
		return err
	}
	from, err := s.accessFrom(serverPod)
	if err != nil {
		return err
	}
	if _, err := expect(ctx, s.at.server, helloPath, 403); err != nil {
		return err
	}
	line, err := from.find(ctx, helloPath, 403)
	if err != nil {
		return err
	}
	if line.Reason != "plaintext" {
		return fmt.Errorf("plaintext is refused for the reason %q by %q, want plaintext", line.Reason, line.Policy)
	}
	if _, err := expect(ctx, s.at.client, helloPath, 200); err != nil {
		return fmt.Errorf("with mutual TLS under STRICT: %w", err)
	}
	o.note("STRICT: 403 after %s by PeerAuthentication %s, on a connection that was open and on a new one; mutual TLS still 200", short(took), line.Policy)
	return nil
}

func checkEdit(ctx context.Context, s *stage, o *observation) (err error) {
	if _, err := expect(ctx, s.at.client, reportsPath, 200); err != nil {
		return err
	}
	w, err := dialWire(ctx, s.at.client, nil)
	if err != nil {
		return err
	}
	defer w.close()
	app := serverPod.app
	if o.broken {
		app = "another"
	}
	defer func() {
		if err != nil { // else it has been put back
			err = errors.Join(err, s.restore(ctx, denyFile, s.at.client, reportsPath, 200))
		}
	}()
	closed, n, err := s.change(ctx, w, denyFile, closing(app, adminPath, reportsPath), reportsPath, 403)
	if err != nil {
		return err
	}
	opened, m, err := s.change(ctx, w, denyFile, basePolicies()[denyFile], reportsPath, 200)
	if err != nil {
		return err
	}
	o.note("closed %s: from the rename to the first 403 %s (request %d of a tight loop)", reportsPath, short(closed), n)
	o.note("opened it again: first 200 after %s (request %d)", short(opened), m)
	return nil
}
