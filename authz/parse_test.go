package authz_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-mesh/signet/authz"
)

const head = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"

// TestParseProblems reads texts that are wrong in one way each.
func TestParseProblems(t *testing.T) {
	t.Parallel()
	policy := func(spec string) string { return head + "metadata: {name: p}\nspec: " + spec + "\n" }
	rule := func(r string) string { return policy("{rules: [" + r + "]}") }
	when := func(w string) string { return rule("{when: [" + w + "]}") }
	const p = "f:4: AuthorizationPolicy default/p: "
	long := strings.Repeat("x", 321)
	for name, c := range map[string]struct {
		text string
		want string // problems, without what to do; "unreadable " in front where no name was read
	}{
		"no YAML":                        {"a: [", "unreadable f:1: document cannot be read: did not find expected node content"},
		"tabs":                           {"a:\n\tb: c", "unreadable f:2: document cannot be read: found character that cannot start any token"},
		"not UTF-8":                      {"a: \xff", "unreadable f: is not UTF-8 text"},
		"a scalar":                       {"hello", "unreadable f:1: document is not an object"},
		"a list":                         {"- a", "unreadable f:1: document is not an object"},
		"no kind":                        {"apiVersion: security.istio.io/v1\nmetadata: {name: p}", "unreadable f:1: document has no apiVersion or no kind"},
		"a kind that is no string":       {"apiVersion: security.istio.io/v1\nkind: 1", "unreadable f:1: document has no apiVersion or no kind"},
		"no name":                        {head + "metadata: {generateName: x}", `unreadable f:3: "AuthorizationPolicy" has no name or no namespace that is a string`},
		"a repeated name":                {head + "metadata: {name: p, name: q}", "unreadable f:3: document has the same key more than once in itself or in its metadata"},
		"a repeated kind":                {head + "kind: AuthorizationPolicy\nmetadata: {name: p}", "unreadable f:4: document has the same key more than once in itself or in its metadata"},
		"two documents in one":           {policy("{}") + "...\n" + policy("{}"), "unreadable f:1: document cannot be read: more than one document without a line --- between them"},
		"two documents by odd line ends": {"a: b\r---\rc: d", "unreadable f:1: document cannot be read: more than one document without a line --- between them"},
		"deep nesting":                   {policy("{rules: " + strings.Repeat("[", 70) + strings.Repeat("]", 70) + "}"), "unreadable f:1: document cannot be read: nested deeper than 64"},
		"a bomb of aliases":              {bomb(), "unreadable f:1: document cannot be read: more than 262144 values"},
		"a list in a List":               {"apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: List\n  items: []", "unreadable f:6: List has no list of items, or is itself in a List"},
		"a List without items":           {"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicyList", "unreadable f:1: List has no list of items, or is itself in a List"},

		"an unknown field on top":        {head + "metadata: {name: p}\nspecs: {}", p + "specs: unknown field"},
		"a name of upper case":           {head + "metadata: {name: P}", `f:3: AuthorizationPolicy default/P: metadata.name: "P" is no name that Kubernetes accepts`},
		"a namespace with a dot":         {head + "metadata: {name: p, namespace: a.b}", `f:3: AuthorizationPolicy a.b/p: metadata.namespace: "a.b" is no namespace that Kubernetes accepts`},
		"unknown metadata":               {head + "metadata: {name: p, label: {}}", "f:3: AuthorizationPolicy default/p: metadata.label: unknown field"},
		"a label that is no string":      {head + "metadata: {name: p, labels: {a: yes}}", "f:3: AuthorizationPolicy default/p: metadata.labels[a]: is not a string"},
		"a time that is none":            {head + "metadata: {name: p, creationTimestamp: yesterday}", "f:3: AuthorizationPolicy default/p: metadata.creationTimestamp: is not a time"},
		"spec that is a list":            {policy("[]"), p + "spec: must be an object, is a list"},
		"a rule that is null":            {policy("{rules: [null]}"), p + "spec.rules[0]: must be an object, is null"},
		"an action that there is not":    {policy("{action: ALOW}"), p + `spec.action: "ALOW" is no such value`},
		"a merge of an unknown field":    {policy("{selector: &s {matchLabels: {a: b}}, rules: [{<<: *s}]}"), p + "spec.rules[0].matchLabels: unknown field"},
		"a merge of a key that is there": {policy("{rules: [&r {to: [{operation: {methods: [GET]}}]}, {<<: *r, to: []}]}"), p + "spec.rules[1]: has the same key more than once"},
		"a repeated field":               {policy("{rules: [], rules: [{}]}"), p + "spec: has the same key more than once"},
		"a repeated label":               {policy("{selector: {matchLabels: {a: b, a: c}}}"), p + "spec.selector.matchLabels: has the same key more than once"},
		"a repeated annotation":          {head + "metadata: {name: p, annotations: {a: b, 'a': c}}", "f:3: AuthorizationPolicy default/p: metadata.annotations: has the same key more than once"},
		"a label that YAML thinks true":  {policy("{selector: {matchLabels: {a: on}}}"), p + "spec.selector.matchLabels[a]: must be a string, is true or false"},
		"an empty label name":            {policy("{selector: {matchLabels: {'': x}}}"), p + "spec.selector.matchLabels: has a label without a name"},
		"a label too long":               {policy("{selector: {matchLabels: {a: " + long + "}}}"), p + "spec.selector.matchLabels[a]: is longer than 63 characters"},
		"a provider without CUSTOM":      {policy("{provider: {name: x}, rules: [{}]}"), p + "spec.provider: only a CUSTOM policy has a provider"},
		"dry run of nothing":             {head + "metadata: {name: p, annotations: {istio.io/dry-run: maybe}}", `f:3: AuthorizationPolicy default/p: metadata.annotations[istio.io/dry-run]: "maybe" is not a boolean`},
		"too many rules":                 {policy("{rules: [" + strings.Repeat("{},", 513) + "]}"), p + "spec.rules: has 513 items, at most 512 are accepted"},
		"a path with a brace":            {rule("{to: [{operation: {paths: ['/{x}']}}]}"), p + `spec.rules[0].to[0].operation.paths[0]: "/{x}" has a brace that is no {*} or {**} of its own segment`},
		"a template beside a star":       {rule("{to: [{operation: {notPaths: ['/{*}/*']}}]}"), p + `spec.rules[0].to[0].operation.notPaths[0]: "/{*}/*" has a template beside a segment that is empty or not of the characters of a URL path`},
		"control characters in a field":  {policy(`{"a\nb": 1}`), p + `spec."a\nb": unknown field`},

		"CUSTOM without a provider": {policy("{action: CUSTOM, rules: [{}]}"), p + "spec.provider.name: a CUSTOM policy needs a provider"},
		"CUSTOM with principals": {policy("{action: CUSTOM, provider: {name: x}, rules: [{from: [{source: {principals: [a]}}]}]}"),
			p + "spec.rules[0].from[0].source.principals: is not accepted in CUSTOM policies"},
		"selector and targetRefs": {policy("{selector: {}, targetRefs: [{kind: Service, name: x}]}"),
			p + "spec: only one of selector, targetRef and targetRefs can be set"},
		"a target of another kind":           {policy("{targetRef: {kind: Pod, name: x}}"), p + `spec.targetRef: "core/Pod" is no kind that can be a target`},
		"serviceAccounts beside principals":  {rule("{from: [{source: {serviceAccounts: [a], principals: [b]}}]}"), p + "spec.rules[0].from[0].source: serviceAccounts cannot be combined with principals or namespaces"},
		"a service account with two slashes": {rule("{from: [{source: {serviceAccounts: [a/b/c]}}]}"), p + `spec.rules[0].from[0].source.serviceAccounts[0]: "a/b/c" is neither NAME nor NAMESPACE/NAME`},
		"a trust domain with a star inside":  {rule("{from: [{source: {trustDomains: ['a*b']}}]}"), p + `spec.rules[0].from[0].source.trustDomains[0]: "a*b" may have one * at its start or end`},
		"a condition on nothing":             {when("{values: [a]}"), p + "spec.rules[0].when[0].key: must be set"},
		"a condition without values":         {when("{key: source.ip}"), p + "spec.rules[0].when[0]: has neither values nor notValues"},
		"a condition that there is not":      {when("{key: 'destination.labels[x]', values: [a]}"), p + `spec.rules[0].when[0].key: "destination.labels[x]" is no attribute that conditions can read`},
		"a condition with an empty name":     {when("{key: 'request.headers[]', values: [a]}"), p + `spec.rules[0].when[0].key: "request.headers[]" has no name in brackets`},
		"a condition with a bad value":       {when("{key: destination.port, values: [http]}"), p + `spec.rules[0].when[0].values[0]: "http" is not a port from 0 to 65535`},

		"a RequestAuthentication without an issuer": {"apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: p}\nspec: {jwtRules: [{}]}\n",
			"f:4: RequestAuthentication default/p: spec.jwtRules[0]: has neither issuer nor jwksUri"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rs, problems := authz.Parse("f", []byte(c.text))
			if len(rs) != 1 || rs[0].Reason() == "" {
				t.Fatalf("resources %v", rs)
			}
			var got []string
			for _, p := range problems {
				if p.Fix == "" || p.Severity != authz.SeverityError {
					t.Errorf("problem without a fix, or no error: %+v", p)
				}
				line := strings.TrimSuffix(p.Error(), "; "+p.Fix)
				if p.Reason == authz.ReasonUnreadable {
					line = "unreadable " + line
				}
				got = append(got, line)
			}
			if want := strings.Split(c.want, "\n"); !strings.HasPrefix(strings.Join(got, "\n"), c.want) || len(got) != len(want) {
				t.Errorf("problems (-want +got):\n%s", cmp.Diff(want, got))
			}
			reason := authz.ReasonInvalid
			if strings.HasPrefix(c.want, "unreadable ") {
				reason = authz.ReasonUnreadable
			}
			if rs[0].Reason() != reason {
				t.Errorf("reason %q, want %q", rs[0].Reason(), reason)
			}
		})
	}
}

