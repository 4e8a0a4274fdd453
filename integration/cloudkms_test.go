package integration_test

import (
	"os/exec"
	"testing"
)

// TestCloudKMS runs the tests of the program that opens keys of the clouds, which is a
// module of its own: they build all of it, and let it talk to services that are not
// there.
func TestCloudKMS(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-v", ".")
	cmd.Dir = "../cmd/ca/cloudkms"
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Errorf("go test in cmd/ca/cloudkms: %v", err)
	}
}
