package issuancelog_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/cmd/internal/issuancelog"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

var update = flag.Bool("update", false, "rewrite golden files")

// log is a source in memory.
type log struct {
	entries []*capb.LogEntry
	head    *capb.LogHead
	report  *capb.VerifyResponse
	asked   *capb.ListLogRequest
	given   []*capb.LogHead
	fails   error
}

func (l *log) Records(_ context.Context, q *capb.ListLogRequest) iter.Seq2[*capb.LogEntry, error] {
	l.asked = q
	return func(yield func(*capb.LogEntry, error) bool) {
		for _, e := range l.entries {
			if !yield(e, nil) {
				return
			}
		}
		if l.fails != nil {
			yield(nil, l.fails)
		}
	}
}

func (l *log) Verify(_ context.Context, heads []*capb.LogHead, _ bool) (*capb.VerifyResponse, error) {
	l.given = heads
	return l.report, nil
}

func (l *log) Head(context.Context) (*capb.LogHead, error) { return l.head, nil }
func (l *log) Close() error                                { return nil }

func run(l *log, args ...string) (string, error) {
	c := &cobra.Command{Use: "log", SilenceErrors: true, SilenceUsage: true}
	c.AddCommand(issuancelog.Commands(func(context.Context) (issuancelog.Source, error) { return l, nil })...)
	var out bytes.Buffer
	c.SetArgs(args)
	c.SetOut(&out)
	c.SetErr(&out)
	err := c.Execute()
	return out.String(), err
}

func sample() *log {
	at := timestamppb.New(time.Date(2026, 11, 25, 12, 0, 0, 500, time.UTC))
	return &log{
		head: &capb.LogHead{Instance: 1, Sequence: 3, Hash: bytes.Repeat([]byte{7}, 32), Time: at, Signature: []byte("signature")},
		entries: []*capb.LogEntry{
			{Instance: 1, Sequence: 1, Time: at, Record: &capb.IssuanceRecord{Kind: capb.IssuanceRecord_KIND_ROOT, Serial: bytes.Repeat([]byte{1}, 17),
				Evidence: capb.IssuanceRecord_EVIDENCE_SELF, NotBefore: 1795478400, NotAfter: 1827014400, KeyHash: bytes.Repeat([]byte{4}, 32)}},
			{Instance: 1, Sequence: 2, Time: at, Record: &capb.IssuanceRecord{Kind: capb.IssuanceRecord_KIND_WORKLOAD, Serial: bytes.Repeat([]byte{2}, 17),
				SpiffeId: "spiffe://cluster.local/ns/default/sa/server", Node: "node-a", Evidence: capb.IssuanceRecord_EVIDENCE_POD_UID, PodUid: "uid\x1b[31m",
				Requester: bytes.Repeat([]byte{5}, 17), Authority: bytes.Repeat([]byte{3}, 20), NotBefore: 1795478400, NotAfter: 1795482000,
				KeyHash: bytes.Repeat([]byte{4}, 32), TokenAt: 1795478000, Door: "istio"}},
			{Instance: 1, Sequence: 3, Time: at, Record: &capb.IssuanceRecord{Kind: capb.IssuanceRecord_KIND_DECISION, Decision: &capb.Decision{
				What: capb.Decision_WHAT_LOG_LOSS_ACCEPTED, Instance: 1, Sequence: 9, Hash: bytes.Repeat([]byte{6}, 32), Reason: "the disk died"}}},
			{Instance: 1, Sequence: 4, Time: at, Record: &capb.IssuanceRecord{Kind: capb.IssuanceRecord_KIND_INTERMEDIATE, Serial: bytes.Repeat([]byte{8}, 17),
				Evidence: capb.IssuanceRecord_EVIDENCE_SELF, Authority: bytes.Repeat([]byte{3}, 20), NotBefore: 1795478400, NotAfter: 1795482000, KeyHash: bytes.Repeat([]byte{9}, 32), ForInstance: 2}},
		},
		report: &capb.VerifyResponse{},
	}
}

