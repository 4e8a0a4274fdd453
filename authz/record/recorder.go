package record

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
)

// Defaults of a [Config].
const (
	DefaultAllowedPerSecond = 100
	DefaultQueueBytes       = 8 << 20
	DefaultMaxPolicies      = 1000
)

// DefaultRedacted are the headers that carry secrets by what they are.
func DefaultRedacted() []string {
	return []string{"authorization", "cookie", "proxy-authorization", "x-api-key"}
}

// Config is what [New] needs.
type Config struct {
	// Outputs are where records go; without any, decisions are only counted.
	Outputs []Output
	// Allowed is the share of the allowed requests that are recorded, from 0 to 1;
	// all others are recorded always. AllowedPerSecond bounds them; 0 means
	// [DefaultAllowedPerSecond].
	Allowed          float64
	AllowedPerSecond int
	// Redacted are headers whose values are never shown, beside those in which
	// RequestAuthentications look for tokens; nil means [DefaultRedacted].
	Redacted []string
	// Headers and Claims are shown beside those that policies read, and Query has
	// the values of queries shown. Of a check that no policy was asked about, so that
	// it is not known where tokens are looked for, neither headers nor values are.
	Headers, Claims []string
	Query           bool
	// QueueBytes bounds what waits to be recorded, here and at each output; 0 means
	// [DefaultQueueBytes]. What does not fit is dropped and counted.
	QueueBytes int
	// MaxPolicies bounds the policies that are counted by name; 0 means
	// [DefaultMaxPolicies].
	MaxPolicies int
	// Log says when records are lost; nil discards.
	Log *slog.Logger
	// Metrics is where metrics are registered; nil registers none.
	Metrics prometheus.Registerer
}

// Recorder counts decisions and records them. It is safe for concurrent use.
type Recorder struct {
	allowed float64
	limit   *rate.Limiter
	show    Shown
	most    int64
	outputs []*output
	log     *slog.Logger
	metrics *metrics

	queue chan *item
	bytes atomic.Int64 // of the items in queue
}

// item is a decision that waits to be recorded.
type item struct {
	Record
	size     int64 // that is counted in Recorder.bytes
	message  []byte
	claims   *structpb.Struct // that were decided on, or nil
	known    authz.Field      // of what was decided on
	token    *authz.Changes
	program  *authz.Program
	decision authz.Decision
	asked    []string
	changed  []*authz.Changes
}

