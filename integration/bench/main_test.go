package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	t.Parallel()
	got, err := parse(strings.NewReader(`goos: linux
goarch: amd64
pkg: github.com/signet-mesh/signet/authz
cpu: a cpu
BenchmarkDecide/policies=100-2         	 1000000	      1042.5 ns/op	       0 B/op	       0 allocs/op
BenchmarkDecide/policies=100-2         	 1000000	      2000 ns/op	       8 B/op	       1 allocs/op
BenchmarkDecide/name-with-dash-2       	       1	         5 ns/op
PASS
ok  	github.com/signet-mesh/signet/authz	1.2s
pkg: github.com/signet-mesh/signet/identity/attest
BenchmarkFirstSecret
    attest_test.go:5: a log
BenchmarkFirstSecret-2 	      10	 1.5e+06 ns/op	        12.50 ms/first-secret
PASS
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []metric{
		{"authz.Decide/name-with-dash", 5, "ns/op"},
		{"authz.Decide/policies=100", 0, "B/op"},
		{"authz.Decide/policies=100", 0, "allocs/op"},
		{"authz.Decide/policies=100", 1042.5, "ns/op"},
		{"identity/attest.FirstSecret", 12.5, "ms/first-secret"},
		{"identity/attest.FirstSecret", 1.5e6, "ns/op"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, err := parse(strings.NewReader("BenchmarkX-2 1 fast ns/op\n")); err == nil {
		t.Error("a value that is no number was taken")
	}
}

func TestCompare(t *testing.T) {
	t.Parallel()
	got := compare([]metric{
		{"peers.Engines/engine=signet/policies=10/hit", 50, "ns/op"},
		{"peers.Engines/engine=signet/policies=10/hit", 0, "B/op"},
		{"peers.Engines/engine=other/policies=10/hit", 125, "ns/op"},
		{"peers.Engines/engine=other/policies=10/hit", 7, "B/op"},
		{"peers.Engines/engine=other/policies=20/hit", 125, "ns/op"},
		{"authz.Decide/policies=10", 40, "ns/op"},
	})
	if diff := cmp.Diff([]metric{{"peers.Engines/engine=other/policies=10/hit", 2.5, "x-signet"}}, got); diff != "" {
		t.Error(diff)
	}
}
