package ca_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/signet-mesh/signet/storage"
)

func mkdir(t testing.TB, dir string, mode os.FileMode) {
	t.Helper()
	if err := os.Mkdir(dir, mode); err != nil {
		t.Fatal(err)
	}
}

func deleteKey(t testing.TB, s storage.Store, key string) error {
	t.Helper()
	_, err := s.Commit(t.Context(), nil, []storage.Op{{Key: key, Delete: true}})
	return err
}

// copyTree reads the files of one folder.
func copyTree(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for _, e := range must(os.ReadDir(dir)) {
		out[e.Name()] = must(os.ReadFile(filepath.Join(dir, e.Name())))
	}
	return out
}

// restoreTree makes a folder hold exactly those files.
func restoreTree(t testing.TB, files map[string][]byte, dir string) {
	t.Helper()
	for _, e := range must(os.ReadDir(dir)) {
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
