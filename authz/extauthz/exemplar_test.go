package extauthz_test

import (
	"net/netip"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/signet-mesh/signet/authz/extauthz"
)

// TestDenialsHaveExemplars: the time of a denial leads to its request, by what can
// be nothing but an identifier.
func TestDenialsHaveExemplars(t *testing.T) {
	t.Parallel()
	const trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	for _, tt := range []struct {
		name    string
		headers []string
		want    string
	}{
		{"a trace", []string{"x-request-id", "r-1", "traceparent", "00-" + trace + "-00f067aa0ba902b7-01"}, "trace_id " + trace},
		{"an identifier", []string{"x-request-id", "r-1"}, "request_id r-1"},
		{"a trace of zeros", []string{"traceparent", "00-" + strings.Repeat("0", 32) + "-00f067aa0ba902b7-01", "x-request-id", "r-1"}, "request_id r-1"},
		{"a trace that is none", []string{"traceparent", "00-" + strings.ToUpper(trace) + "-00f067aa0ba902b7-01"}, ""},
		{"a trace that is short", []string{"traceparent", "00-" + trace}, ""},
		{"an identifier that is long", []string{"x-request-id", strings.Repeat("x", 65)}, ""},
		{"an identifier with a line in it", []string{"x-request-id", "a\nb"}, ""},
		{"an identifier of other bytes", []string{"x-request-id", "\xff"}, ""},
		{"nothing", nil, ""},
	} {
		w := newWorldWith(t, extauthz.Config{Snapshot: fixed(compile(t, "")), Providers: nil})
		w.checkDenied(tt.headers)
		all, err := w.reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, f := range all {
			if f.GetName() != "signet_extauthz_check_seconds" {
				continue
			}
			for _, b := range f.GetMetric()[0].GetHistogram().GetBucket() {
				for _, l := range b.GetExemplar().GetLabel() {
					got = append(got, l.GetName()+" "+l.GetValue())
				}
			}
		}
		if strings.Join(got, ", ") != tt.want {
			t.Errorf("%s: %v; want %q", tt.name, got, tt.want)
		}
	}
}

// checkDenied has a request denied that has those headers: its destination is another
// pod's.
func (w *world) checkDenied(headers []string) {
	w.t.Helper()
	pod := server
	pod.Addresses = []netip.Addr{netip.MustParseAddr("10.0.0.9")}
	w.denyTo(pod, check(func(a *authv3.AttributeContext) {
		for i := 0; i < len(headers); i += 2 {
			a.Request.Http.HeaderMap.Headers = append(a.Request.Http.HeaderMap.Headers, &corev3.HeaderValue{Key: headers[i], RawValue: []byte(headers[i+1])})
		}
	}), extauthz.ReasonDestination)
}
