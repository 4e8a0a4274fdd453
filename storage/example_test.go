package storage_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/signet-mesh/signet/storage"
)

func Example() {
	dir, err := os.MkdirTemp("", "") // mode 0700
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()

	// State: what was decided, by compare-and-swap.
	store, err := storage.OpenBolt(filepath.Join(dir, "state.db"), storage.BoltOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	created, err := store.Commit(ctx,
		[]storage.Cond{{Key: "journal/root"}}, // must not exist
		[]storage.Op{{Key: "journal/root", Value: []byte("prepared")}})
	if err != nil {
		log.Fatal(err)
	}
	_, err = store.Commit(ctx,
		[]storage.Cond{{Key: "journal/root", Revision: created}},
		[]storage.Op{{Key: "journal/root", Value: []byte("published")}})
	fmt.Println("changed:", err)
	_, err = store.Commit(ctx,
		[]storage.Cond{{Key: "journal/root", Revision: created}},
		[]storage.Op{{Key: "journal/root", Value: []byte("active")}})
	fmt.Println("changed by somebody else in between:", errors.Is(err, storage.ErrConflict))

	// Log: what is about to be signed.
	issued, err := storage.OpenLog(filepath.Join(dir, "log"), storage.LogOptions{Instance: 1})
	if err != nil {
		log.Fatal(err)
	}
	defer issued.Close()
	last, err := issued.Append(ctx, [][]byte{[]byte("a leaf"), []byte("another leaf")})
	if err != nil {
		log.Fatal(err) // nothing may be signed
	}
	fmt.Println("durable up to", last)
	for r, err := range issued.Scan(ctx, 1) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%d %s\n", r.Sequence, r.Data)
	}
	// Output:
	// changed: <nil>
	// changed by somebody else in between: true
	// durable up to 2
	// 1 a leaf
	// 2 another leaf
}
