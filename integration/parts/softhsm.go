package parts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// softHSMPackages are Debian's, in the order that makes no difference.
var softHSMPackages = []string{"softhsm2", "libsofthsm2", "softhsm2-common"}

// softHSMSHA256 are hashes of packages that Signet was tested with, Debian 12 on
// x86-64. A package of another release is not here: apt has checked it against the
// signed index of its distribution, as it does with all.
var softHSMSHA256 = map[string]string{
	"softhsm2_2.6.1-2.1_amd64.deb":        "10bf00517295d1da6229684a73fbf90d64841d0a8df69517dc0004586720d04e",
	"libsofthsm2_2.6.1-2.1_amd64.deb":     "8c29aa37b082c2904d5ff8c65432e6b018929687400854dbeafd1c2a787d3508",
	"softhsm2-common_2.6.1-2.1_amd64.deb": "28f74f1a22478a81f6b47860124f64a18eb97b6d12cb76950dbdb9add24d77aa",
}

// SoftHSM is SoftHSM 2, a PKCS#11 token in software. Path is softhsm2-util.
type SoftHSM struct {
	Part
	// Module is the PKCS#11 module.
	Module string
}

// FindSoftHSM looks for SoftHSM where a distribution installs it, and in the cache.
// The error wraps [ErrMissing] if there is none.
func FindSoftHSM(ctx context.Context) (SoftHSM, error) {
	if util, err := exec.LookPath("softhsm2-util"); err == nil {
		if s, err := softHSM(ctx, util, "/", "PATH"); err == nil {
			return s, nil
		}
	}
	dir, err := softHSMDir()
	if err != nil {
		return SoftHSM{}, err
	}
	util := filepath.Join(dir, "usr", "bin", "softhsm2-util")
	if _, err := os.Stat(util); err != nil {
		return SoftHSM{}, fmt.Errorf("finding SoftHSM 2: %w on PATH or at %s; run `make tools`", ErrMissing, dir)
	}
	return softHSM(ctx, util, dir, "cache")
}

// FetchSoftHSM is [FindSoftHSM], and where there is none downloads Debian's packages
// with apt-get and unpacks them into the cache. It needs no privilege and installs
// nothing.
func FetchSoftHSM(ctx context.Context, progress io.Writer) (SoftHSM, error) {
	s, err := FindSoftHSM(ctx)
	if !errors.Is(err, ErrMissing) {
		return s, err
	}
	for _, tool := range []string{"apt-get", "dpkg"} {
		if _, err := exec.LookPath(tool); err != nil {
			return SoftHSM{}, fmt.Errorf("fetching SoftHSM 2: there is no %s here; install SoftHSM 2 (softhsm2-util and libsofthsm2.so) with this system's package manager", tool)
		}
	}
	dir, err := softHSMDir()
	if err != nil {
		return SoftHSM{}, err
	}
	fmt.Fprintln(progress, "fetching SoftHSM 2 (500 kB) with apt-get")
	if err := downloadSoftHSM(ctx, dir); err != nil {
		return SoftHSM{}, fmt.Errorf("fetching SoftHSM 2: %w", err)
	}
	return softHSM(ctx, filepath.Join(dir, "usr", "bin", "softhsm2-util"), dir, "downloaded")
}

func softHSMDir() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, "softhsm2"), nil
}

// softHSM asks the program for its version, which shows that it runs, and looks for
// the module below root.
func softHSM(ctx context.Context, util, root, origin string) (SoftHSM, error) {
	out, err := exec.CommandContext(ctx, util, "--version").Output()
	if err != nil {
		return SoftHSM{}, fmt.Errorf("running %s --version: %w", util, err)
	}
	for _, pattern := range []string{"usr/lib/*/softhsm/libsofthsm2.so", "usr/lib/softhsm/libsofthsm2.so", "usr/lib64/softhsm/libsofthsm2.so", "usr/lib64/pkcs11/libsofthsm2.so", "usr/local/lib/softhsm/libsofthsm2.so"} {
		if found, _ := filepath.Glob(filepath.Join(root, pattern)); len(found) > 0 {
			return SoftHSM{Part{"softhsm2", strings.TrimSpace(string(out)), util, origin}, found[0]}, nil
		}
	}
	return SoftHSM{}, fmt.Errorf("finding SoftHSM 2: %w: there is %s, but no libsofthsm2.so below %s", ErrMissing, util, root)
}

// downloadSoftHSM puts the unpacked packages at dir, whole or not at all.
func downloadSoftHSM(ctx context.Context, dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "softhsm2-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	run := func(args ...string) error {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Dir = tmp
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	download := func(options ...string) error {
		return run(slices.Concat([]string{"apt-get"}, options, []string{"download"}, softHSMPackages)...)
	}
	if err := download(); err != nil {
		// A fresh container knows no package. Indexes of its own need no privilege.
		var own []string
		for _, d := range []string{"lists", "cache", "state"} {
			if err := os.MkdirAll(filepath.Join(tmp, "apt", d, "partial"), 0o755); err != nil {
				return err
			}
		}
		own = append(own, "-o", "Dir::State::lists="+filepath.Join(tmp, "apt", "lists"), "-o", "Dir::Cache="+filepath.Join(tmp, "apt", "cache"))
		if err := run(slices.Concat([]string{"apt-get"}, own, []string{"-q", "update"})...); err != nil {
			return fmt.Errorf("%w\nCheck that apt-get reaches a mirror, or install the package softhsm2", err)
		}
		if err := download(own...); err != nil {
			return err
		}
	}
	packages, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(packages) != len(softHSMPackages) {
		return fmt.Errorf("apt-get left %d packages, want %d", len(packages), len(softHSMPackages))
	}
	root := filepath.Join(tmp, "root")
	for _, p := range packages {
		if want, ok := softHSMSHA256[filepath.Base(p)]; ok {
			if err := checkSHA256(p, want); err != nil {
				return err
			}
		}
		if err := run("dpkg", "-x", p, root); err != nil {
			return err
		}
	}
	// One that does not run, and was found missing, makes room.
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	err = os.Rename(root, dir)
	if errors.Is(err, os.ErrExist) { // another run was faster
		return nil
	}
	return err
}
