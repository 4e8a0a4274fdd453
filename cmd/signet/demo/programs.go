package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// envoyVersion is the release that everything is tested with; another release of
// the same minor version will do.
const envoyVersion = "1.40.0"

// programs are the files of what the demo runs.
type programs struct {
	ca, agent, signet, envoy string
}

// findPrograms looks for Signet's programs beside this one, then on PATH, and for
// Envoy.
func findPrograms(ctx context.Context) (p programs, err error) {
	if p.signet, err = os.Executable(); err != nil {
		return p, fmt.Errorf("finding this program: %w", err)
	}
	beside := filepath.Dir(p.signet)
	if p.ca, err = findProgram(beside, "signet-ca"); err != nil {
		return p, err
	}
	if p.agent, err = findProgram(beside, "signet-agent"); err != nil {
		return p, err
	}
	p.envoy, err = findEnvoy(ctx)
	return p, err
}

func findProgram(beside, name string) (string, error) {
	path := filepath.Join(beside, name)
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
		return path, nil
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("finding %s: it is neither in %s nor on PATH; run `make build`", name, beside)
	}
	return path, nil
}

// findEnvoy looks where `make tools` looks and puts it: $ENVOY, which may be of
// any version, PATH, and the user's cache folder.
func findEnvoy(ctx context.Context) (string, error) {
	if path := os.Getenv("ENVOY"); path != "" {
		if _, err := askEnvoy(ctx, path); err != nil {
			return "", fmt.Errorf("finding Envoy: $ENVOY: %w; unset it or point it to an Envoy %s", err, envoyVersion)
		}
		return path, nil
	}
	var tried []error
	candidates := []string{"envoy"}
	if cache, err := os.UserCacheDir(); err == nil {
		candidates = append(candidates, filepath.Join(cache, "signet", "tools", "envoy-"+envoyVersion, "envoy"))
	}
	minor := envoyVersion[:strings.LastIndexByte(envoyVersion, '.')+1]
	for _, c := range candidates {
		path, err := exec.LookPath(c)
		if err != nil {
			tried = append(tried, err)
			continue
		}
		version, err := askEnvoy(ctx, path)
		switch {
		case err != nil:
			tried = append(tried, err)
		case !strings.HasPrefix(version, minor):
			tried = append(tried, fmt.Errorf("%s is Envoy %s", path, version))
		default:
			return path, nil
		}
	}
	return "", fmt.Errorf("finding Envoy %s: there is none; run `make tools`, or set ENVOY to one: %w", envoyVersion, errors.Join(tried...))
}

// askEnvoy is the version that a program says it is, in Envoy's form: "PATH
// version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL".
func askEnvoy(ctx context.Context, path string) (string, error) {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("running %s --version: %w", path, err)
	}
	_, after, _ := strings.Cut(string(out), "version: ")
	parts := strings.Split(after, "/")
	if len(parts) < 2 {
		return "", fmt.Errorf("%s --version does not say an Envoy version: %.80q", path, out)
	}
	return parts[1], nil
}
