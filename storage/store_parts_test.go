package storage_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/signet-mesh/signet/storage"
)

// TestParts cuts ops of random number and length: each part is one that a Commit takes,
// together they are all of them in their order, and none could have held more.
func TestParts(t *testing.T) {
	t.Parallel()
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		var ops []storage.Op
		longest := []int{0, 10, 1 << 10, 20 << 10, storage.MaxValue}[r.IntN(5)]
		for i := range r.IntN(400) {
			ops = append(ops, storage.Op{Key: fmt.Sprintf("key/%d", i), Value: bytes.Repeat([]byte{1}, r.IntN(longest+1))})
		}
		size := func(ops []storage.Op) (n int) {
			for _, o := range ops {
				n += len(o.Key) + len(o.Value)
			}
			return n
		}
		var parts [][]storage.Op
		n := 0
		for part := range storage.Parts(ops) {
			if err := storage.CheckCommit(nil, part); err != nil || len(part) == 0 {
				t.Fatalf("seed %d: a part of %d: %v", seed, len(part), err)
			}
			for i, o := range part {
				if o.Key != ops[n+i].Key {
					t.Fatalf("seed %d: %s comes where %s belongs", seed, o.Key, ops[n+i].Key)
				}
			}
			n += len(part)
			if i := len(parts); i > 0 && len(parts[i-1]) < storage.MaxOps && size(parts[i-1])+size(part[:1]) <= storage.MaxCommit {
				t.Errorf("seed %d: part %d is shorter than it could be", seed, i)
			}
			parts = append(parts, part)
		}
		if n != len(ops) {
			t.Fatalf("seed %d: %d of %d ops", seed, n, len(ops))
		}
	}
	for part := range storage.Parts(make([]storage.Op, 300)) {
		if len(part) != storage.MaxOps {
			t.Errorf("%d ops", len(part))
		}
		break // who stops is asked no more
	}
}
