package main

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// cache is what earlier runs found: a file of lines DIGEST, KEY and why the tests
// failed, or nothing, with tabs between.
type cache struct {
	file   *os.File
	digest string
	// why is that of runs of the very same code and tests.
	why map[string]string
	// survived are the mutants that no test noticed when they were last run.
	survived map[string]bool
}

func openCache(of target) (*cache, error) {
	digest, err := digestOf(append([]string{of.dir, "integration/mutate", "go.mod"}, of.reads...)...)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(os.TempDir(), fmt.Sprintf("signet-mutants-%s-%d", strings.ReplaceAll(of.dir, "/", "-"), os.Getuid())), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	c := &cache{file: f, digest: digest, why: map[string]string{}, survived: map[string]bool{}}
	s := bufio.NewScanner(f)
	for s.Scan() {
		parts := strings.Split(s.Text(), "\t")
		if len(parts) != 3 { // of a run that was killed
			continue
		}
		c.survived[parts[1]] = parts[2] == ""
		if parts[0] == digest {
			c.why[parts[1]] = parts[2]
		}
	}
	return c, s.Err()
}

func (c *cache) add(key, why string) {
	c.why[key] = why
	// What cannot be kept is run again.
	_, _ = fmt.Fprintf(c.file, "%s\t%s\t%s\n", c.digest, key, strings.ReplaceAll(why, "\t", " "))
}

func (c *cache) close() { _ = c.file.Close() }

// digestOf is that of all files at or below some paths, but for other packages below
// them, and for the list of survivors, which says nothing about what survives.
func digestOf(paths ...string) (string, error) {
	h := sha256.New()
	for _, root := range paths {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil || strings.HasPrefix(d.Name(), "survivors"):
				return err
			case d.IsDir():
				code, err := filepath.Glob(filepath.Join(path, "*.go"))
				if path != root && len(code) > 0 {
					return fs.SkipDir
				}
				return err
			}
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			fmt.Fprintln(h, path)
			_, err = io.Copy(h, f)
			return err
		})
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:12]), nil
}
