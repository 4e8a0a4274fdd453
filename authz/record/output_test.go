package record_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	collectorpb "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz/record"
)

func open(t *testing.T) (f *record.File, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "decisions.jsonl")
	f, err := record.OpenFile(path, 0, 2)
	if err != nil {
		t.Fatal(err)
	}
	return f, path
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

func put(t *testing.T, f *record.File, lines ...string) {
	t.Helper()
	if lost, err := f.Put(lines...); lost != 0 || err != nil {
		t.Fatalf("%d lost: %v", lost, err)
	}
}

// TestFileBeginsAnew keeps as many older files as it is told, each of whole records.
func TestFileBeginsAnew(t *testing.T) {
	t.Parallel()
	f, path := open(t)
	f.Shrink(10)
	put(t, f, "one\n", "two\n", "three\n")
	put(t, f, "four\n")
	put(t, f, "five\n", "six\n", "longer than the file\n", "eight\n")
	for name, want := range map[string]string{"": "eight\n", ".1": "longer than the file\n", ".2": "six\n", ".3": ""} {
		if got := content(t, path+name); got != want {
			t.Errorf("%s holds %q; want %q", name, got, want)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	// A file that somebody has moved away, or removed, is made anew.
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	put(t, f, "nine\n")
	if got := content(t, path); got != "nine\n" {
		t.Errorf("%q", got)
	}
	// A folder where a file is to go: the file goes on, up to a bound.
	for _, n := range []string{".1", ".2"} {
		os.Remove(path + n)
		if err := os.MkdirAll(path+n+"/x", 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if lost, err := f.Put("ten ten\n"); lost != 0 || err == nil {
		t.Errorf("%d lost, %v; want kept, and told", lost, err)
	}
	if lost, err := f.Put("eleven eleven\n"); lost != 1 || err == nil {
		t.Errorf("%d lost, %v", lost, err)
	}
	if got := content(t, path); got != "nine\nten ten\n" {
		t.Errorf("%q", got)
	}
}

// TestFullDisk: a record is written whole or not at all, and those after it are read.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	for _, truncates := range []bool{true, false} {
		f, path := open(t)
		put(t, f, "one\n")
		room := 0
		f.Faulty(func(n int) int { return min(n, room) }, func() error {
			if truncates {
				return nil
			}
			return errors.New("no")
		})
		for room = range 8 {
			if lost, err := f.Put("two two\n"); lost != 1 || err == nil {
				t.Errorf("room %d: %d lost, %v", room, lost, err)
			}
		}
		room = 100
		put(t, f, "three\n")
		var whole []string
		for l := range strings.Lines(content(t, path)) {
			if l == "one\n" || l == "three\n" {
				whole = append(whole, l)
			} else if truncates || strings.Contains(l, "one") || strings.Contains(l, "three") {
				t.Errorf("truncates %t: a line %q", truncates, l)
			}
		}
		if len(whole) != 2 {
			t.Errorf("truncates %t: %q", truncates, content(t, path))
		}
	}
}

// TestFileAfterACrash begins a new line after a torn one.
func TestFileAfterACrash(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "d")
	if err := os.WriteFile(path, []byte("one\n{\"vers"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := record.OpenFile(path, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	put(t, f, "two\n")
	put(t, f, "three\n")
	if got := content(t, path); got != "one\n{\"vers\ntwo\nthree\n" {
		t.Errorf("%q", got)
	}
	for _, bad := range []string{"relative", filepath.Join(t.TempDir(), "no", "folder"), "/dev/null", t.TempDir()} {
		if _, err := record.OpenFile(bad, 0, 0); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}

// TestRecordsAreLostLoudly: checks go on while a file takes nothing, and the log says
// when that begins and ends.
func TestRecordsAreLostLoudly(t *testing.T) {
	t.Parallel()
	f, path := open(t)
	var mu sync.Mutex
	full := true
	f.Faulty(func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		if full {
			return 0
		}
		return n
	}, func() error { return nil })
	w := newService(t, record.Config{Outputs: []record.Output{f}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- w.r.Run(ctx) }()
	w.check("/a", "x-role", "guest")
	until(t, func() bool { return testutil.ToFloat64(collector(t, w.reg, "signet_records_lost_total")) == 1 })
	w.check("/b", "x-role", "guest")
	until(t, func() bool { return testutil.ToFloat64(collector(t, w.reg, "signet_records_lost_total")) == 2 })
	mu.Lock()
	full = false
	mu.Unlock()
	w.check("/c", "x-role", "guest")
	until(t, func() bool { return strings.Count(content(t, path), "\n") == 1 })
	cancel()
	<-done
	if log := w.log.String(); strings.Count(log, "are lost") != 1 || strings.Count(log, "kept again") != 1 {
		t.Errorf("log %s", log)
	}
}

func until(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come")
		}
	}
}

// byHandler is a client whose requests a handler answers, without a network: so time is
// that of the test alone.
func byHandler(h http.HandlerFunc) *http.Client {
	return &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			w := httptest.NewRecorder()
			h(w, r)
			return w.Result(), nil
		})}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestOTLP sends what a collector understands, again where it asks for that.
func TestOTLP(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testOTLP)
}

