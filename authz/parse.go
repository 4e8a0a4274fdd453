package authz

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	yamlv3 "go.yaml.in/yaml/v3"
	"sigs.k8s.io/yaml"
)

// The bounds of what Parse reads. A resource in Kubernetes is at most about 1.5
// MiB (etcd's request limit), so nothing that a cluster holds is refused here.
const (
	maxOrigin    = 64 << 20
	maxDocument  = 2 << 20
	maxDocuments = 1 << 16 // of one origin, members of lists included
	maxDepth     = 64
	maxNodes     = 1 << 18 // of one document, aliases counted as often as they are used
	maxProblems  = 32      // of one document
)

// group is the API group of the policies.
const group = "security.istio.io"

// Parse reads the YAML or JSON documents of one origin (a file name, for
// messages and for keeping last good versions apart).
//
// Every document of the group security.istio.io yields a Resource, also one
// that cannot be enforced: the problems then say why, and [Set.Update] decides
// what takes its place. So a caller hands on all resources and shows all
// problems; it need not match them. Members of a List are documents. Documents
// of other groups are skipped with a problem of [SeverityInfo]; empty ones
// silently. A document that cannot be read so far that it could have a name
// yields a Resource as well, because it could be any policy.
//
// Reading is as strict as kubectl and Istio's admission together: unknown and
// repeated fields and values of another type are refused. A field that is null
// counts as left out, as it does for the API server.
func Parse(origin string, data []byte) ([]Resource, []Problem) {
	return parse(origin, data, nil)
}

// parse is Parse, with the warnings of Lint if l is not nil.
func parse(origin string, data []byte, l *lint) ([]Resource, []Problem) {
	p := &parser{origin: origin, lint: l}
	switch {
	case len(data) > maxOrigin:
		p.unreadable(0, fmt.Sprintf("is larger than %d MiB", maxOrigin>>20), "split it into several files")
	case !utf8.Valid(data):
		p.unreadable(0, "is not UTF-8 text", "save it as UTF-8")
	default:
		p.split(data)
	}
	return p.resources, p.problems
}

// parser collects what one origin holds.
type parser struct {
	origin    string
	resources []Resource
	problems  []Problem
	documents int
	full      bool
	lint      *lint // nil if Lint's warnings are not wanted
}

func (p *parser) unreadable(line int, message, fix string) {
	r, problem := unreadable(p.origin, line, message, fix)
	p.resources = append(p.resources, r)
	p.problems = append(p.problems, problem)
}

