package authz

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// This file is the schemas of Istio's custom resource definitions, by which the
// API server takes a resource or refuses it before any webhook is asked. A test
// holds them against the definitions that istio.io/api ships.

// form is what a value must be.
type form uint8

const (
	formObject form = iota
	formMap         // an object with free keys
	formList
	formString
	formBool
)

// schema is one node of a structural schema.
type schema struct {
	form     form
	fields   map[string]*schema // of an object
	required []string
	items    *schema // of a list and a map
	// minSize and maxSize bound a string in characters, a list in items and a map
	// in entries; 0 is no bound.
	minSize, maxSize int
	enum             []string
	pattern          *regexp.Regexp
	// portKeys says that the keys are ports.
	portKeys bool
}

func objectOf(fields map[string]*schema, required ...string) *schema {
	return &schema{form: formObject, fields: fields, required: required}
}
func listOf(items *schema) *schema   { return &schema{form: formList, items: items} }
func oneOf(values ...string) *schema { return &schema{form: formString, enum: values} }
func (s *schema) min(n int) *schema  { s.minSize = n; return s }
func (s *schema) max(n int) *schema  { s.maxSize = n; return s }
func (s *schema) like(p string) *schema {
	s.pattern = regexp.MustCompile(p)
	return s
}

func stringOf() *schema { return &schema{form: formString} }
func filled() *schema   { return stringOf().min(1) }

// schemas are the specifications by kind.
var schemas = map[string]*schema{
	KindAuthorizationPolicy: objectOf(map[string]*schema{
		"selector":   selectorSchema(),
		"targetRef":  targetRefSchema(),
		"targetRefs": listOf(targetRefSchema()).max(16),
		"action":     oneOf("ALLOW", "DENY", "AUDIT", "CUSTOM"),
		"provider":   objectOf(map[string]*schema{"name": stringOf()}),
		"rules": listOf(objectOf(map[string]*schema{
			"from": listOf(objectOf(map[string]*schema{"source": objectOf(map[string]*schema{
				"principals": listOf(stringOf()), "notPrincipals": listOf(stringOf()),
				"requestPrincipals": listOf(stringOf()), "notRequestPrincipals": listOf(stringOf()),
				"namespaces": listOf(stringOf()), "notNamespaces": listOf(stringOf()),
				"serviceAccounts":    listOf(stringOf().max(320)).max(16),
				"notServiceAccounts": listOf(stringOf().max(320)).max(16),
				"ipBlocks":           listOf(stringOf()), "notIpBlocks": listOf(stringOf()),
				"remoteIpBlocks": listOf(stringOf()), "notRemoteIpBlocks": listOf(stringOf()),
				"trustDomains": listOf(stringOf()), "notTrustDomains": listOf(stringOf()),
			})})).max(512),
			"to": listOf(objectOf(map[string]*schema{"operation": objectOf(map[string]*schema{
				"hosts": listOf(stringOf()), "notHosts": listOf(stringOf()),
				"ports": listOf(stringOf()), "notPorts": listOf(stringOf()),
				"methods": listOf(stringOf()), "notMethods": listOf(stringOf()),
				"paths": listOf(stringOf()), "notPaths": listOf(stringOf()),
			})})),
			"when": listOf(objectOf(map[string]*schema{
				"key": stringOf(), "values": listOf(stringOf()), "notValues": listOf(stringOf()),
			}, "key")),
		})).max(512),
	}),
	KindPeerAuthentication: objectOf(map[string]*schema{
		"selector":      selectorSchema(),
		"mtls":          mtlsSchema(),
		"portLevelMtls": {form: formMap, items: mtlsSchema(), minSize: 1, portKeys: true},
	}),
	KindRequestAuthentication: objectOf(map[string]*schema{
		"selector":   selectorSchema(),
		"targetRef":  targetRefSchema(),
		"targetRefs": listOf(targetRefSchema()).max(16),
		"jwtRules": listOf(objectOf(map[string]*schema{
			"issuer":      filled(),
			"audiences":   listOf(filled()),
			"jwksUri":     filled().max(2048),
			"jwks_uri":    filled().max(2048),
			"jwks":        stringOf(),
			"fromHeaders": listOf(objectOf(map[string]*schema{"name": filled(), "prefix": stringOf()}, "name")),
			"fromParams":  listOf(filled()),
			"fromCookies": listOf(filled()),
			"outputClaimToHeaders": listOf(objectOf(map[string]*schema{
				"header": filled().like(`^[-_A-Za-z0-9]+$`), "claim": filled(),
			}, "header", "claim")),
			"outputPayloadToHeader": stringOf(),
			"forwardOriginalToken":  {form: formBool},
			"spaceDelimitedClaims":  listOf(filled()).max(64),
			"timeout":               stringOf(),
		})).max(4096),
	}),
}

