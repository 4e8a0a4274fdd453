package integration_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// between stands between signet and the authority, and can interrupt a step of a rotation:
// before the authority hears of it, while it does it, or when it has done it and before
// signet hears of that.
type between struct {
	capb.UnimplementedAdminServer
	s *standalone

	mu   sync.Mutex
	next interruption // guarded by mu
}

// interruption is what happens at a moment of a step: "before", "during" or "after".
type interruption struct {
	step   capb.RotateRequest_Step
	moment string
	happen func()
}

func (b *between) ask(f func(capb.AdminClient) error) error {
	// A connection for each call: one to an authority that was killed backs off.
	conn, err := grpc.NewClient("unix:"+b.s.dir+"/ca/admin.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	return f(capb.NewAdminClient(conn))
}

func (b *between) Authorities(ctx context.Context, q *capb.AuthoritiesRequest) (resp *capb.AuthoritiesResponse, err error) {
	err = b.ask(func(a capb.AdminClient) (err error) { resp, err = a.Authorities(ctx, q); return err })
	return resp, err
}

func (b *between) Status(ctx context.Context, q *capb.StatusRequest) (resp *capb.StatusResponse, err error) {
	err = b.ask(func(a capb.AdminClient) (err error) { resp, err = a.Status(ctx, q); return err })
	return resp, err
}

func (b *between) Rotate(ctx context.Context, q *capb.RotateRequest) (resp *capb.RotateResponse, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	does := func() { err = b.ask(func(a capb.AdminClient) (err error) { resp, err = a.Rotate(ctx, q); return err }) }
	if q.GetStep() != b.next.step || b.next.happen == nil {
		does()
		return resp, err
	}
	happen := b.next.happen
	switch b.next.moment {
	case "during":
		done := make(chan struct{})
		go func() { does(); close(done) }()
		happen()
		<-done
	case "after":
		if does(); err != nil || resp.GetWaits() != nil {
			return resp, err
		}
		happen()
	default:
		happen()
	}
	b.next.happen = nil
	return nil, status.Error(codes.Unavailable, "interrupted")
}

// interrupted sets what is to happen, and reports whether what was to happen before did.
func (b *between) interrupted(next interruption) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	did := b.next.happen == nil
	b.next = next
	return did
}

// TestAReplacementGoesOnWhereItWas: replace-root is interrupted at each step, by the end of
// the client or by that of the authority. Run again it makes no other root than the one
// that it began with, and the former one goes.
func TestAReplacementGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	n := &nodes{standalone: newStandalone(t, programs(t), 1, "", func(s *standalone) {
		s.caYAML = "authority: {propagation: 50ms, taintSpread: 50ms}\nsvid: {backdate: 1ms}\n"
	})}
	b := &between{s: n.standalone}
	l, err := net.Listen("unix", n.dir+"/between.sock")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	capb.RegisterAdminServer(server, b)
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-served })
	roots := func() (made int) {
		err := b.ask(func(a capb.AdminClient) error {
			s, err := a.ListLog(t.Context(), &capb.ListLogRequest{})
			for err == nil {
				var e *capb.LogEntry
				if e, err = s.Recv(); e.GetRecord().GetKind() == capb.IssuanceRecord_KIND_ROOT {
					made++
				}
			}
			return err
		})
		if !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		return made
	}
	began, cases, made := time.Now(), 0, roots()
	for _, step := range []capb.RotateRequest_Step{capb.RotateRequest_STEP_REPLACE, capb.RotateRequest_STEP_ACTIVATE, capb.RotateRequest_STEP_TAINT, capb.RotateRequest_STEP_REVOKE} {
		for _, moment := range []string{"before", "during", "after"} {
			for _, who := range []string{"the client", "the authority"} {
				what := fmt.Sprintf("%s ends %s %v", who, moment, step)
				cases++
				first := n.list(t).of("root", "active")[0]
				client := exec.Command(filepath.Join(n.bin, "signet"), "ca", "authority", "replace-root", "--now", "--socket", n.dir+"/between.sock")
				var out bytes.Buffer
				client.Stdout, client.Stderr = &out, &out
				started := make(chan *os.Process, 1)
				b.interrupted(interruption{step, moment, func() {
					if who == "the client" {
						_ = (<-started).Kill()
						return
					}
					n.stop("signet-ca", syscall.SIGKILL)
				}})
				if err := client.Start(); err != nil {
					t.Fatal(err)
				}
				started <- client.Process
				if err := client.Wait(); err == nil || !b.interrupted(interruption{}) {
					t.Fatalf("%s: it was not interrupted: %v\n%s", what, err, out.String())
				}
				if who == "the authority" {
					n.start("signet-ca")
				}
				if step == capb.RotateRequest_STEP_TAINT {
					if text := n.operate("list"); !strings.Contains(text, "signet ca authority replace-root --now "+first) {
						t.Errorf("%s: the list does not say what is to be done:\n%s", what, text)
					}
					if text := n.operate("replace-root"); !strings.Contains(text, "root "+first+" is being replaced since ") || !strings.Contains(text, "--now goes on with it") {
						t.Errorf("%s: the preview does not say that it was begun:\n%s", what, text)
					}
				}
				again := []string{"replace-root", "--now"}
				if was := n.list(t); len(was.of("root", "old")) == 0 && was.of("root", "active")[0] != first {
					again = append(again, first) // it was done; without an ID this would be about the next one
				}
				said := n.operate(again...)
				if len(again) > 2 && !strings.Contains(said, "nothing is to be done") {
					t.Errorf("%s: of a root that is gone it says\n%s", what, said)
				}
				if a := n.list(t); len(a.of("root", "active")) != 1 || a.of("root", "active")[0] == first {
					t.Errorf("%s: %v", what, a)
				}
				n.settles(t)
				// One that was killed between the record of a root and its journal has
				// recorded a root that never was.
				now := roots()
				if now != made+1 && !(moment == "during" && who == "the authority" && now == made+2) {
					t.Errorf("%s: %d roots were made\n%s\nand then\n%s", what, now-made, out.String(), said)
				}
				made = now
				t.Logf("%5.1f s: %s", time.Since(began).Seconds(), what)
				if t.Failed() {
					return
				}
			}
		}
	}
	n.signet("ca", "log", "verify", "--store", "--socket", n.dir+"/ca/admin.sock") // which fails if it finds something
	t.Logf("note: replace-root was interrupted at %d moments of its steps, in %.1f s: each time it went on with the root that it had made", cases, time.Since(began).Seconds())
}
