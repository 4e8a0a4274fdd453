package authz_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/authz"
)

// TestAdmission holds what is refused against lists of resources that Istio's own
// admission was asked about; a test below integration asks it again.
func TestAdmission(t *testing.T) {
	t.Parallel()
	kinds := map[string]string{
		"authorizationpolicy": authz.KindAuthorizationPolicy, "peerauthentication": authz.KindPeerAuthentication,
		"requestauthentication": authz.KindRequestAuthentication, "documents": "", "kubernetes": "",
	}
	files, err := filepath.Glob("testdata/admission/*.txt")
	if err != nil || len(files) != len(kinds) {
		t.Fatalf("files %v: %v", files, err)
	}
	total := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for line := range strings.Lines(string(text)) {
			n++
			sign, document, ok := strings.Cut(strings.TrimSpace(line), " ")
			if !ok || sign == "#" {
				continue
			}
			total++
			if kind := kinds[strings.TrimSuffix(filepath.Base(file), ".txt")]; kind != "" {
				document = "{apiVersion: security.istio.io/v1, kind: " + kind + ", metadata: {name: p}, spec: " + document + "}"
			}
			rs, problems := authz.Parse(file, []byte(document))
			if len(rs) != 1 {
				t.Fatalf("%s:%d: %d resources", file, n, len(rs))
			}
			refused := rs[0].Reason() == authz.ReasonInvalid
			if rs[0].Reason() == authz.ReasonUnreadable || refused != (sign == "-") {
				t.Errorf("%s:%d: reason %q of %s: %v", file, n, rs[0].Reason(), line, problems)
			}
		}
	}
	if total < 150 {
		t.Errorf("only %d resources", total)
	}
	t.Logf("%d resources", total)
}
