// Package version says which build of Signet this is, the same way for all of
// its programs.
//
// # Trust
//
// The version is for people and logs. Nothing may be decided by it.
package version

import "runtime/debug"

// Stamped by the linker: -X …/version.release=v1.2.3 -X …/version.commit=0123abc.
var release, commit string

// Info is what is known of a build.
type Info struct {
	// Version is the release, such as v1.2.3, or "devel".
	Version string `json:"version"`
	// Commit is the source's commit, with "-dirty" after it if the tree had
	// changes; empty if unknown.
	Commit string `json:"commit,omitempty"`
	// Go is the version of Go that built it.
	Go string `json:"go"`
}

// Current describes the running program: what the linker stamped, else what the
// go command recorded, else "devel".
func Current() Info {
	build, _ := debug.ReadBuildInfo()
	return describe(release, commit, build)
}

// String is Version, and Commit in parentheses if it is known.
func (i Info) String() string {
	if i.Commit == "" {
		return i.Version
	}
	return i.Version + " (" + i.Commit + ")"
}

func describe(release, commit string, build *debug.BuildInfo) Info {
	i := Info{Version: release, Commit: commit}
	if build != nil {
		i.Go = build.GoVersion
		if i.Version == "" && build.Main.Version != "(devel)" {
			i.Version = build.Main.Version
		}
		if i.Commit == "" {
			i.Commit = recordedCommit(build)
		}
	}
	if i.Version == "" {
		i.Version = "devel"
	}
	return i
}

func recordedCommit(build *debug.BuildInfo) string {
	var commit, suffix string
	for _, s := range build.Settings {
		switch {
		case s.Key == "vcs.revision":
			commit = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			suffix = "-dirty"
		}
	}
	if commit == "" {
		return ""
	}
	return commit[:min(12, len(commit))] + suffix
}