// bomb is ten levels of ten aliases each.
func bomb() string {
	var b strings.Builder
	b.WriteString("a0: &a0 [x]\n")
	for i := range 10 {
		fmt.Fprintf(&b, "a%d: &a%d [%s]\n", i+1, i+1, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d, ", i), 10), ", "))
	}
	return b.String()
}

func TestParseReadsWhatKubectlReads(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"a byte order mark":      "\ufeff" + head + "metadata: {name: p}\n",
		"CRLF":                   strings.ReplaceAll("---\n"+head+"metadata: {name: p}\n---\n", "\n", "\r\n"),
		"comments and blanks":    "# one\n\n--- # two\n# three\n---\n" + head + "metadata: {name: p}\n---\n\n...\n",
		"content after dashes":   `--- {apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p}}`,
		"a directive":            "%YAML 1.1\n---\n" + head + "metadata: {name: p}\n",
		"aliases":                head + "metadata: {name: p}\nspec: {rules: [{to: [{operation: {paths: &x [/a]}}, {operation: {notPaths: *x}}]}]}\n",
		"JSON":                   `{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"name":"p"}}`,
		"what kubectl get gives": head + "metadata:\n  name: p\n  creationTimestamp: null\n  annotations: null\n  ownerReferences: [{apiVersion: v1}]\nstatus: {anything: [1]}\n",
		"merges":                 head + "metadata: {name: p}\nspec: {rules: [&r {to: [{operation: {methods: [GET]}}]}, {<<: *r, from: [{source: &s {namespaces: [a]}}, {source: {<<: [*s, {principals: [b]}]}}]}]}\n",
		"nulls":                  head + "metadata: {name: p, namespace: null, labels: null}\nspec: {selector: null, action: null, rules: [{from: null, to: [{operation: {paths: null, methods: [GET]}}]}]}\n",
		"a spec that is null":    head + "metadata: {name: p}\nspec:\n",
		"an empty namespace":     head + "metadata: {name: p, namespace: ''}\n",
		"a List":                 "apiVersion: v1\nkind: List\nmetadata: {resourceVersion: ''}\nitems:\n- apiVersion: security.istio.io/v1beta1\n  kind: AuthorizationPolicy\n  metadata: {name: p}\n",
		"a list of the group":    "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicyList\nitems:\n- apiVersion: security.istio.io/v1\n  kind: AuthorizationPolicy\n  metadata: {name: p}\n",
		"three dashes in a text": head + "metadata:\n  name: p\n  annotations:\n    a: |\n      ---\n      b\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rs, problems := authz.Parse("f", []byte(text))
			if len(rs) != 1 || len(problems) != 0 || rs[0].String() != "AuthorizationPolicy default/p" || rs[0].Reason() != "" {
				t.Fatalf("resources %v, problems %v", rs, problems)
			}
		})
	}
}

