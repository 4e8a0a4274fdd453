package record

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	collectorpb "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	commonpb "go.opentelemetry.io/proto/slim/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/slim/otlp/logs/v1"
	resourcepb "go.opentelemetry.io/proto/slim/otlp/resource/v1"
	"google.golang.org/protobuf/proto"
)

// OTLPConfig is what [NewOTLP] needs.
type OTLPConfig struct {
	// Endpoint is the URL of the collector, as http://collector:4318; a path that is
	// empty is /v1/logs.
	Endpoint string
	// Headers go with each request.
	Headers map[string]string
	// Timeout is how long a request may take; 0 means [DefaultOTLPTimeout].
	Timeout time.Duration
	// Node is told as k8s.node.name, Version as service.version.
	Node, Version string
	// Client sends; nil means one of its own.
	Client *http.Client
}

// DefaultOTLPTimeout is how long a request to a collector may take.
const DefaultOTLPTimeout = 10 * time.Second

// OTLP sends records to a collector of OpenTelemetry (OTLP 1.10, over HTTP in
// binary protobuf). The body of a log record is the record's line; what one filters
// by stands in attributes too.
//
// What a collector does not take for now is sent again, at growing intervals, while
// new records wait; what it refuses is lost and counted.
type OTLP struct {
	url      string
	headers  map[string]string
	timeout  time.Duration
	client   *http.Client
	resource *resourcepb.Resource
	version  string
	first    time.Duration // before the first repetition
}

// NewOTLP makes an OTLP.
func NewOTLP(cfg OTLPConfig) (*OTLP, error) {
	u, err := url.Parse(cfg.Endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil {
		return nil, fmt.Errorf("sending decision records by OTLP: endpoint %q: must be a URL as http://collector:4318", cfg.Endpoint)
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/v1/logs"
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = DefaultOTLPTimeout
	}
	if cfg.Client == nil {
		cfg.Client = &http.Client{
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			Transport:     &http.Transport{MaxIdleConnsPerHost: 1, IdleConnTimeout: 90 * time.Second, ForceAttemptHTTP2: true},
		}
	}
	o := &OTLP{url: u.String(), headers: cfg.Headers, timeout: cfg.Timeout, client: cfg.Client, version: cfg.Version, first: time.Second,
		resource: &resourcepb.Resource{Attributes: []*commonpb.KeyValue{text("service.name", "signet-agent")}}}
	for _, kv := range [][2]string{{"service.version", cfg.Version}, {"k8s.node.name", cfg.Node}} {
		if kv[1] != "" {
			o.resource.Attributes = append(o.resource.Attributes, text(kv[0], kv[1]))
		}
	}
	return o, nil
}

func (o *OTLP) name() string        { return "otlp" }
func (o *OTLP) wait() time.Duration { return time.Second }

func (o *OTLP) close() error {
	o.client.CloseIdleConnections()
	return nil
}

func text(k, v string) *commonpb.KeyValue {
	return &commonpb.KeyValue{Key: k, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: v}}}
}

// entry is the log record of a record.
func entry(l line) *logspb.LogRecord {
	r := l.record
	out := &logspb.LogRecord{
		TimeUnixNano: uint64(r.Time.UnixNano()), ObservedTimeUnixNano: uint64(r.Time.Add(r.Latency).UnixNano()),
		SeverityNumber: logspb.SeverityNumber_SEVERITY_NUMBER_INFO, SeverityText: "INFO",
		Body: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: string(bytes.TrimSuffix(l.text, []byte{'\n'}))}},
	}
	decision := "allow"
	if !r.Allowed {
		decision = "deny"
		out.SeverityNumber, out.SeverityText = logspb.SeverityNumber_SEVERITY_NUMBER_WARN, "WARN"
	}
	for _, kv := range [][2]string{
		{"signet.decision", decision}, {"signet.reason", string(r.Reason)}, {"signet.policy", r.Policy},
		{"k8s.namespace.name", r.Workload.Namespace}, {"k8s.pod.name", r.Workload.Pod}, {"k8s.pod.uid", r.Workload.PodUID},
	} {
		if kv[1] != "" {
			out.Attributes = append(out.Attributes, text(kv[0], kv[1]))
		}
	}
	if id, err := hex.DecodeString(r.TraceID); err == nil && len(id) == 16 {
		out.TraceId = id
	}
	return out
}

// errRetry wraps what may succeed later.
var errRetry = errors.New("the collector does not take records now")

func (o *OTLP) write(ctx context.Context, lines []line) (lost int, err error) {
	logs := make([]*logspb.LogRecord, len(lines))
	for i, l := range lines {
		logs[i] = entry(l)
	}
	b, err := proto.Marshal(&collectorpb.ExportLogsServiceRequest{ResourceLogs: []*logspb.ResourceLogs{{
		Resource:  o.resource,
		ScopeLogs: []*logspb.ScopeLogs{{Scope: &commonpb.InstrumentationScope{Name: "signet.decisions", Version: o.version}, LogRecords: logs}},
	}}})
	if err != nil {
		return len(lines), err
	}
	pause := o.first
	for {
		rejected, after, err := o.send(ctx, b)
		if err == nil && rejected > 0 {
			return min(rejected, len(lines)), fmt.Errorf("the collector refuses %d of %d records", rejected, len(lines))
		}
		if err == nil {
			return 0, nil
		}
		if !errors.Is(err, errRetry) {
			return len(lines), err
		}
		// A batch is not held for ever: what comes after it has a chance of its own.
		if pause > 30*time.Second {
			return len(lines), err
		}
		t := time.NewTimer(max(pause, min(after, time.Minute)))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return len(lines), err
		}
		pause *= 2
	}
}

// send sends once. after is what the collector asks to wait.
func (o *OTLP) send(ctx context.Context, b []byte) (rejected int, after time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, o.url, bytes.NewReader(b))
	if err != nil {
		return 0, 0, err
	}
	for k, v := range o.headers {
		r.Header.Set(k, v)
	}
	r.Header.Set("Content-Type", "application/x-protobuf")
	res, err := o.client.Do(r)
	if err != nil {
		return 0, 0, fmt.Errorf("%w: %w", errRetry, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	switch {
	case err != nil:
		return 0, 0, fmt.Errorf("%w: reading its answer: %w", errRetry, err)
	case res.StatusCode/100 == 2:
		var answer collectorpb.ExportLogsServiceResponse
		if err := proto.Unmarshal(body, &answer); err != nil {
			return 0, 0, nil // it took them, whatever it says
		}
		return int(answer.GetPartialSuccess().GetRejectedLogRecords()), 0, nil
	}
	// OTLP specification, "Retryable Response Codes".
	switch res.StatusCode {
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		if n, err := strconv.Atoi(res.Header.Get("Retry-After")); err == nil && n > 0 {
			after = time.Duration(n) * time.Second
		}
		return 0, after, fmt.Errorf("%w: HTTP status %d", errRetry, res.StatusCode)
	}
	return 0, 0, fmt.Errorf("the collector refuses records with HTTP status %d", res.StatusCode)
}
