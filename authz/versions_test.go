package authz_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// TestWhatChangedBetweenEnvoys holds each release that brought a change, and the
// one before it, against what the change is about.
func TestWhatChangedBetweenEnvoys(t *testing.T) {
	t.Parallel()
	decide := func(version, spec string, r authz.Request) bool {
		t.Helper()
		o := naiveOptions
		if version != "" {
			var err error
			if o.Envoy, err = authz.ParseEnvoyVersion(version); err != nil {
				t.Fatal(err)
			}
		}
		rs, _ := authz.Parse("v", []byte(policyYAML("p", spec)))
		set, _ := authz.Set{}.Update(rs)
		snapshot, _ := authz.Compile(set, o)
		r.Known, r.HTTP = authz.FieldsHTTP, true
		return snapshot.For(identity.Workload{Namespace: "default"}).Decide(&r).Allowed
	}
	const admin = "{action: DENY, rules: [{when: [{key: 'request.headers[x-role]', values: [admin]}]}]}"
	const joined = "{action: DENY, rules: [{when: [{key: 'request.headers[x-role]', values: ['user,admin']}]}]}"
	twice := authz.Request{Headers: []authz.Header{{Name: "x-role", Value: []byte("user")}, {Name: "x-other", Value: []byte("x")}, {Name: "x-role", Value: []byte("admin")}}}
	unclear := authz.Request{Headers: []authz.Header{{Name: "x-role", Value: []byte("user")}, {Name: "x-role", Value: []byte("?"), Form: authz.HeaderUnclear}}}
	for version, alone := range map[string]bool{
		"": true, "1.40": true, "1.38.0": true, "1.37.1": true, "1.37.0": false, "1.36.5": true, "1.36.4": false, "1.35.8": true, "1.35.7": false,
		"1.34.13": true, "1.34.12": false, "1.33.99": false, "1.30.0": false, "2.0": true, "0.9": false,
	} {
		if denied := !decide(version, admin, twice); denied != alone {
			t.Errorf("Envoy %q looks at each value of a header by itself: %t, want %t", version, denied, alone)
		}
		if denied := !decide(version, joined, twice); denied == alone {
			t.Errorf("Envoy %q looks at the values of a header joined: %t, want %t", version, denied, !alone)
		}
		// What is unclear may match, whatever the version.
		if decide(version, admin, unclear) {
			t.Errorf("Envoy %q: a value that is not known does not deny", version)
		}
		if !decide(version, admin, authz.Request{Headers: []authz.Header{{Name: "x-role", Value: []byte("user")}}}) {
			t.Errorf("Envoy %q: one other value denies", version)
		}
	}
	const template = "{action: DENY, rules: [{to: [{operation: {paths: ['/a/{*}']}}]}]}"
	for version, star := range map[string]bool{
		"": true, "1.34.1": true, "1.34.0": false, "1.33.3": true, "1.33.2": false, "1.32.6": true, "1.32.5": false, "1.31.8": true, "1.31.7": false, "1.30.99": false, "1.35.0": true,
	} {
		if denied := !decide(version, template, authz.Request{Path: []byte("/a/x*y")}); denied != star {
			t.Errorf("Envoy %q takes a star in a segment: %t, want %t", version, denied, star)
		}
		if decide(version, template, authz.Request{Path: []byte("/a/xy")}) {
			t.Errorf("Envoy %q does not match a plain segment", version)
		}
	}
	for _, bad := range []string{"1", "1.2.3.4", "v1.40", "1.x", "1.40.70000", "", "1..2", "-1.2"} {
		if v, err := authz.ParseEnvoyVersion(bad); err == nil {
			t.Errorf("ParseEnvoyVersion(%q) = %v", bad, v)
		}
	}
	for text, want := range map[string]authz.EnvoyVersion{"1.40": {1, 40, 0}, "1.40.3": {1, 40, 3}, "0.65535.65535": {0, 65535, 65535}} {
		if v, err := authz.ParseEnvoyVersion(text); err != nil || v != want {
			t.Errorf("ParseEnvoyVersion(%q) = %v, %v", text, v, err)
		}
	}
}

