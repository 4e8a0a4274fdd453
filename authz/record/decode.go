package record

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/netip"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
)

// maxLine is the longest record that is read. The longest that is written is
// shorter: an HTTP request has at most some 60 kB of headers.
const maxLine = 4 << 20

// wire is a record as it is written. Keys that are not here are refused: what an
// unknown key says could change what the record means.
type wire struct {
	Version  int       `json:"version"`
	Time     time.Time `json:"time"`
	Workload struct {
		Namespace      string            `json:"namespace"`
		ServiceAccount string            `json:"serviceAccount"`
		Pod            string            `json:"pod"`
		PodUID         string            `json:"podUID"`
		Node           string            `json:"node"`
		Labels         map[string]string `json:"labels"`
	} `json:"workload"`
	Decision   string       `json:"decision"`
	Kind       string       `json:"kind"`
	Policy     string       `json:"policy"`
	Rule       int          `json:"rule"`
	Reason     authz.Reason `json:"reason"`
	Error      string       `json:"error"`
	Unread     bool         `json:"unread"`
	Audited    *wireMatch   `json:"audited"`
	DryRun     []wireDryRun `json:"dryRun"`
	Providers  []wireAnswer `json:"providers"`
	Request    *wireRequest `json:"request"`
	Generation uint64       `json:"generation"`
	LatencyNs  int64        `json:"latencyNs"`
	RequestID  string       `json:"requestId"`
	TraceID    string       `json:"traceId"`
}

type wireMatch struct {
	Policy  string `json:"policy"`
	Rule    int    `json:"rule"`
	Certain bool   `json:"certain"`
}

type wireDryRun struct {
	Action  string `json:"action"`
	Allowed bool   `json:"allowed"`
	wireMatch
}

type wireAnswer struct {
	Provider string       `json:"provider"`
	Allowed  bool         `json:"allowed"`
	Reason   authz.Reason `json:"reason"`
	Changes  *wireChanges `json:"changes"`
}

type wireChanges struct {
	Names       []string     `json:"names"`
	Headers     []wireHeader `json:"headers"`
	Method      raw          `json:"method"`
	Path        raw          `json:"path"`
	QueryHidden bool         `json:"queryHidden"`
	Host        raw          `json:"host"`
	Hidden      []string     `json:"hidden"`
}

type wireRequest struct {
	Known           []string                   `json:"known"`
	HTTP            bool                       `json:"http"`
	Authenticated   bool                       `json:"authenticated"`
	Principal       raw                        `json:"principal"`
	OtherNames      []raw                      `json:"otherNames"`
	SourceIP        address                    `json:"sourceIP"`
	RemoteIP        address                    `json:"remoteIP"`
	DestinationIP   address                    `json:"destinationIP"`
	DestinationPort uint16                     `json:"destinationPort"`
	SNI             raw                        `json:"sni"`
	Method          raw                        `json:"method"`
	Path            raw                        `json:"path"`
	QueryHidden     bool                       `json:"queryHidden"`
	Host            raw                        `json:"host"`
	Headers         []wireHeader               `json:"headers"`
	Claims          json.RawMessage            `json:"claims"`
	HiddenClaims    []string                   `json:"hiddenClaims"`
	Token           *wireChanges               `json:"token"`
	Metadata        map[string]json.RawMessage `json:"metadata"`
	HiddenMetadata  map[string][]string        `json:"hiddenMetadata"`
}

type wireHeader struct {
	Name  raw    `json:"name"`
	Form  string `json:"form"`
	Value raw    `json:"value"`
}

// raw is bytes: a string, or {"base64": "…"}.
type raw []byte

// UnmarshalJSON reads either form.
func (r *raw) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		var s string
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
		*r = append(raw{}, s...)
		return nil
	}
	var o struct {
		Base64 *[]byte `json:"base64"`
	}
	if err := strictly(b, &o); err != nil {
		return err
	}
	if o.Base64 == nil {
		return errors.New(`bytes are neither text nor {"base64": …}`)
	}
	*r = append(raw{}, *o.Base64...)
	return nil
}

type address struct{ netip.Addr }

