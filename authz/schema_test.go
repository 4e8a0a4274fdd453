package authz

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// definition is what is used of a structural schema.
type definition struct {
	Type                 string                 `json:"type"`
	Properties           map[string]*definition `json:"properties"`
	AdditionalProperties *definition            `json:"additionalProperties"`
	Items                *definition            `json:"items"`
	Required             []string               `json:"required"`
	Enum                 []string               `json:"enum"`
	Pattern              string                 `json:"pattern"`
	MinLength            int                    `json:"minLength"`
	MaxLength            int                    `json:"maxLength"`
	MinItems             int                    `json:"minItems"`
	MaxItems             int                    `json:"maxItems"`
	MinProperties        int                    `json:"minProperties"`
	MaxProperties        int                    `json:"maxProperties"`
	Nullable             bool                   `json:"nullable"`
	Default              any                    `json:"default"`
	Rules                []struct {
		Rule string `json:"rule"`
	} `json:"x-kubernetes-validations"`
}

// celRules are the rules of the definitions, each carried out in validate.go or
// object.go. A rule that is new here, or gone, needs a look there.
var celRules = []string{
	`!self.contains("*")`,
	`(has(self.jwksUri) ? 1 : 0) + (has(self.jwks_uri) ? 1 : 0) + (has(self.jwks) ? 1 : 0) <= 1`,
	`(has(self.selector) ? 1 : 0) + (has(self.targetRef) ? 1 : 0) + (has(self.targetRefs) ? 1 : 0) <= 1`,
	`(has(self.serviceAccounts) || has(self.notServiceAccounts)) ? (!has(self.principals) && !has(self.notPrincipals) && !has(self.namespaces) && !has(self.notNamespaces)) : true`,
	`duration(self) >= duration('1ms')`,
	`has(self.portLevelMtls) ? (((has(self.selector) && has(self.selector.matchLabels)) ? self.selector.matchLabels : {}).size() > 0) : true`,
	`self.all(key, !key.contains("*"))`,
	`self.all(key, 0 < int(key) && int(key) <= 65535)`,
	`self.all(key, key.size() != 0)`,
	`self.size() == 0`,
	`url(self).getScheme() in ["http", "https"]`,
}

// TestSchemasAreIstios holds the schemas against the definitions that the module of
// the Istio API ships, in every version that is served.
func TestSchemasAreIstios(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "istio.io/api").Output()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "kubernetes", "customresourcedefinitions.gen.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	rules, seen := map[string]bool{}, map[string]int{}
	for doc := range strings.SplitSeq(string(text), "\n---\n") {
		var crd struct {
			Spec struct {
				Group    string
				Names    struct{ Kind string }
				Versions []struct {
					Name   string
					Served bool
					Schema struct{ OpenAPIV3Schema definition }
				}
			}
		}
		if err := yaml.Unmarshal([]byte(doc), &crd); err != nil {
			t.Fatal(err)
		}
		if crd.Spec.Group != group {
			continue
		}
		for _, v := range crd.Spec.Versions {
			if !v.Served {
				continue
			}
			if v.Name != "v1" && v.Name != "v1beta1" {
				t.Errorf("%s: version %s is served", crd.Spec.Names.Kind, v.Name)
			}
			seen[crd.Spec.Names.Kind]++
			compare(t, crd.Spec.Names.Kind, schemas[crd.Spec.Names.Kind], v.Schema.OpenAPIV3Schema.Properties["spec"], rules)
		}
	}
	if want := map[string]int{KindAuthorizationPolicy: 2, KindPeerAuthentication: 2, KindRequestAuthentication: 2}; !maps.Equal(seen, want) {
		t.Errorf("definitions of %v, want %v", seen, want)
	}
	if got := slices.Sorted(maps.Keys(rules)); !slices.Equal(got, celRules) {
		t.Errorf("rules of the definitions:\n%s", strings.Join(got, "\n"))
	}
}

func compare(t *testing.T, path string, s *schema, d *definition, rules map[string]bool) {
	t.Helper()
	if s == nil || d == nil {
		t.Errorf("%s: only one of the two has it", path)
		return
	}
	if d.Nullable || d.Default != nil {
		t.Errorf("%s: nullable or with a default, which conform does not know", path)
	}
	for _, r := range d.Rules {
		rules[strings.Join(strings.Fields(r.Rule), " ")] = true
	}
	form := map[string]form{"object": formObject, "array": formList, "string": formString, "boolean": formBool}[d.Type]
	if d.AdditionalProperties != nil {
		form = formMap
	}
	required := slices.Sorted(slices.Values(s.required))
	slices.Sort(d.Required)
	pattern := ""
	if s.pattern != nil {
		pattern = s.pattern.String()
	}
	got := fmt.Sprint(s.form, required, s.enum, pattern, s.minSize, s.maxSize)
	want := fmt.Sprint(form, d.Required, d.Enum, d.Pattern, d.MinLength+d.MinItems+d.MinProperties, d.MaxLength+d.MaxItems+d.MaxProperties)
	if got != want {
		t.Errorf("%s: %s, the definition has %s", path, got, want)
	}
	for name := range s.fields {
		if d.Properties[name] == nil {
			t.Errorf("%s.%s: not in the definition", path, name)
		}
	}
	for name, p := range d.Properties {
		compare(t, path+"."+name, s.fields[name], p, rules)
	}
	items := d.Items
	if d.AdditionalProperties != nil {
		items = d.AdditionalProperties
	}
	if s.items != nil || items != nil {
		compare(t, path+"[]", s.items, items, rules)
	}
}