// TestExportGolden: what others parse does not change.
func TestExportGolden(t *testing.T) {
	t.Parallel()
	out, err := run(sample(), "export")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", "export.golden")
	if *update {
		if err := os.WriteFile(path, []byte(out), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || out != string(want) {
		t.Errorf("got\n%s\nwant\n%s%v", out, want, err)
	}
}

func TestListIsSafeToLookAt(t *testing.T) {
	t.Parallel()
	l := sample()
	out, err := run(l, "list", "--id", "spiffe://x/y", "--serial", "0a0b", "--since", "24h", "--limit", "5", "--from", "7")
	if err != nil || strings.Contains(out, "\x1b") || !strings.Contains(out, `uid\x1b[31m`) || !strings.Contains(out, "log-loss-accepted: the disk died") || !strings.Contains(out, "for instance 2") {
		t.Errorf("%q, %v", out, err)
	}
	if q := l.asked; q.GetSpiffeId() != "spiffe://x/y" || !bytes.Equal(q.GetSerial(), []byte{10, 11}) || q.GetLimit() != 5 || q.GetFrom() != 7 ||
		time.Since(q.GetSince().AsTime()) < 24*time.Hour || q.GetUntil() != nil {
		t.Errorf("asked for %v", q)
	}
	for _, bad := range [][]string{{"list", "--serial", "xx"}, {"list", "--since", "yesterday"}, {"list", "-o", "yaml"}, {"export", "--until", "-3h"},
		{"verify", "-o", "yaml"}, {"verify", "--head", "/nonexistent"}, {"list", "more"}} {
		if out, err := run(sample(), bad...); err == nil {
			t.Errorf("%v: %s", bad, out)
		}
	}
	l.fails = errors.New("the disk is on fire")
	for _, c := range []string{"list", "export"} {
		if out, err := run(l, c); !errors.Is(err, l.fails) || !strings.Contains(out, "server") {
			t.Errorf("%s: %q, %v", c, out, err)
		}
	}
}

// TestAHeadComesBack: what head prints verify takes.
func TestAHeadComesBack(t *testing.T) {
	t.Parallel()
	l := sample()
	out, err := run(l, "head")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "head.json")
	if err := os.WriteFile(path, []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := run(l, "verify", "--head", path); err != nil || out != "ok\n" || len(l.given) != 1 || !proto.Equal(l.given[0], l.head) {
		t.Errorf("%q, %v, %v", out, err, l.given)
	}
	l.report = &capb.VerifyResponse{Problems: []string{"it burns\x07"}, More: 3, Logs: []*capb.LogReport{{Instance: 1, First: 1, Last: 3, Head: l.head}}}
	if out, err := run(l, "verify"); !errors.Is(err, issuancelog.ErrProblems) || !strings.Contains(out, `PROBLEM it burns\a`) || !strings.Contains(out, "and 3 more") {
		t.Errorf("%q, %v", out, err)
	}
	out, err = run(l, "verify", "-o", "json")
	var report struct{ Problems []string }
	if e := json.Unmarshal([]byte(out), &report); e != nil || !errors.Is(err, issuancelog.ErrProblems) || len(report.Problems) != 1 {
		t.Errorf("%q, %v, %v", out, err, e)
	}
	if _, err := run(&log{}, "head"); err == nil {
		t.Error("there is no head, and one was printed")
	}
}

// FuzzHead: a head is whole or refused.
func FuzzHead(f *testing.F) {
	l := sample()
	out, err := run(l, "head")
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(out))
	f.Add([]byte(`{"instance":1}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "head.json")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		l := &log{report: &capb.VerifyResponse{}}
		if _, err := run(l, "verify", "--head", path); err != nil {
			return
		}
		if h := l.given[0]; len(h.GetHash()) != 32 || h.GetInstance() == 0 || h.GetSequence() == 0 || len(h.GetSignature()) == 0 {
			t.Errorf("%s was taken as %v", b, h)
		}
	})
}