func selectorSchema() *schema {
	return objectOf(map[string]*schema{"matchLabels": {form: formMap, items: stringOf().max(63), maxSize: 4096}})
}

func targetRefSchema() *schema {
	return objectOf(map[string]*schema{
		"group":     stringOf().max(253).like(`^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`),
		"kind":      filled().max(63).like(`^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$`),
		"name":      filled().max(253),
		"namespace": stringOf(),
	}, "kind", "name")
}

func mtlsSchema() *schema {
	return objectOf(map[string]*schema{"mode": oneOf("UNSET", "DISABLE", "PERMISSIVE", "STRICT")})
}

// conform holds a value against a schema and removes what the API server
// removes: fields that are null. It refuses keys that are there twice.
func (r *report) conform(value any, s *schema, path string) {
	switch s.form {
	case formObject, formMap:
		object, ok := value.(map[string]any)
		if !ok {
			r.invalid(path, "write its fields", "must be an object, is %s", typeName(value))
			return
		}
		r.sameSize(len(object), path)
		r.conformObject(object, s, path)
	case formList:
		list, ok := value.([]any)
		if !ok {
			r.invalid(path, "write it as a list", "must be a list, is %s", typeName(value))
			return
		}
		if s.maxSize > 0 && len(list) > s.maxSize {
			r.invalid(path, "split it", "has %d items, at most %d are accepted", len(list), s.maxSize)
		}
		for i, e := range list {
			r.conform(e, s.items, fmt.Sprintf("%s[%d]", path, i))
		}
	case formString:
		if v, ok := value.(string); ok {
			r.conformString(v, s, path)
		} else {
			r.invalid(path, "quote it", "must be a string, is %s", typeName(value))
		}
	case formBool:
		if _, ok := value.(bool); !ok {
			r.invalid(path, "write true or false", "must be true or false, is %s", typeName(value))
		}
	}
}

func (r *report) conformObject(object map[string]any, s *schema, path string) {
	for _, name := range sorted(object) {
		at, field := fieldPath(path, name), s.fields[name]
		if s.form == formMap {
			at, field = keyPath(path, name), s.items
			if n, err := strconv.ParseUint(name, 10, 16); s.portKeys && (err != nil || n == 0 || strconv.FormatUint(n, 10) != name) {
				r.invalid(at, "write a port from 1 to 65535", "%s is not a port", clip(name))
				continue
			}
		}
		switch v := object[name]; {
		case field == nil:
			r.invalid(at, "remove it or correct its spelling", "unknown field")
		case v == nil:
			r.warn("null-field", at, "remove it, or write the value", "null is read as if the field were not there")
			delete(object, name)
		default:
			r.conform(v, field, at)
		}
	}
	for _, name := range s.required {
		if _, ok := object[name]; !ok {
			r.invalid(fieldPath(path, name), "write it", "must be set")
		}
	}
	if s.form == formMap && len(object) < s.minSize {
		r.invalid(path, "write an entry or remove it", "must not be empty")
	}
	if s.maxSize > 0 && len(object) > s.maxSize {
		r.invalid(path, "remove some", "has %d entries, at most %d are accepted", len(object), s.maxSize)
	}
}

func (r *report) conformString(v string, s *schema, path string) {
	n := utf8.RuneCountInString(v)
	switch {
	case s.enum != nil && !slices.Contains(s.enum, v):
		r.invalid(path, "write one of "+strings.Join(s.enum, ", "), "%s is no such value", clip(v))
	case n < s.minSize:
		r.invalid(path, "write a value or remove it", "must not be empty")
	case s.maxSize > 0 && n > s.maxSize:
		r.invalid(path, "shorten it", "is longer than %d characters", s.maxSize)
	case s.pattern != nil && !s.pattern.MatchString(v):
		r.invalid(path, "correct the value", "%s does not have the form %s", clip(v), s.pattern)
	}
}

// sameSize refuses an object with repeated keys.
func (r *report) sameSize(n int, path string) {
	if r.at.repeated(n, path) {
		r.invalid(path, "write each key once", "has the same key more than once")
	}
}

// fieldPath is the path of a field, which may have a name that no field has.
func fieldPath(path, name string) string {
	if path != "" {
		path += "."
	}
	return path + plain(name)
}

// keyPath is the path of a map's entry.
func keyPath(path, name string) string { return path + "[" + plain(name) + "]" }

// plain is the name as it is if it can stand in a path.
func plain(name string) string {
	for i := range len(name) {
		if c := name[i]; c <= ' ' || c >= 0x7f || c == '"' {
			return clip(name)
		}
	}
	if len(name) > 317 { // the longest name of a label or an annotation
		return clip(name)
	}
	return name
}

func typeName(v any) string {
	switch v.(type) {
	case nil:
		return "null"
	case map[string]any:
		return "an object"
	case []any:
		return "a list"
	case string:
		return "a string"
	case bool:
		return "true or false"
	}
	return "a number"
}