// TestListsOfEveryLengthAreSearchedWhole holds each value of lists of up to forty,
// which are searched in other ways the longer they are, and its neighbours.
func TestListsOfEveryLengthAreSearchedWhole(t *testing.T) {
	t.Parallel()
	for _, f := range []struct {
		place, field string
		value        func(i int) string
		request      func(i int) authz.Request
	}{
		{"operation", "ports", func(i int) string { return fmt.Sprint(1000 + 7*i) }, func(i int) authz.Request { return authz.Request{DestinationPort: uint16(1000 + 7*i)} }},
		{"operation", "paths", func(i int) string { return fmt.Sprintf("/p%d/q", i) }, func(i int) authz.Request { return authz.Request{Path: fmt.Appendf(nil, "/p%d/q?x", i)} }},
		{"operation", "paths", func(i int) string { return fmt.Sprintf("/p%d/*", i) }, func(i int) authz.Request { return authz.Request{Path: fmt.Appendf(nil, "/p%d/q", i)} }},
		{"operation", "paths", func(i int) string { return fmt.Sprintf("*/q%d", i) }, func(i int) authz.Request { return authz.Request{Path: fmt.Appendf(nil, "/p/q%d", i)} }},
		{"operation", "paths", func(i int) string { return fmt.Sprintf("/p%d/{**}/z", i) }, func(i int) authz.Request { return authz.Request{Path: fmt.Appendf(nil, "/p%d/q/r/z", i)} }},
		{"operation", "hosts", func(i int) string { return fmt.Sprintf("H%d.example", i) }, func(i int) authz.Request { return authz.Request{Host: fmt.Appendf(nil, "h%d.EXAMPLE", i)} }},
		{"operation", "hosts", func(i int) string { return fmt.Sprintf("*.h%d", i) }, func(i int) authz.Request { return authz.Request{Host: fmt.Appendf(nil, "x.h%d", i)} }},
		{"operation", "methods", func(i int) string { return fmt.Sprintf("M%d", i) }, func(i int) authz.Request { return authz.Request{Method: fmt.Appendf(nil, "M%d", i)} }},
		{"source", "principals", func(i int) string { return fmt.Sprintf("own.td/ns/n/sa/s%d", i) }, func(i int) authz.Request {
			return authz.Request{Authenticated: true, Principal: fmt.Appendf(nil, "spiffe://old.td/ns/n/sa/s%d", i)}
		}},
		{"source", "principals", func(i int) string { return fmt.Sprintf("*/sa/s%d", i) }, func(i int) authz.Request {
			return authz.Request{Authenticated: true, Principal: fmt.Appendf(nil, "spiffe://x/sa/s%d", i)}
		}},
		{"source", "namespaces", func(i int) string { return fmt.Sprintf("n%d", i) }, func(i int) authz.Request {
			return authz.Request{Authenticated: true, Principal: []byte("x"), OtherNames: [][]byte{fmt.Appendf(nil, "spiffe://x/ns/n%d/sa/s", i)}}
		}},
	} {
		for n := 1; n <= 40; n += 1 + n/10 {
			var values []string
			for i := range n {
				values = append(values, fmt.Sprintf("%q", f.value(i)))
			}
			clause := map[string]string{"operation": "to", "source": "from"}[f.place]
			spec := fmt.Sprintf("{action: DENY, rules: [{%s: [{%s: {%s: [%s]}}]}]}", clause, f.place, f.field, strings.Join(values, ", "))
			rs, problems := authz.Parse("v", []byte(policyYAML("p", spec)))
			set, _ := authz.Set{}.Update(rs)
			snapshot, _ := authz.Compile(set, naiveOptions)
			program := snapshot.For(identity.Workload{Namespace: "default"})
			for i := range n + 2 {
				r := f.request(i)
				r.Known, r.HTTP = authz.FieldsHTTP, true
				if d := program.Decide(&r); d.Allowed != (i >= n) {
					t.Fatalf("%s with %d values such as %s, value %d: %s %v", f.field, n, values[0], i, d.Reason, problems)
				}
			}
		}
	}
}