// UnmarshalText reads an address; unlike netip's, not an empty one.
func (a *address) UnmarshalText(b []byte) (err error) {
	a.Addr, err = netip.ParseAddr(string(b))
	return err
}

func strictly(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something follows it")
	}
	return nil
}

// Decode reads a record, a line with or without its newline. What it does not know
// it refuses: a version, a key, a name of what is known.
func Decode(line []byte) (Record, error) {
	r, err := decode(line)
	if err != nil {
		return Record{}, fmt.Errorf("reading a decision record: %w", err)
	}
	return r, nil
}

func decode(line []byte) (r Record, err error) {
	if len(line) > maxLine {
		return r, fmt.Errorf("it is longer than %d bytes", maxLine)
	}
	// The version first: of another one the keys are others too.
	var v struct {
		Version *int `json:"version"`
	}
	switch err := json.Unmarshal(line, &v); {
	case err != nil:
		return r, err
	case v.Version == nil:
		return r, errors.New("it has no version")
	case *v.Version < 1 || *v.Version > Version:
		return r, fmt.Errorf("it is of version %d; this program reads versions up to %d", *v.Version, Version)
	}
	var w wire
	if err := strictly(line, &w); err != nil {
		return r, err
	}
	r = Record{
		Time: w.Time.UTC(), Unread: w.Unread, Allowed: w.Decision == "allow",
		Kind: w.Kind, Policy: w.Policy, Rule: w.Rule, Reason: w.Reason, Err: w.Error,
		Generation: w.Generation, Latency: time.Duration(w.LatencyNs), RequestID: w.RequestID, TraceID: w.TraceID,
	}
	switch {
	case w.Decision != "allow" && w.Decision != "deny":
		return r, fmt.Errorf("the decision is %q, neither allow nor deny", w.Decision)
	case w.Request == nil:
		return r, errors.New("it has no request")
	}
	r.Workload.Namespace, r.Workload.ServiceAccount = w.Workload.Namespace, w.Workload.ServiceAccount
	r.Workload.Pod, r.Workload.PodUID, r.Workload.Node, r.Workload.Labels = w.Workload.Pod, w.Workload.PodUID, w.Workload.Node, w.Workload.Labels
	if w.Audited != nil {
		r.Audited = &authz.Match{Policy: w.Audited.Policy, Rule: w.Audited.Rule, Certain: w.Audited.Certain}
	}
	for _, d := range w.DryRun {
		out := authz.DryRun{Allowed: d.Allowed, Match: authz.Match{Policy: d.Policy, Rule: d.Rule, Certain: d.Certain}}
		switch d.Action {
		case authz.ActionAllow.String():
			out.Action = authz.ActionAllow
		case authz.ActionDeny.String():
			out.Action = authz.ActionDeny
		default:
			return r, fmt.Errorf("a dry run is of the action %q", d.Action)
		}
		r.DryRuns = append(r.DryRuns, out)
	}
	for _, a := range w.Providers {
		out := Answer{Provider: a.Provider, Allowed: a.Allowed, Reason: a.Reason}
		if out.Changes, err = a.Changes.read(); err != nil {
			return r, err
		}
		r.Answers = append(r.Answers, out)
	}
	if err := w.Request.read(&r.Request); err != nil {
		return r, err
	}
	if got := r.version(func(c *authz.Changes) authz.Field { return c.Hidden }); int64(*v.Version) < got {
		return r, fmt.Errorf("it is of version %d and says what only version %d can", *v.Version, got)
	}
	return r, nil
}

