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

// goModule is a module of its own below integration/, and what of it is built.
type goModule struct {
	name     string // of its folder in the cache, without the key
	title    string // for people
	dir      string
	packages []string
	output   string // the program's name; empty: several, each by its own
	ldflags  string
}

// key changes with whatever could change the programs: the module's versions, its
// own sources, how they are built, and Go.
func (m goModule) key() (string, error) {
	key := sha256.New()
	fmt.Fprintln(key, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	sources, err := filepath.Glob(filepath.Join(m.dir, "*.go"))
	if err != nil {
		return "", err
	}
	for _, file := range append([]string{filepath.Join(m.dir, "go.mod"), filepath.Join(m.dir, "go.sum")}, sources...) {
		b, err := os.ReadFile(file)
		if err != nil {
			return "", fmt.Errorf("reading the module of %s: %w", m.title, err)
		}
		key.Write(b)
	}
	if m.ldflags != "" {
		fmt.Fprintln(key, m.ldflags)
	}
	return fmt.Sprintf("%x", key.Sum(nil)[:6]), nil
}

// target is the folder of the programs in the cache; it need not exist.
func (m goModule) target() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	key, err := m.key()
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, m.name+"-"+key), nil
}

func (m goModule) find() (string, error) {
	target, err := m.target()
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(target); err != nil {
		return "", fmt.Errorf("finding %s: %w at %s; run `make tools`", m.title, ErrMissing, target)
	}
	return target, nil
}

// build returns the folder of the programs and where they came from.
func (m goModule) build(ctx context.Context, progress io.Writer) (target, origin string, err error) {
	if target, err = m.find(); err == nil {
		return target, "cache", nil
	} else if !errors.Is(err, ErrMissing) {
		return "", "", err
	}
	if target, err = m.target(); err != nil {
		return "", "", err
	}
	fmt.Fprintf(progress, "building %s, once for each version\n", m.title)
	if err := m.compile(ctx, target); err != nil {
		return "", "", fmt.Errorf("building %s in %s: %w", m.title, m.dir, err)
	}
	return target, "built", nil
}

func (m goModule) compile(ctx context.Context, target string) error {
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
	args := []string{"build", "-trimpath", "-o", filepath.Join(out, m.output)}
	if m.output == "" {
		args[3] = out + string(filepath.Separator)
	}
	if m.ldflags != "" {
		args = append(args, "-ldflags", m.ldflags)
	}
	cmd := exec.CommandContext(ctx, "go", append(args, m.packages...)...)
	cmd.Dir = m.dir
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