// New makes a Recorder. Nothing is recorded before Run.
func New(cfg Config) (*Recorder, error) {
	if cfg.Allowed < 0 || cfg.Allowed > 1 || cfg.Allowed != cfg.Allowed {
		return nil, fmt.Errorf("recording decisions: the share of allowed requests is %v; it must be from 0 to 1", cfg.Allowed)
	}
	if cfg.AllowedPerSecond < 0 || cfg.QueueBytes < 0 || cfg.MaxPolicies < 0 {
		return nil, errors.New("recording decisions: a bound is negative")
	}
	if cfg.Redacted == nil {
		cfg.Redacted = DefaultRedacted()
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	perSecond := cmp.Or(cfg.AllowedPerSecond, DefaultAllowedPerSecond)
	r := &Recorder{
		allowed: cfg.Allowed, limit: rate.NewLimiter(rate.Limit(perSecond), perSecond), most: int64(cmp.Or(cfg.QueueBytes, DefaultQueueBytes)), log: cfg.Log,
		show:  Shown{Headers: set(cfg.Headers), Claims: make(map[string]bool), Redacted: set(cfg.Redacted), Query: cfg.Query},
		queue: make(chan *item, 16<<10),
	}
	for _, c := range cfg.Claims {
		r.show.Claims[c] = true
	}
	var err error
	if r.metrics, err = newMetrics(cfg.Metrics, cmp.Or(cfg.MaxPolicies, DefaultMaxPolicies)); err != nil {
		return nil, fmt.Errorf("registering metrics of decisions: %w", err)
	}
	for _, o := range cfg.Outputs {
		r.outputs = append(r.outputs, r.newOutput(o))
	}
	return r, nil
}

// set is a set of headers.
func set(names []string) map[string]bool {
	out := make(map[string]bool, len(names))
	for _, n := range names {
		out[strings.ToLower(n)] = true
	}
	return out
}

// Add takes a decision of the ext_authz service. It does not wait for anybody.
func (r *Recorder) Add(from *extauthz.Record) {
	d := from.Decision
	r.metrics.decided(d)
	switch {
	case len(r.outputs) == 0:
		return
	case d.Allowed && (r.allowed < 1 && rand.Float64() >= r.allowed || !r.limit.Allow()):
		r.metrics.unsampled.Inc()
		return
	}
	n := sizeOf(from)
	if r.bytes.Add(n) > r.most {
		r.bytes.Add(-n)
		r.metrics.lost.WithLabelValues("all", "queue").Inc()
		return
	}
	it := &item{
		Record: Record{
			Time: from.Time, Workload: *from.Workload, Unread: from.Program == nil && from.Snapshot == nil && from.Err != nil,
			Allowed: d.Allowed, Kind: d.Kind, Policy: d.Policy, Rule: d.Rule, Reason: d.Reason,
			Generation: from.Snapshot.Generation(), Latency: from.Took,
		},
		size: n, message: bytes.Clone(from.Message), program: from.Program, decision: d, asked: slices.Clone(from.Asked), changed: slices.Clone(from.Changed),
	}
	if from.Err != nil {
		it.Err = from.Err.Error()
	}
	it.known = from.Request.Known
	if c := from.Request.Claims; c != nil {
		it.claims, it.token = proto.Clone(c).(*structpb.Struct), from.Request.Token
	}
	select {
	case r.queue <- it:
	default:
		r.bytes.Add(-n)
		r.metrics.lost.WithLabelValues("all", "queue").Inc()
	}
}

// sizeOf is about what a decision takes that waits to be recorded: what came, what
// providers have answered, and what a token says.
func sizeOf(from *extauthz.Record) int64 {
	n := len(from.Message) + changesSize(from.Request.Token)
	for _, c := range from.Changed {
		n += changesSize(c)
	}
	for name, v := range from.Request.Claims.GetFields() {
		n += len(name) + valueSize(v)
	}
	return int64(n)
}

// What a value of a token and what a header take, beside their bytes.
const (
	perValue  = 150
	perHeader = 48
)

func changesSize(c *authz.Changes) (n int) {
	if c == nil {
		return 0
	}
	n = len(c.Method) + len(c.Path) + len(c.Host)
	for _, name := range c.Names {
		n += perHeader + len(name)
	}
	for i := range c.Headers {
		n += perHeader + len(c.Headers[i].Value)
	}
	return n
}

// valueSize is the size of a value; a token's are not deep (see package token).
func valueSize(v *structpb.Value) (n int) {
	n = perValue
	switch k := v.GetKind().(type) {
	case *structpb.Value_StringValue:
		n += len(k.StringValue)
	case *structpb.Value_ListValue:
		for _, e := range k.ListValue.GetValues() {
			n += valueSize(e)
		}
	case *structpb.Value_StructValue:
		for name, e := range k.StructValue.GetFields() {
			n += len(name) + valueSize(e)
		}
	}
	return n
}

// farewell is how long what still waits at the end may take.
const farewell = 2 * time.Second

// Run records until ctx ends, and then what still waits.
func (r *Recorder) Run(ctx context.Context) error {
	// The outputs go on while the queue is emptied, and no longer than the farewell.
	out, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(farewell, cancel) })
	defer stop()
	var outputs sync.WaitGroup
	for _, o := range r.outputs {
		outputs.Go(func() { o.run(out) })
	}
	for going := true; going; {
		select {
		case it := <-r.queue:
			r.record(it)
		case <-ctx.Done():
			going = false
		}
	}
	r.drain()
	done := make(chan struct{})
	go func() { outputs.Wait(); close(done) }()
	for _, o := range r.outputs {
		close(o.queue)
	}
	select {
	case <-done:
		return nil
	case <-out.Done():
	}
	select {
	case <-done:
	case <-time.After(farewell / 4):
		// An output that does not come back, as a pipe that nobody reads, is left.
		r.log.Error("decision records that were waiting are lost: their output did not take them in time")
	}
	return nil
}

