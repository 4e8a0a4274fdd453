//go:build !race

// See rotate_nodes_test.go for why not with -race.

package ca_test

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestReplicasUnderLostAnswers: any commit of a rotation, of a request to the root and of
// a revocation can end without an answer. What comes of it is one state, whole, in which
// a sequence never meant two things, and all goes on.
func TestReplicasUnderLostAnswers(t *testing.T) {
	t.Parallel()
	most := 14
	if testing.Short() {
		most = 3
	}
	hits := map[string]int{}
	for n := range most {
		for _, landed := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				hits[underALostAnswer(t, newShared(t), 20*time.Second, n, landed)]++
			})
			if t.Failed() {
				t.Fatalf("commit %d, landed: %v", n, landed)
			}
		}
	}
	t.Logf("note: commits that had no answer: %v", hits)
}
