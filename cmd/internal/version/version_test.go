package version

import (
	"runtime/debug"
	"testing"
)

func TestDescribe(t *testing.T) {
	t.Parallel()
	build := func(version string, settings ...debug.BuildSetting) *debug.BuildInfo {
		return &debug.BuildInfo{GoVersion: "go1.26", Main: debug.Module{Version: version}, Settings: settings}
	}
	revision := debug.BuildSetting{Key: "vcs.revision", Value: "0123456789abcdef0123"}
	modified := debug.BuildSetting{Key: "vcs.modified", Value: "true"}
	for _, tt := range []struct {
		name            string
		release, commit string
		build           *debug.BuildInfo
		want            string
	}{
		{"nothing known is devel", "", "", nil, "devel"},
		{"the linker's stamp is shown", "v1.2.3", "abc", build("(devel)", revision), "v1.2.3 (abc)"},
		{"go install records the module's version", "", "", build("v1.4.0"), "v1.4.0"},
		{"a build in a checkout names the commit", "", "", build("(devel)", revision), "devel (0123456789ab)"},
		{"a build with changes says so", "", "", build("(devel)", modified, revision), "devel (0123456789ab-dirty)"},
		{"a short commit is not cut", "", "", build("", debug.BuildSetting{Key: "vcs.revision", Value: "ab"}), "devel (ab)"},
	} {
		if got := describe(tt.release, tt.commit, tt.build).String(); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}