// drain records what waits.
func (r *Recorder) drain() {
	for {
		select {
		case it := <-r.queue:
			r.record(it)
		default:
			return
		}
	}
}

// record makes the record of an item and hands it to the outputs.
func (r *Recorder) record(it *item) {
	r.bytes.Add(-it.size)
	rec := &it.Record
	// All of the message, of which the decision may have needed less. An error is
	// why it was not read then either.
	if extauthz.FromBytes(it.message, authz.FieldsHTTP, &rec.Request) != nil && it.program != nil {
		// Metadata that is too much and that the decision did not need is not shown.
		_ = extauthz.FromBytes(it.message, authz.FieldsHTTP&^(authz.FieldClaims|authz.FieldMetadata), &rec.Request)
	}
	if rec.Request.Claims != nil && len(it.program.Verifies()) > 0 && (it.claims == nil || it.token != nil) {
		// A provider changed where tokens are looked for, and since then what the proxy
		// said of a token does not count.
		rec.Request.DisownToken()
		if it.known&authz.FieldClaims == 0 || byProvider(rec.Reason) { // nor is it known that there was none
			rec.Request.Known &^= authz.FieldClaims | authz.FieldMetadata
		}
	}
	if it.claims != nil {
		rec.Request.Claims, rec.Request.Token = it.claims, it.token
		rec.Request.Known |= authz.FieldClaims
	}
	rec.RequestID, rec.TraceID = ids(&rec.Request)
	if m, ok := it.decision.Audited(); ok {
		rec.Audited = &m
	}
	rec.DryRuns = it.decision.DryRuns()
	for i, name := range it.asked {
		a := Answer{Provider: name, Allowed: true}
		if i < len(it.changed) {
			a.Changes = it.changed[i]
		}
		if i == len(it.asked)-1 && !rec.Allowed && it.decision.Provider == name && byProvider(rec.Reason) {
			a.Allowed, a.Reason = false, rec.Reason
		}
		rec.Answers = append(rec.Answers, a)
	}
	show := r.show
	show.Read = it.program.Names()
	if it.program == nil {
		// Nobody knows where tokens are looked for.
		show.Headers, show.Query = nil, false
	}
	for rule := range it.program.TokenRules() {
		headers, params := rule.Places()
		show.TokenHeaders, show.TokenParams = append(show.TokenHeaders, headers...), append(show.TokenParams, params...)
		// It has the claims that are hidden.
		if name := rule.Spec.GetOutputPayloadToHeader(); name != "" {
			show.TokenHeaders = append(show.TokenHeaders, strings.ToLower(name))
		}
	}
	if slices.Contains(show.TokenHeaders, "x-request-id") {
		rec.RequestID = ""
	}
	l := line{text: rec.Append(nil, show), record: rec.head()}
	for _, o := range r.outputs {
		o.add(l)
	}
}

// head is what an output reads of a record beside its text. It does not hold on to the
// request, of which the text may have little.
func (r *Record) head() *Record {
	return &Record{Time: r.Time, Workload: r.Workload, Allowed: r.Allowed, Policy: r.Policy, Reason: r.Reason, Latency: r.Latency, TraceID: r.TraceID}
}

// byProvider reports whether a provider, or its absence, decided.
func byProvider(reason authz.Reason) bool {
	switch reason {
	case extauthz.ReasonProviderDenied, extauthz.ReasonProviderFailed, extauthz.ReasonProviderUnknown:
		return true
	}
	return false
}

// ids are the request's identifier and its trace, if they look like that.
func ids(r *authz.Request) (request, trace string) {
	for i := range r.Headers {
		switch h := &r.Headers[i]; {
		case h.Name == "x-request-id" && len(h.Value) <= 128 && h.Form == authz.HeaderValue:
			request = strings.ToValidUTF8(string(h.Value), "\uFFFD")
		case h.Name == "traceparent":
			trace = extauthz.Trace(h.Value)
		}
	}
	return request, trace
}

var _ extauthz.Records = (*Recorder)(nil)