func (w *wireRequest) read(r *authz.Request) error {
known:
	for _, name := range w.Known {
		for _, f := range fields {
			if f.name == name {
				r.Known |= f.field
				continue known
			}
		}
		return fmt.Errorf("%q is not something that can be known of a request", name)
	}
	r.HTTP, r.Authenticated, r.Principal = w.HTTP, w.Authenticated, w.Principal
	for _, n := range w.OtherNames {
		r.OtherNames = append(r.OtherNames, n)
	}
	r.SourceIP, r.RemoteIP, r.DestinationIP, r.DestinationPort = w.SourceIP.Addr, w.RemoteIP.Addr, w.DestinationIP.Addr, w.DestinationPort
	r.SNI, r.Method, r.Path, r.QueryHidden, r.Host = w.SNI, w.Method, w.Path, w.QueryHidden, w.Host
	var err error
	if r.Headers, err = readHeaders(w.Headers); err != nil {
		return err
	}
	if r.Token, err = w.Token.read(); err != nil {
		return err
	}
	if len(w.Claims) > 0 {
		if r.Claims, err = structure(w.Claims, w.HiddenClaims); err != nil {
			return fmt.Errorf("claims: %w", err)
		}
	} else if len(w.HiddenClaims) > 0 {
		return errors.New("claims are hidden of a token that is not there")
	}
	for filter, fields := range w.Metadata {
		if r.Metadata == nil {
			r.Metadata = make(map[string]*structpb.Struct, len(w.Metadata))
		}
		if r.Metadata[filter], err = structure(fields, w.HiddenMetadata[filter]); err != nil {
			return fmt.Errorf("metadata of %q: %w", filter, err)
		}
	}
	for filter := range w.HiddenMetadata {
		if r.Metadata[filter] == nil {
			return fmt.Errorf("metadata is hidden of the filter %q, which is not there", filter)
		}
	}
	return nil
}

func readHeaders(list []wireHeader) (out []authz.Header, err error) {
headers:
	for _, h := range list {
		header := authz.Header{Name: string(h.Name), Value: h.Value}
		if h.Form != "" {
			for form, name := range forms {
				if name == h.Form {
					header.Form = form
					out = append(out, header)
					continue headers
				}
			}
			return nil, fmt.Errorf("a header is of the form %q", h.Form)
		}
		out = append(out, header)
	}
	return out, nil
}

// read is nil for nil.
func (w *wireChanges) read() (*authz.Changes, error) {
	if w == nil {
		return nil, nil
	}
	headers, err := readHeaders(w.Headers)
	if err != nil {
		return nil, err
	}
	c := &authz.Changes{Names: w.Names, Headers: headers, Method: w.Method, Path: w.Path, QueryHidden: w.QueryHidden, Host: w.Host}
	for _, name := range w.Hidden {
		switch name {
		case "method":
			c.Hidden |= authz.FieldMethod
		case "path":
			c.Hidden |= authz.FieldPath
		case "host":
			c.Hidden |= authz.FieldHost
		default:
			return nil, fmt.Errorf("%q is nothing that changes can hide", name)
		}
	}
	return c, nil
}

// structure reads an object and adds fields whose values are hidden.
func structure(text json.RawMessage, hidden []string) (*structpb.Struct, error) {
	s := &structpb.Struct{}
	if err := protojson.Unmarshal(text, s); err != nil {
		return nil, fmt.Errorf("not an object that a token can have: %w", err)
	}
	for _, k := range hidden {
		if s.Fields[k] != nil {
			return nil, fmt.Errorf("%q is both shown and hidden", k)
		}
		if s.Fields == nil {
			s.Fields = map[string]*structpb.Value{}
		}
		s.Fields[k] = &structpb.Value{}
	}
	return s, nil
}

// Read iterates over the records of a stream of lines. A line that is no record is
// an error that names the line, and reading goes on: a full disk or a crash tears
// lines. An error of the stream itself is the last.
func Read(from io.Reader) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		b := bufio.NewReaderSize(from, 64<<10)
		for n := 1; ; n++ {
			line, err := readLine(b)
			if len(bytes.TrimSpace(line)) > 0 {
				r, bad := Decode(line)
				if bad != nil {
					bad = fmt.Errorf("line %d: %w", n, bad)
				}
				if !yield(r, bad) {
					return
				}
			}
			switch {
			case err == io.EOF:
				return
			case err != nil:
				yield(Record{}, fmt.Errorf("reading decision records: %w", err))
				return
			}
		}
	}
}

// readLine reads a line of any length, and keeps little more than maxLine of it.
func readLine(b *bufio.Reader) (line []byte, err error) {
	for {
		part, err := b.ReadSlice('\n')
		if len(line) <= maxLine {
			line = append(line, part...)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
	}
}
