package integration_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/storage/etcd"
)

// stored are the values of the shared state below a prefix.
func (r *caReplicas) stored(t *testing.T, prefix string) (values [][]byte) {
	t.Helper()
	s, err := etcd.Open(t.Context(), etcd.Options{Endpoints: r.cluster.Endpoints(), TLS: r.cluster.TLS(), MustExist: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	entries, _, err := s.List(t.Context(), prefix)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		values = append(values, e.Value)
	}
	return values
}

// trustSequence is that of the shared state, acknowledged the highest that an agent has.
func (r *caReplicas) trustSequence(t *testing.T) uint64 { return r.highest(t, "journal", "sequence") }
func (r *caReplicas) acknowledged(t *testing.T) uint64 {
	return r.highest(t, "agents/", "acknowledged")
}

func (r *caReplicas) highest(t *testing.T, prefix, field string) (most uint64) {
	t.Helper()
	for _, b := range r.stored(t, prefix) {
		var all map[string]json.RawMessage
		var n uint64
		if err := json.Unmarshal(b, &all); err != nil {
			t.Fatal(err)
		}
		if all[field] != nil {
			if err := json.Unmarshal(all[field], &n); err != nil {
				t.Fatal(err)
			}
		}
		most = max(most, n)
	}
	return most
}

// TestEtcdIsRestoredFromASnapshot does what docs/replicas.md says, with etcd's own tools: an
// old snapshot is put back, and authority and agent go on. No sequence and no instance comes
// twice, and that records were lost is on record.
func TestEtcdIsRestoredFromASnapshot(t *testing.T) {
	t.Parallel()
	r, _ := newRooted(t, 5)
	names := []string{"ca1", "ca2"}
	configure := func(from, to string) {
		t.Helper()
		for _, name := range names {
			path := filepath.Join(r.dir, name+".yaml")
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, bytes.ReplaceAll(b, []byte(from), []byte(to)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	configure("svid: {", "issuanceLog: {headInterval: 200ms}\nsvid: {")
	socket := func(name string) string { return filepath.Join(r.dir, name, "admin.sock") }
	ca := func(args ...string) (string, error) {
		out, err := exec.CommandContext(t.Context(), filepath.Join(r.bin, "signet-ca"), args...).CombinedOutput()
		return string(out), err
	}
	for _, name := range names {
		r.serve(name)
	}
	r.start("signet-agent")
	first, err := r.svid(0, time.Minute)
	if err != nil {
		t.Fatal(err)
	}

	// What replicas do at their start may change trust while it is taken.
	var snapshot string
	was := r.trustSequence(t)
	for n := 0; ; n++ {
		snapshot = filepath.Join(r.dir, fmt.Sprintf("etcd-%d.snapshot", n))
		r.cluster.Snapshot(t, snapshot)
		before := was
		if was = r.trustSequence(t); was == before {
			break
		}
	}

	// What the snapshot does not have: records, a revocation, and two states of trust.
	lost, err := r.svid(1, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	by := instanceOf(lost.Leaf)
	serial := fmt.Sprintf("%x", lost.Leaf.SerialNumber.FillBytes(make([]byte, 17)))
	record := func() string {
		out := r.signet("ca", "log", "list", "--socket", socket(by), "--serial", serial)
		return regexp.MustCompile(`(?m)^\d+/(\d+)`).FindString(out)
	}()
	if record == "" {
		t.Fatalf("no record of %s", serial)
	}
	r.signet("ca", "revoke", "--socket", socket(by), serial, "--reason", "keyCompromise", "--comment", "stolen")
	for _, name := range names {
		r.wait(name+" to have it on a list", func() bool { return r.listed(name, lost.Leaf) })
	}
	seen := r.trustSequence(t)
	if seen <= was {
		t.Fatalf("the trust sequence is %d, and was %d", seen, was)
	}
	// Its head goes to agents before, and with, what they acknowledge.
	r.wait("a head that agents have", func() bool {
		var head struct{ Sequence json.Number }
		_ = json.Unmarshal([]byte(r.signet("ca", "log", "head", "--socket", socket(by))), &head)
		n, _ := head.Sequence.Int64()
		var of, want int64
		_, _ = fmt.Sscanf(record, "%d/%d", &of, &want)
		return n >= want
	})
	_, err = r.svid(2, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	r.signet("ca", "revoke", "--socket", socket(instanceOf(first.Leaf)), fmt.Sprintf("%x", first.Leaf.SerialNumber.FillBytes(make([]byte, 17))), "--reason", "superseded")
	r.wait("the agent to acknowledge it", func() bool { n := r.trustSequence(t); return n > seen && r.acknowledged(t) == n })
	seen = r.trustSequence(t)

	for _, name := range names {
		r.stop(name, syscall.SIGTERM)
	}
	r.cluster.Restore(t, snapshot, "--bump-revision", "1000000000", "--mark-compacted")
	if now := r.trustSequence(t); now != was {
		t.Fatalf("the snapshot has trust sequence %d, not %d", now, was)
	}
	out, err := ca("restore-etcd", "--config", filepath.Join(r.dir, "ca1.yaml"), "--reason", "disks lost, incident 12")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("note: agents had acknowledged trust sequence %d, the snapshot has %d; signet-ca restore-etcd:\n%s", seen, was, out)
	if !strings.Contains(out, "instance: 3, which was 1,") || !strings.Contains(out, "instance: 4, which was 2,") {
		t.Fatalf("other instances than 3 and 4:\n%s", out)
	}
	if out, err := ca("serve", "--config", filepath.Join(r.dir, "ca1.yaml")); err == nil || !strings.Contains(out, "is instance 3 since") {
		t.Errorf("with the former instance in its configuration: %v\n%s", err, out)
	}
	configure("instance: 1", "instance: 3")
	configure("rootReplica: 1", "rootReplica: 3")
	for _, name := range names {
		r.serve(name)
	}

	next, err := r.svid(3, 2*time.Minute)
	if err != nil {
		t.Fatalf("%v\n%s", err, r.procs["signet-agent"].log.String())
	}
	now := map[string]string{"ca3": "ca1", "ca4": "ca2"}
	if now[instanceOf(next.Leaf)] == "" {
		t.Errorf("an SVID of %s", instanceOf(next.Leaf))
	}
	if n := r.trustSequence(t); n <= seen || n < was+1<<20 {
		t.Errorf("trust sequence %d after %d", n, seen)
	}
	of, _, _ := strings.Cut(record, "/")
	lostRecords := regexp.MustCompile(`signet_ca_retired_log_lost_records\{instance="` + of + `"\} [1-9]`)
	r.wait("the agent to show what was lost", func() bool {
		return lostRecords.Match(r.get("ca1", "/metrics")) || lostRecords.Match(r.get("ca2", "/metrics"))
	})
	for _, name := range names {
		list := r.signet("ca", "log", "list", "--socket", socket(name))
		if !strings.Contains(list, "restored: disks lost, incident 12") || !strings.Contains(list, "\n"+strings.TrimPrefix(name, "ca")+"/1") {
			t.Errorf("the logs of %s, former and present:\n%s", name, list)
		}
		t.Logf("note: %s: %s", name, r.signet("ca", "log", "verify", "--store", "--socket", socket(name)))
	}
	// What was taken back since the snapshot is not; a ban does it, here by the serial.
	r.signet("ca", "ban", "add", "--socket", socket("ca1"), "serial/"+serial, "--reason", "revoked before the restore")

	// It goes on as before: revocations, at whichever replica, and what is taken back of a
	// former instance.
	before := r.trustSequence(t)
	for _, c := range []string{fmt.Sprintf("%x", next.Leaf.SerialNumber.FillBytes(make([]byte, 17))), fmt.Sprintf("%x", first.Leaf.SerialNumber.FillBytes(make([]byte, 17)))} {
		name := now[fmt.Sprintf("ca%d", c[1]-'0')]
		if name == "" {
			name = fmt.Sprintf("ca%d", c[1]-'0')
		}
		r.signet("ca", "revoke", "--socket", socket(name), c, "--reason", "superseded")
	}
	for _, name := range names {
		r.wait(name+" to have both on lists", func() bool { return r.listed(name, next.Leaf) && r.listed(name, first.Leaf) })
	}
	r.wait("the agent to acknowledge that", func() bool { n := r.trustSequence(t); return n > before && r.acknowledged(t) == n })
	if _, err := r.svid(4, time.Minute); err != nil {
		t.Error(err)
	}
	if err := errorsIn(r.procs); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"signet-agent", "ca1", "ca2"} {
		r.stop(name, syscall.SIGTERM)
	}
}

// errorsIn says which programs panicked.
func errorsIn(procs map[string]*process) error {
	for name, p := range procs {
		if log := p.log.String(); strings.Contains(log, "panic") {
			return fmt.Errorf("%s\n%s", name, log)
		}
	}
	return nil
}