func testOTLP(t *testing.T) {
	var mu sync.Mutex
	var got []*collectorpb.ExportLogsServiceRequest
	var answers []int // statuses to give, one after the other; then 200
	var body []byte
	collects := func(rw http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		b, _ := io.ReadAll(r.Body)
		if r.URL.Path != "/v1/logs" || r.Header.Get("Content-Type") != "application/x-protobuf" || r.Header.Get("X-Tenant") != "t" {
			t.Errorf("%s %v", r.URL, r.Header)
		}
		if len(answers) > 0 {
			rw.WriteHeader(answers[0])
			answers = answers[1:]
			return
		}
		m := &collectorpb.ExportLogsServiceRequest{}
		if err := proto.Unmarshal(b, m); err != nil {
			t.Error(err)
		}
		got = append(got, m)
		rw.Write(body)
	}
	for _, tt := range []struct {
		name     string
		statuses []int
		body     *collectorpb.ExportLogsServiceResponse
		lost     float64
	}{
		{"at once", nil, nil, 0},
		{"after a while", []int{503, 429, 502, 504}, nil, 0},
		{"never", []int{400}, nil, 2},
		{"in part", nil, &collectorpb.ExportLogsServiceResponse{PartialSuccess: &collectorpb.ExportLogsPartialSuccess{RejectedLogRecords: 1}}, 1},
		{"elsewhere", []int{302}, nil, 2},
	} {
		o, err := record.NewOTLP(record.OTLPConfig{Endpoint: "http://collector:4318", Headers: map[string]string{"X-Tenant": "t"}, Node: "n", Version: "v1"})
		if err != nil {
			t.Fatal(err)
		}
		o.Hasten(byHandler(collects))
		mu.Lock()
		got, answers, body = nil, tt.statuses, nil
		if tt.body != nil {
			body, _ = proto.Marshal(tt.body)
		}
		mu.Unlock()
		var out bytes.Buffer
		w := newService(t, record.Config{Outputs: []record.Output{o, record.Stream("stdout", &out)}, Allowed: 1})
		w.check("/a")
		w.check("/b", "x-role", "guest")
		w.finish()
		if lost := testutil.ToFloat64(collector(t, w.reg, "signet_records_lost_total")); lost != tt.lost {
			t.Errorf("%s: %v lost: %s", tt.name, lost, w.log)
		}
		if tt.lost == 2 {
			continue
		}
		if len(got) != 1 {
			t.Fatalf("%s: %d requests", tt.name, len(got))
		}
		rl := got[0].GetResourceLogs()[0]
		logs := rl.GetScopeLogs()[0].GetLogRecords()
		var lines string
		for _, l := range logs {
			lines += l.GetBody().GetStringValue() + "\n"
		}
		if lines != out.String() || len(rl.GetResource().GetAttributes()) != 3 {
			t.Errorf("%s: sent %v; want the lines %s", tt.name, got[0], out.String())
		}
		attributes := map[string]string{}
		for _, kv := range logs[1].GetAttributes() {
			attributes[kv.GetKey()] = kv.GetValue().GetStringValue()
		}
		if logs[0].GetSeverityText() != "INFO" || logs[1].GetSeverityText() != "WARN" || len(logs[1].GetTraceId()) != 16 || logs[1].GetTimeUnixNano() == 0 ||
			attributes["signet.decision"] != "deny" || attributes["signet.policy"] != "shop/deny" || attributes["k8s.pod.name"] != "cart-1" {
			t.Errorf("%s: %v", tt.name, logs)
		}
	}
}

// TestOTLPEnds: a collector that is away holds up no end.
func TestOTLPEnds(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]roundTrip{
		"refuses connections": func(*http.Request) (*http.Response, error) { return nil, syscall.ECONNREFUSED },
		"says nothing":        func(r *http.Request) (*http.Response, error) { <-r.Context().Done(); return nil, r.Context().Err() },
	} {
		synctest.Test(t, func(t *testing.T) {
			o, err := record.NewOTLP(record.OTLPConfig{Endpoint: "http://collector:4318", Client: &http.Client{Transport: answer}})
			if err != nil {
				t.Fatal(err)
			}
			w := newService(t, record.Config{Outputs: []record.Output{o}})
			w.check("/b", "x-role", "guest")
			start := time.Now()
			w.finish()
			if took := time.Since(start); took > 3*time.Second {
				t.Errorf("where it %s it took %v", name, took)
			}
			if lost := testutil.ToFloat64(collector(t, w.reg, "signet_records_lost_total")); lost != 1 {
				t.Errorf("where it %s %v are lost", name, lost)
			}
		})
	}
	for _, bad := range []string{"", "collector:4318", "ftp://x", "http://", "http://user:secret@x"} {
		if _, err := record.NewOTLP(record.OTLPConfig{Endpoint: bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
