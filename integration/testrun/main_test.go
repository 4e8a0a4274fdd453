package main

import (
	"reflect"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	t.Parallel()
	const (
		pass = `{"Action":"pass","Package":"p","Test":"TestA"}` + "\n"
		sub  = `{"Action":"pass","Package":"p","Test":"TestA/one"}` + "\n"
		ok   = `{"Action":"pass","Package":"p","Elapsed":1}` + "\n"
		bad  = `{"Action":"fail","Package":"p","Elapsed":1}` + "\n"
		none = `{"Action":"skip","Package":"p"}` + "\n"
		skip = `{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:1: no Envoy\n"}` + "\n" +
			`{"Action":"output","Package":"p","Test":"TestB","Output":"--- SKIP: TestB (0.00s)\n"}` + "\n" +
			`{"Action":"skip","Package":"p","Test":"TestB"}` + "\n"
		fail = `{"Action":"output","Package":"p","Test":"TestC","Output":"    c_test.go:1: wrong\n"}` + "\n" +
			`{"Action":"fail","Package":"p","Test":"TestC"}` + "\n"
		build = `{"ImportPath":"p [p.test]","Action":"build-output","Output":"p.go:1: undefined: x\n"}` + "\n" +
			`{"Action":"fail","Package":"p","FailedBuild":"p [p.test]"}` + "\n"
		panics = `{"Action":"output","Package":"p","Output":"panic: oops\n"}` + "\n" + bad
	)
	for _, tt := range []struct {
		name, events string
		ci           bool
		want         string // each line of it is in the output
		err          string
	}{
		{"passes are counted with their subtests", pass + sub + ok, true, "ok\tp\n2 passed, 0 failed, 0 skipped", ""},
		{"a failure is shown and counted once", pass + fail + bad, false, "c_test.go:1: wrong\nFAIL\tp\n1 passed, 1 failed, 0 skipped", "1 failed"},
		{"a skip is shown with its reason", pass + skip + ok, false, "skipped: p TestB: b_test.go:1: no Envoy\n1 passed, 0 failed, 1 skipped", ""},
		{"a skip fails in CI", pass + skip + ok, true, "1 passed, 0 failed, 1 skipped", "1 skipped"},
		{"a package without tests is no skip", pass + ok + none, true, "1 passed, 0 failed, 0 skipped", ""},
		{"a build that fails is a failure", pass + build, false, "p.go:1: undefined: x\n1 passed, 1 failed, 0 skipped", "1 failed"},
		{"a panic outside of a test is a failure", panics, false, "panic: oops\n0 passed, 1 failed, 0 skipped", "1 failed"},
		{"nothing at all is a failure", none, false, "0 passed, 0 failed, 0 skipped", "no test ran"},
		{"a note of a test that passed is shown", `{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:7: note: 12 pairs\n"}` + "\n" + pass + ok, true, "note\t12 pairs\n1 passed", ""},
		{"other lines are shown", "warning\n" + pass + ok, false, "warning\n1 passed", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out strings.Builder
			r := newReport(&out)
			if _, err := r.read(strings.NewReader(tt.events)); err != nil {
				t.Fatal(err)
			}
			err := r.close(tt.ci)
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
			for line := range strings.SplitSeq(tt.want, "\n") {
				if !strings.Contains(out.String(), line) {
					t.Errorf("%q is missing in:\n%s", line, out.String())
				}
			}
		})
	}
}

func TestRunsSideBySide(t *testing.T) {
	t.Parallel()
	got := split([]string{"-race", "./a", "--", "./b", "--", "./c"})
	if want := [][]string{{"-race", "./a"}, {"./b"}, {"./c"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("split into %q, want %q", got, want)
	}
	for _, tt := range []struct {
		name string
		args string
		want string // in the output
		err  string
	}{
		{"both count", "-run ^TestReport$/is . -- -run ^TestReport$/skip .", "skipped", ""},
		{"one that does not know its flags fails", "-run ^TestReport$/is . -- -count=x .", "FAIL\tgo test: ", "1 failed"},
		{"one without tests fails", "-run ^TestReport$/is . -- -run ^$ .", "FAIL\tgo test: no test ran: nice ", "1 failed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out, errs strings.Builder
			err := run(t.Context(), strings.Fields(tt.args), &out, &errs)
			if (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err || !strings.Contains(out.String(), tt.want) {
				t.Errorf("error %v, want %q; printed\n%s\n%s", err, tt.err, out.String(), errs.String())
			}
		})
	}
}
