// Package runtest holds what tests of the daemons share.
package runtest

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/identity/attest/attesttest"
)

// KeysAreDocumented fails for each key of a configuration struct that has no row
// in a section of a page, and for each row that has no key.
func KeysAreDocumented(t *testing.T, config any, page, section string) {
	t.Helper()
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), section+"\n")
	if !ok {
		t.Fatalf("%s has no section %q", page, section)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	rows := map[string]bool{}
	for line := range strings.Lines(text) {
		if cell, _, ok := strings.Cut(strings.TrimPrefix(line, "| "), " | "); ok && strings.HasPrefix(cell, "`") {
			for k := range strings.SplitSeq(cell, ", ") {
				rows[strings.Trim(k, "`")] = true
			}
		}
	}
	seen := map[string]bool{}
	keys(reflect.TypeOf(config), "", seen)
	for k := range seen {
		if !rows[k] {
			t.Errorf("%s: %s: key %s has no row", page, section, k)
		}
	}
	for k := range rows {
		if !seen[k] {
			t.Errorf("%s: %s: row %s is no key", page, section, k)
		}
	}
	if len(seen) < 5 {
		t.Errorf("only %d keys were found", len(seen))
	}
}

func keys(t reflect.Type, prefix string, into map[string]bool) {
	for f := range t.Fields() {
		name, option, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		path := prefix + name
		switch {
		case option == "inline":
			keys(f.Type, prefix, into)
		case f.Type.Kind() == reflect.Pointer && f.Type.Elem().Kind() == reflect.Struct:
			keys(f.Type.Elem(), path+".", into)
		case f.Type.Kind() == reflect.Struct:
			keys(f.Type, path+".", into)
		case f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct:
			into[path] = true
			keys(f.Type.Elem(), path+"[].", into)
		default:
			into[path] = true
		}
	}
}

// JWKSFile is a file of an issuer's public keys.
func JWKSFile(t testing.TB) string { return attesttest.NewIssuer(t).JWKSFile() }
