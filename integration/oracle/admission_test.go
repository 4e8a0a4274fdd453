package oracle_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/authz"
)

// TestAdmissionRefusesWhatIstioRefuses gives each resource to the CRD schemas and
// the webhook of Istio, and to Parse: an error of reason invalid or unreadable is
// a refusal. It is one of Istio's refusals, or none.
func TestAdmissionRefusesWhatIstioRefuses(t *testing.T) {
	t.Parallel()
	cases := admissionCases(t)
	gate := startIstio(t)
	accepted := 0
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			want := gate.admit(t, c.text)
			if want.Accepted {
				accepted++
			}
			got := refusals(c.text)
			switch {
			case want.Accepted && len(got) > 0:
				t.Errorf("Istio accepts, authz refuses: %v\n%s", got, c.text)
			case !want.Accepted && len(got) == 0:
				t.Errorf("Istio refuses (%s: %s), authz accepts\n%s", want.By, want.Message, c.text)
			}
		})
	}
	t.Logf("note: admission: %d resources: Istio accepted %d and refused %d", len(cases), accepted, len(cases)-accepted)
	if len(cases) < 150 || accepted < 40 || len(cases)-accepted < 80 {
		t.Errorf("%d resources, %d accepted: too few of one kind to show agreement", len(cases), accepted)
	}
}

// refusals are the problems for which authz refuses a resource as such.
func refusals(text string) (list []string) {
	_, problems := authz.Parse("case", []byte(text))
	for _, p := range problems {
		if p.Severity == authz.SeverityError && (p.Reason == authz.ReasonInvalid || p.Reason == authz.ReasonUnreadable) {
			list = append(list, p.Error())
		}
	}
	return list
}

// TestTheListsOfAdmissionAreIstios asks again about the lists that package authz is
// tested with: a line "+ RESOURCE" is accepted, "- RESOURCE" refused. The list of
// Kubernetes holds what a cluster refuses without asking Istio.
func TestTheListsOfAdmissionAreIstios(t *testing.T) {
	t.Parallel()
	gate := startIstio(t)
	files, err := filepath.Glob("../../authz/testdata/admission/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no lists: %v", err)
	}
	total := 0
	for _, file := range files {
		kind, ok := map[string]string{
			"authorizationpolicy.txt": authz.KindAuthorizationPolicy, "peerauthentication.txt": authz.KindPeerAuthentication,
			"requestauthentication.txt": authz.KindRequestAuthentication, "documents.txt": "",
		}[filepath.Base(file)]
		if !ok && filepath.Base(file) != "kubernetes.txt" {
			t.Errorf("%s: a list of unknown kind", file)
		}
		if !ok {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for line := range strings.Lines(string(b)) {
			n++
			sign, document, ok := strings.Cut(strings.TrimSpace(line), " ")
			if !ok || sign == "#" {
				continue
			}
			total++
			if kind != "" {
				document = "{apiVersion: security.istio.io/v1, kind: " + kind + ", metadata: {name: p}, spec: " + document + "}"
			}
			if got := gate.admit(t, document); got.Accepted != (sign == "+") {
				t.Errorf("%s:%d: Istio accepts: %t (%s): %s", file, n, got.Accepted, got.Message, line)
			}
		}
	}
	t.Logf("%d resources", total)
	if total < 150 {
		t.Errorf("only %d resources", total)
	}
}

type admissionCase struct{ name, text string }

// admissionCases reads testdata/admission.txt: a line "# NAME" begins a case, the
// next lines are it. What begins with "spec:" is an AuthorizationPolicy, "pa:" and
// "ra:" are the specs of the two others; what has a kind is whole. <<x*N>> stands
// for N times x.
func admissionCases(t *testing.T) (cases []admissionCase) {
	b, err := os.ReadFile("testdata/admission.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range strings.Split("\n"+string(b), "\n# ")[1:] {
		name, text, _ := strings.Cut(part, "\n")
		for {
			before, rest, ok := strings.Cut(text, "<<")
			if !ok {
				break
			}
			what, after, _ := strings.Cut(rest, ">>")
			i := strings.LastIndexByte(what, '*')
			var n int
			if _, err := fmt.Sscan(what[i+1:], &n); err != nil {
				t.Fatalf("case %s: %v", name, err)
			}
			text = before + strings.Repeat(what[:i], n) + after
		}
		head := func(kind string) string {
			return "apiVersion: security.istio.io/v1\nkind: " + kind + "\nmetadata: {name: x, namespace: a}\n"
		}
		switch {
		case strings.HasPrefix(text, "spec:"):
			text = head("AuthorizationPolicy") + text
		case strings.HasPrefix(text, "pa:"):
			text = head("PeerAuthentication") + "spec:" + strings.TrimPrefix(text, "pa:")
		case strings.HasPrefix(text, "ra:"):
			text = head("RequestAuthentication") + "spec:" + strings.TrimPrefix(text, "ra:")
		}
		cases = append(cases, admissionCase{strings.TrimSpace(name), text})
	}
	return cases
}
