package explain

import (
	"fmt"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
)

const notSent = "the proxy did not say"

// got is what a request has for an attribute, for people. known is false if the
// request does not say.
func got(of attribute, r *authz.Request) (text string, known bool) {
	value := func(f authz.Field, b []byte, none string) (string, bool) {
		switch {
		case r.Known&f == 0:
			return notSent, false
		case b == nil:
			return none, true
		}
		return quoted(string(b)), true
	}
	switch of {
	case ofPrincipal:
		switch {
		case r.Known&authz.FieldPeer == 0:
			return notSent, false
		case !r.Authenticated:
			return "a peer without a certificate", true
		case r.Known&authz.FieldPrincipal == 0:
			return "the proxy did not say all names of the certificate", false
		}
		names := []string{quoted(strings.TrimPrefix(string(r.Principal), scheme))}
		for _, n := range r.OtherNames {
			names = append(names, quoted(strings.TrimPrefix(string(n), scheme)))
		}
		return strings.Join(names, ", "), true
	case ofMethod:
		return value(authz.FieldMethod, r.Method, "a request without a method")
	case ofPath:
		path := r.Path
		if i := strings.IndexAny(string(path), "?#"); i >= 0 {
			path = path[:i]
		}
		return value(authz.FieldPath, path, "a request without a path")
	case ofHost:
		return value(authz.FieldHost, r.Host, "a request without a host")
	case ofSNI:
		if len(r.SNI) == 0 && r.Known&authz.FieldSNI != 0 {
			return "no server name", true
		}
		return value(authz.FieldSNI, r.SNI, "no server name")
	case ofPort:
		if r.Known&authz.FieldDestinationPort == 0 {
			return notSent, false
		}
		return fmt.Sprint(r.DestinationPort), true
	case ofSource:
		if r.Known&authz.FieldSourceIP == 0 || !r.SourceIP.IsValid() {
			return notSent, false
		}
		return r.SourceIP.String(), true
	case ofDestination:
		if r.Known&authz.FieldDestinationIP == 0 || !r.DestinationIP.IsValid() {
			return notSent, false
		}
		return r.DestinationIP.String(), true
	case ofRemote:
		switch {
		case r.Known&authz.FieldRemoteIP != 0 && r.RemoteIP.IsValid():
			return r.RemoteIP.String(), true
		case r.HTTP && r.Known&authz.FieldHeaders == 0:
			return notSent, false
		}
		if vs := headerValues(r, "x-forwarded-for"); r.HTTP && len(vs) > 0 {
			return "x-forwarded-for " + strings.Join(vs, ", "), true
		}
		return got(ofSource, r)
	case ofIdentity:
		if text, known := token(r); text != "" {
			return text, known
		}
		f := r.Claims.GetFields()
		return claimText(f["iss"]) + "/" + claimText(f["sub"]), true
	case ofNothing:
		return "", true
	}
	if name, ok := strings.CutPrefix(string(of), string(ofHeader)); ok {
		vs := headerValues(r, name)
		switch {
		case len(vs) > 0:
			return strings.Join(vs, " and "), true
		case r.Known&authz.FieldHeaders == 0:
			return notSent, false
		}
		return "a request without this header", true
	}
	if name, ok := strings.CutPrefix(string(of), string(ofClaim)); ok {
		if text, known := token(r); text != "" {
			return text, known
		}
		return claimText(claimAt(r.Claims, claimPath(name))), true
	}
	if name, ok := strings.CutPrefix(string(of), string(ofMetadata)); ok {
		filter, key, _ := strings.Cut(strings.TrimSuffix(name, "]"), "[")
		s, there := r.Metadata[filter]
		if !there && r.Known&authz.FieldMetadata == 0 {
			return notSent, false
		}
		return claimText(s.GetFields()[key]), true
	}
	return "", true
}

const scheme = "spiffe://"

// token says that there is no verified token, or that nobody knows.
func token(r *authz.Request) (text string, known bool) {
	switch {
	case r.Known&authz.FieldClaims == 0:
		return "the proxy did not say whether it verified a token", false
	case r.Claims == nil:
		return "a request without a verified token", true
	}
	return "", true
}

func headerValues(r *authz.Request, name string) (out []string) {
	for _, h := range r.Headers {
		if h.Name != name {
			continue
		}
		switch h.Form {
		case authz.HeaderValue:
			out = append(out, quoted(string(h.Value)))
		case authz.HeaderJoined:
			out = append(out, quoted(string(h.Value))+" (joined)")
		case authz.HeaderHidden:
			out = append(out, "a value that is not shown")
		default:
			out = append(out, "a value that the proxy changed")
		}
	}
	return out
}

// claimPath is the path of a claim in brackets.
func claimPath(name string) []string {
	return strings.Split(strings.TrimSuffix(strings.TrimPrefix(name, "["), "]"), "][")
}

func claimAt(s *structpb.Struct, path []string) (v *structpb.Value) {
	for i, k := range path {
		if i > 0 {
			s = v.GetStructValue()
		}
		v = s.GetFields()[k]
	}
	return v
}

func claimText(v *structpb.Value) string {
	if v == nil {
		return "nothing"
	}
	switch k := v.GetKind().(type) {
	case *structpb.Value_StringValue:
		return quoted(k.StringValue)
	case *structpb.Value_ListValue:
		var out []string
		for _, e := range k.ListValue.GetValues() {
			out = append(out, claimText(e))
		}
		return "[" + strings.Join(out, ", ") + "]"
	case *structpb.Value_BoolValue, *structpb.Value_NumberValue:
		return fmt.Sprintf("%v, which is no text", v.AsInterface())
	case *structpb.Value_NullValue:
		return "null"
	case *structpb.Value_StructValue:
		return "an object"
	}
	return "a value that is not shown"
}