// split cuts the text at the lines that begin with "---", as kubectl does, so
// that a document which is no YAML spoils only itself.
func (p *parser) split(data []byte) {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	start, startLine := 0, 1
	line := 1
	for at := 0; at < len(data); line++ {
		end := len(data)
		if i := bytes.IndexByte(data[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		if text := data[at:end]; bytes.HasPrefix(text, []byte("---")) && (len(text) == 3 || strings.IndexByte(" \t\r\n", text[3]) >= 0) {
			p.document(data[start:at], startLine)
			start, startLine = at+3, line
		}
		at = end
	}
	p.document(data[start:], startLine)
}

// document reads one YAML document that begins at a line.
func (p *parser) document(text []byte, line int) {
	if blank(text) {
		return
	}
	if len(text) > maxDocument {
		p.unreadable(line, fmt.Sprintf("document is larger than %d MiB", maxDocument>>20), "Kubernetes would not store it either; split the policy")
		return
	}
	value, node, err := decode(text)
	if err != nil {
		message, at := yamlError(err)
		p.unreadable(line+at, "document cannot be read: "+message, "correct the YAML")
		return
	}
	if value == nil {
		return
	}
	p.object(value, source{node, line - 1}, false)
}

// yamlLine is how both YAML libraries say where.
var yamlLine = regexp.MustCompile(`^(?:error converting YAML to JSON: )?yaml: (?:unmarshal errors:\n  )?line (\d+): `)

// yamlError takes the line in the document out of an error's text, as the
// number of lines after the first.
func yamlError(err error) (message string, line int) {
	message = err.Error()
	if m := yamlLine.FindStringSubmatchIndex(message); m != nil {
		if n, err := strconv.Atoi(message[m[2]:m[3]]); err == nil && n > 0 {
			line = n - 1
		}
		message = message[m[1]:]
	}
	return clipPlain(message), line
}

// blank reports whether a text holds nothing but comments, directives and the
// end-of-document mark.
func blank(text []byte) bool {
	for l := range bytes.Lines(text) {
		l = bytes.TrimSpace(l)
		if len(l) > 0 && l[0] != '#' && l[0] != '%' && !bytes.Equal(l, []byte("...")) {
			return false
		}
	}
	return true
}

// decode reads text twice: as kubectl does, which says what it means, and as a
// tree of nodes, which says where things stand.
func decode(text []byte) (any, *yamlv3.Node, error) {
	d := yamlv3.NewDecoder(bytes.NewReader(text))
	var root yamlv3.Node
	switch err := d.Decode(&root); {
	case errors.Is(err, io.EOF):
		return nil, nil, nil
	case err != nil:
		return nil, nil, err
	}
	// The other reader stops after one document. What follows would be policy
	// that nobody enforces.
	if err := d.Decode(new(yamlv3.Node)); !errors.Is(err, io.EOF) {
		return nil, nil, errors.New("more than one document without a line --- between them")
	}
	budget := maxNodes
	if err := bounded(&root, maxDepth, &budget); err != nil {
		return nil, nil, err
	}
	// The lenient form: who asks for an object's fields holds their number
	// against the nodes, which tells where a key is repeated.
	j, err := yaml.YAMLToJSON(text)
	if err != nil {
		return nil, nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(j))
	dec.UseNumber()
	var value any
	if err := dec.Decode(&value); err != nil {
		return nil, nil, err
	}
	node := &root
	if node.Kind == yamlv3.DocumentNode && len(node.Content) == 1 {
		node = node.Content[0]
	}
	return value, node, nil
}

// bounded refuses nesting that no policy has and aliases that unfold beyond
// reason, before anything unfolds them.
func bounded(n *yamlv3.Node, depth int, budget *int) error {
	if *budget--; *budget < 0 {
		return fmt.Errorf("more than %d values", maxNodes)
	}
	if depth == 0 {
		return fmt.Errorf("nested deeper than %d", maxDepth)
	}
	if n.Kind == yamlv3.AliasNode {
		return bounded(n.Alias, depth-1, budget)
	}
	for _, c := range n.Content {
		if err := bounded(c, depth-1, budget); err != nil {
			return err
		}
	}
	return nil
}

// object takes one Kubernetes object.
func (p *parser) object(value any, at source, member bool) {
	if p.full {
		return
	}
	if p.documents++; p.documents > maxDocuments {
		p.full = true
		p.unreadable(at.line(""), fmt.Sprintf("more than %d documents", maxDocuments), "split the file")
		return
	}
	object, ok := value.(map[string]any)
	if !ok {
		p.unreadable(at.line(""), "document is not an object", "write apiVersion, kind, metadata and spec")
		return
	}
	metadata, _ := object["metadata"].(map[string]any)
	if at.repeated(len(object), "") || at.repeated(len(metadata), "metadata") {
		p.unreadable(at.line("metadata"), "document has the same key more than once in itself or in its metadata", "write each key once")
		return
	}
	apiVersion, ok1 := object["apiVersion"].(string)
	kind, ok2 := object["kind"].(string)
	if !ok1 || !ok2 || apiVersion == "" || kind == "" {
		p.unreadable(at.line(""), "document has no apiVersion or no kind", "write both as strings, as in apiVersion: "+group+"/v1")
		return
	}
	g, version, _ := strings.Cut(apiVersion, "/")
	// One of our kinds in another group is ours, misspelt, but for the one other
	// API that is known to have such a kind.
	ours := (kind == KindAuthorizationPolicy || kind == KindPeerAuthentication || kind == KindRequestAuthentication) &&
		g != "policy.linkerd.io"
	switch {
	case apiVersion == "v1" && kind == "List", g == group && strings.HasSuffix(kind, "List"):
		p.list(object, at, member)
	case g == group || ours:
		p.policy(object, at, key{kind: kind}, g, version)
	default:
		p.problems = append(p.problems, Problem{
			Origin: p.origin, Line: at.line(""), Severity: SeverityInfo,
			Message: fmt.Sprintf("%s %s is no policy, skipped", clip(apiVersion), clip(kind)),
		})
	}
}

// list takes the members of a List, as kubectl get -o yaml prints them.
func (p *parser) list(object map[string]any, at source, member bool) {
	items, ok := object["items"].([]any)
	if !ok || member {
		p.unreadable(at.line("items"), "List has no list of items, or is itself in a List", "write the objects as documents of their own")
		return
	}
	for i, item := range items {
		where, _ := at.in(fmt.Sprintf("items[%d]", i))
		p.object(item, where, true)
	}
}

// source is where a value stands in its text: the node, and the lines before
// the document.
type source struct {
	node *yamlv3.Node
	base int
}

// line is the line of the field at a path below the value, or of the nearest
// thing that holds it.
func (s source) line(path string) int {
	at, _ := s.in(path)
	if at.node == nil {
		return 0
	}
	return s.base + at.node.Line
}

// in is the source of the field at a path below the value, or of the nearest
// thing that holds it; exact tells which.
func (s source) in(path string) (at source, exact bool) {
	n := deref(s.node)
	exact = n != nil
	for path != "" && n != nil {
		var step string
		if path[0] == '[' {
			end := strings.IndexByte(path, ']')
			if end < 0 {
				exact = false
				break
			}
			step, path = path[1:end], path[end+1:]
		} else if i := strings.IndexAny(path, ".["); i >= 0 {
			step, path = path[:i], path[i:]
		} else {
			step, path = path, ""
		}
		path = strings.TrimPrefix(path, ".")
		next := child(n, step, maxDepth)
		if next == nil {
			exact = false
			break
		}
		n = next
	}
	return source{n, s.base}, exact
}

// repeated reports whether the object at a path, which has n fields, has keys
// that are different in YAML and equal in JSON, as 80 and "80" are, or equal in
// both: one of the values would silently go. Keys that a merge (<<) brings in count
// like those that are written out.
func (s source) repeated(n int, path string) bool {
	at, exact := s.in(path)
	if !exact || at.node.Kind != yamlv3.MappingNode {
		return false
	}
	return size(at.node, maxDepth) != n
}

// size is the number of keys of a mapping, with those of the mappings that are
// merged into it.
func size(n *yamlv3.Node, depth int) (keys int) {
	if depth == 0 {
		return 0
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].ShortTag() != "!!merge" {
			keys++
			continue
		}
		for _, m := range merged(n.Content[i+1]) {
			keys += size(m, depth-1)
		}
	}
	return keys
}

// merged are the mappings that a merge brings in: one, or a list of them.
func merged(n *yamlv3.Node) []*yamlv3.Node {
	n = deref(n)
	switch {
	case n == nil:
	case n.Kind == yamlv3.MappingNode:
		return []*yamlv3.Node{n}
	case n.Kind == yamlv3.SequenceNode:
		var all []*yamlv3.Node
		for _, e := range n.Content {
			if e = deref(e); e != nil && e.Kind == yamlv3.MappingNode {
				all = append(all, e)
			}
		}
		return all
	}
	return nil
}

// child is the value of a key, or the element with an index, or nil.
func child(n *yamlv3.Node, step string, depth int) *yamlv3.Node {
	switch {
	case depth == 0:
	case n.Kind == yamlv3.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i].ShortTag() == "!!merge" {
				for _, m := range merged(n.Content[i+1]) {
					if v := child(m, step, depth-1); v != nil {
						return v
					}
				}
				continue
			}
			if n.Content[i].Value == step {
				v := deref(n.Content[i+1])
				if v != nil && (v.Kind == yamlv3.MappingNode || v.Kind == yamlv3.SequenceNode) && v.Line > n.Content[i].Line {
					// A block that begins on the next line is found by its key.
					at := *v
					at.Line = n.Content[i].Line
					return &at
				}
				return v
			}
		}
	case n.Kind == yamlv3.SequenceNode:
		if i, err := strconv.Atoi(step); err == nil && i >= 0 && i < len(n.Content) {
			return deref(n.Content[i])
		}
	}
	return nil
}

func deref(n *yamlv3.Node) *yamlv3.Node {
	for i := 0; n != nil && n.Kind == yamlv3.AliasNode && i < maxDepth; i++ {
		n = n.Alias
	}
	return n
}

// clip bounds text from a document in a message and makes it printable.
func clip(s string) string {
	const most = 64
	if len(s) > most {
		return fmt.Sprintf("%.*q…", most, s)
	}
	return fmt.Sprintf("%q", s)
}
