package authz

import (
	"fmt"
	"strconv"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// schema holds a value against the message that Istio's custom resource
// definition was generated from: unknown fields, null and values of another
// type are refused. protojson alone would take null, numbers for enums and the
// protobuf spelling of names, which Kubernetes does not.
func (r *report) schema(value any, md protoreflect.MessageDescriptor, path string) {
	if wellKnown(md) {
		return // protojson knows their forms
	}
	object, ok := value.(map[string]any)
	if !ok {
		r.invalid(path, "write its fields", "must be an object, is %s", typeName(value))
		return
	}
	r.sameSize(len(object), path)
	for _, name := range sorted(object) {
		at := fieldPath(path, name)
		fd := md.Fields().ByJSONName(name)
		if fd == nil {
			r.invalid(at, "remove it or correct its spelling", "unknown field")
			continue
		}
		switch v := object[name]; {
		case fd.IsMap():
			r.schemaMap(v, fd, at)
		case fd.IsList():
			list, ok := v.([]any)
			if !ok {
				r.invalid(at, "write it as a list", "must be a list, is %s", typeName(v))
				continue
			}
			for i, e := range list {
				r.scalar(e, fd, fmt.Sprintf("%s[%d]", at, i))
			}
		default:
			r.scalar(v, fd, at)
		}
	}
}

func (r *report) schemaMap(value any, fd protoreflect.FieldDescriptor, path string) {
	object, ok := value.(map[string]any)
	if !ok {
		r.invalid(path, "write its fields", "must be an object, is %s", typeName(value))
		return
	}
	r.sameSize(len(object), path)
	for _, name := range sorted(object) {
		at := keyPath(path, name)
		if fd.MapKey().Kind() == protoreflect.Uint32Kind {
			if n, err := strconv.ParseUint(name, 10, 32); err != nil || strconv.FormatUint(n, 10) != name {
				r.invalid(at, "write a port number", "is not a number")
				continue
			}
		}
		r.scalar(object[name], fd.MapValue(), at)
	}
}

// scalar checks one value of a field, which may be a message after all.
func (r *report) scalar(value any, fd protoreflect.FieldDescriptor, path string) {
	switch fd.Kind() {
	case protoreflect.MessageKind:
		r.schema(value, fd.Message(), path)
	case protoreflect.StringKind:
		if _, ok := value.(string); !ok {
			r.invalid(path, "quote it", "must be a string, is %s", typeName(value))
		}
	case protoreflect.EnumKind:
		s, ok := value.(string)
		if !ok {
			r.invalid(path, "write its name", "must be a string, is %s", typeName(value))
		} else if fd.Enum().Values().ByName(protoreflect.Name(s)) == nil {
			r.invalid(path, "write one of "+enumNames(fd.Enum()), "%s is no such value", clip(s))
		}
	case protoreflect.BoolKind:
		if _, ok := value.(bool); !ok {
			r.invalid(path, "write true or false", "must be true or false, is %s", typeName(value))
		}
	}
}

// sameSize refuses an object with repeated keys.
func (r *report) sameSize(n int, path string) {
	if r.at.repeated(n, path) {
		r.invalid(path, "write each key out, and once", "has a merge (<<) or the same key more than once")
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

func wellKnown(md protoreflect.MessageDescriptor) bool {
	return md.FullName().Parent() == "google.protobuf"
}

func enumNames(ed protoreflect.EnumDescriptor) string {
	var s string
	for i := range ed.Values().Len() {
		if i > 0 {
			s += ", "
		}
		s += string(ed.Values().Get(i).Name())
	}
	return s
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
