package oracle_test

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestAMillionPairsAgreeWithTheNaiveEvaluator runs the whole of package authz's
// comparison, in a program of its own: under the race detector it would take ten
// times as long, and nothing in it is about races.
func TestAMillionPairsAgreeWithTheNaiveEvaluator(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes a minute")
	}
	cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-v", "-timeout", "15m", "-run", "^TestDecideAgreesWithTheNaiveEvaluator$", "./authz", "-million")
	cmd.Dir = "../.."
	// It makes many small values and keeps none: a heap that is collected at 4 MB is
	// collected all the time.
	cmd.Env = append(os.Environ(), "GOGC=1000")
	out, err := cmd.CombinedOutput()
	notes := 0
	for line := range strings.Lines(string(out)) {
		if _, note, ok := strings.Cut(line, " note: "); ok {
			notes++
			t.Logf("note: %s", strings.TrimRight(note, "\n"))
		}
	}
	if err != nil {
		t.Errorf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, tail(out, 8<<10))
	} else if notes < 100 || !bytes.Contains(out, []byte("pairs of policies and requests agree")) {
		t.Errorf("it passed and has no table:\n%s", tail(out, 2<<10))
	}
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }
