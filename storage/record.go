package storage

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
)

// Rest is what a record, which is a JSON object, says beyond what its reader knows:
// members that a later version of the program has added without a new version of the
// format. Whoever changes a record puts them back, so that programs of two versions can
// change one state. It is comparable; the zero value says nothing.
type Rest string

// ParseRecord reads a record into v, a pointer to a struct with names for all of its
// fields, and returns the rest of it.
func ParseRecord(record []byte, v any) (Rest, error) {
	d := json.NewDecoder(bytes.NewReader(record))
	d.DisallowUnknownFields()
	to := reflect.ValueOf(v).Elem()
	if d.Decode(v) == nil {
		if _, err := d.Token(); err == io.EOF {
			return "", nil // nearly always
		}
	}
	to.SetZero()
	if err := json.Unmarshal(record, v); err != nil {
		return "", err
	}
	rest, err := restOf(to.Type(), record)
	if err != nil {
		return "", fmt.Errorf("reading what is not known of it: %w", err)
	}
	return Rest(rest), nil
}

// ParseVersioned reads a record that carries the version of its format, of which this
// build reads those from 1 to newest; a newer one wraps ErrNewerFormat. Whoever changes
// the record writes it with its rest.
func ParseVersioned[T any](record []byte, newest int, version func(T) int) (v T, rest Rest, err error) {
	if rest, err = ParseRecord(record, &v); err != nil {
		return v, "", err
	}
	if n := version(v); n > newest || n < 1 {
		return v, "", fmt.Errorf("%w: version %d, this build reads up to %d", ErrNewerFormat, n, newest)
	}
	return v, rest, nil
}

// EncodeRecord is v, a struct, as a record that takes the place of the one with that rest.
// What a member says that v does not have any more goes with it; an element of a list
// keeps its rest if nothing else of it has changed.
func EncodeRecord(v any, rest Rest) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil || rest == "" {
		return b, err
	}
	t := reflect.TypeOf(v)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return withRest(t, b, json.RawMessage(rest))
}

// restList is the rest of a list: that of elements which have one, with what is known of
// each.
type restList []struct{ Known, Rest json.RawMessage }

// restOf is what a value says that a type has no place for: of a struct, an object of the
// members that it does not have, and of what members that it has say beyond; of a list, a
// restList. It is nil if there is nothing.
func restOf(t reflect.Type, value json.RawMessage) (json.RawMessage, error) {
	t, list := shape(t)
	switch {
	case t == nil || string(bytes.TrimSpace(value)) == "null":
		return nil, nil
	case list:
		var elements []json.RawMessage
		if err := json.Unmarshal(value, &elements); err != nil {
			return nil, err
		}
		var out restList
		for _, e := range elements {
			rest, err := restOf(t, e)
			if err != nil {
				return nil, err
			}
			if rest == nil {
				continue
			}
			known := reflect.New(t)
			if err := json.Unmarshal(e, known.Interface()); err != nil {
				return nil, err
			}
			b, err := json.Marshal(known.Interface())
			if err != nil {
				return nil, err
			}
			out = append(out, struct{ Known, Rest json.RawMessage }{b, rest})
		}
		if out == nil {
			return nil, nil
		}
		return json.Marshal(out)
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(value, &members); err != nil {
		return nil, err
	}
	for name, m := range members {
		of, known := member(t, name)
		if !known {
			continue
		}
		rest, err := restOf(of, m)
		if err != nil {
			return nil, err
		}
		if members[name] = rest; rest == nil {
			delete(members, name)
		}
	}
	if len(members) == 0 {
		return nil, nil
	}
	return json.Marshal(members)
}

// withRest is a value that was made of a type, with what restOf returned of another one.
func withRest(t reflect.Type, value, rest json.RawMessage) (json.RawMessage, error) {
	t, list := shape(t)
	if list {
		var elements []json.RawMessage
		var of restList
		if err := json.Unmarshal(value, &elements); err != nil {
			return nil, err
		}
		if err := json.Unmarshal(rest, &of); err != nil {
			return nil, err
		}
		for i, e := range elements {
			k := slices.IndexFunc(of, func(r struct{ Known, Rest json.RawMessage }) bool { return bytes.Equal(r.Known, e) })
			if k < 0 {
				continue
			}
			var err error
			if elements[i], err = withRest(t, e, of[k].Rest); err != nil {
				return nil, err
			}
			of = slices.Delete(of, k, k+1)
		}
		return json.Marshal(elements)
	}
	var members, more map[string]json.RawMessage
	if err := json.Unmarshal(value, &members); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(rest, &more); err != nil {
		return nil, err
	}
	for name, m := range more {
		of, known := member(t, name)
		if !known {
			members[name] = m
			continue
		}
		// The name may be written with other letters there.
		for own, v := range maps.Clone(members) {
			if !strings.EqualFold(own, name) || string(v) == "null" {
				continue
			}
			var err error
			if members[own], err = withRest(of, v, m); err != nil {
				return nil, err
			}
		}
	}
	return json.Marshal(members)
}

// shape is the struct that a type is of, or whose list it is; nil if it is something
// else, of which all is known or nothing is read.
func shape(t reflect.Type) (of reflect.Type, list bool) {
	for {
		switch t.Kind() {
		case reflect.Pointer:
			t = t.Elem()
		case reflect.Slice:
			if list {
				return nil, false
			}
			t, list = t.Elem(), true
		case reflect.Struct:
			for _, own := range []reflect.Type{reflect.TypeFor[json.Unmarshaler](), reflect.TypeFor[encoding.TextUnmarshaler]()} {
				if reflect.PointerTo(t).Implements(own) {
					return nil, false
				}
			}
			return t, list
		default:
			return nil, false
		}
	}
}

// member is the type of the field of a struct that encoding/json puts a member into.
func member(t reflect.Type, name string) (of reflect.Type, ok bool) {
	for _, f := range reflect.VisibleFields(t) {
		tag, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.IsExported() && tag != "" && tag != "-" && strings.EqualFold(tag, name) {
			return f.Type, true
		}
	}
	return nil, false
}
