package parts

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// Tools returns the folder that holds the programs of the tools module in dir
// (buf, staticcheck, protoc-gen-go, protoc-gen-go-grpc), building them if that
// module, at these versions and with this Go, was not built before.
func Tools(ctx context.Context, dir string, progress io.Writer) (Part, error) {
	cache, err := cacheDir()
	if err != nil {
		return Part{}, err
	}
	key := sha256.New()
	fmt.Fprintln(key, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	for _, name := range []string{"go.mod", "go.sum"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return Part{}, fmt.Errorf("reading the tools module: %w", err)
		}
		key.Write(b)
	}
	version := fmt.Sprintf("%x", key.Sum(nil)[:6])
	target := filepath.Join(cache, "go-"+version)
	if _, err := os.Stat(target); err == nil {
		return Part{"go tools", version, target, "cache"}, nil
	}
	fmt.Fprintln(progress, "building buf and staticcheck (once for each version)")
	if err := buildTools(ctx, dir, target); err != nil {
		return Part{}, fmt.Errorf("building the tools module %s: %w", dir, err)
	}
	return Part{"go tools", version, target, "built"}, nil
}

func buildTools(ctx context.Context, dir, target string) error {
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(target), "build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	// One folder deeper, so that its mode is the umask's and not MkdirTemp's 0700.
	out := filepath.Join(tmp, "bin")
	if err := os.Mkdir(out, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", out+string(filepath.Separator), "tool")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off", "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, b)
	}
	err = os.Rename(out, target)
	if errors.Is(err, fs.ErrExist) { // another run was faster
		return nil
	}
	return err
}