func TestParseIsBounded(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		text string
		want string
	}{
		"a large document":  {head + "metadata: {name: p, annotations: {a: " + strings.Repeat("x", 2<<20) + "}}", "document is larger than 2 MiB"},
		"many documents":    {"{apiVersion: v1, kind: List, items: [" + strings.Repeat("{},", 65_000) + "]}\n---\n{apiVersion: v1, kind: List, items: [" + strings.Repeat("{},", 600) + "]}", "more than 65536 documents"},
		"many bad values":   {head + "metadata: {name: p}\nspec: {rules: [{to: [{operation: {ports: [" + strings.Repeat("x,", 1000) + "]}}]}]}", `"x" is not a port from 0 to 65535`},
		"a large file":      {strings.Repeat("#\n", 33<<20), "is larger than 64 MiB"},
		"a name of 1 MB":    {head + "metadata: {name: " + strings.Repeat("x", 1<<20) + "}", "is no name that Kubernetes accepts"},
		"a field of 1 MB":   {head + "metadata: {name: p}\nspec: {? " + strings.Repeat("x", 1<<20) + " : 1}", "unknown field"},
		"one deep document": {strings.Repeat("[", 1<<20), "exceeded max depth"},
	} {
		t.Run(name, func(t *testing.T) {
			rs, problems := authz.Parse("f", []byte(c.text))
			if len(problems) == 0 || !strings.Contains(problems[len(problems)-1].Message, c.want) {
				t.Fatalf("%d problems, the last %+.300v", len(problems), problems[max(0, len(problems)-1):])
			}
			if rs[len(rs)-1].Reason() == "" {
				t.Error("the resource is good")
			}
			total := 0
			for _, p := range problems[:min(len(problems), 1000)] {
				total += len(p.Error())
			}
			if total > 500_000 {
				t.Errorf("problems of %d bytes", total)
			}
		})
	}
}
