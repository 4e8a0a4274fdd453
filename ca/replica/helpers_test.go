package replica_test

import (
	"os"
	"testing"
)

// privateDir is a temporary folder with the mode that storage asks for.
func privateDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}
