package main

import (
	"context"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// mutant is one change.
type mutant struct {
	id  int
	key string // FILE FUNCTION CHANGE "SOURCE"#N, which outlives moved lines
	at  string // FILE:LINE
}

func (m mutant) String() string { return m.key + " at " + m.at }

// support is what changed code calls.
const support = `package %s

import (
	"os"
	"strconv"
)

var mutantActive = func() int { n, _ := strconv.Atoi(os.Getenv("MUTANT")); return n }()

func mutantOn(n int) bool { return n == mutantActive }

func mutantFlip[B ~bool](n int, b B) B { return b != (n == mutantActive) }

func mutantPick[T any](n int, a, b T) T {
	if n == mutantActive {
		return b
	}
	return a
}

func mutantAdd(n int) int {
	if n == mutantActive {
		return 1
	}
	return 0
}
`

// quiet are functions that render for people; what they say is no decision.
var quiet = regexp.MustCompile(`^(describe|Text|String|Error|id|place|plain|clip|Rules|each|detail)$`)

// mutator turns the source of one file into one that holds all of its mutants.
type mutator struct {
	fset   *token.FileSet
	src    []byte
	file   string
	info   *types.Info
	change map[ast.Node]func() string
	ids    *int
	// off are the ids that do not compile.
	off     map[int]bool
	mutants []mutant
	seen    map[string]int
	fn      string
}

// build compiles the test program with all mutants in it.
func (of target) build(ctx context.Context, dir, program string) ([]mutant, error) {
	fset, parsed, info, err := of.load(ctx)
	if err != nil {
		return nil, err
	}
	off := map[int]bool{}
	for range 20 {
		overlay := map[string]string{}
		var all []mutant
		ids := 0
		lines := map[string]map[int][]int{} // ids by line of each changed file
		for i, name := range of.files {
			path := filepath.Join(of.dir, name)
			src, err := os.ReadFile(path)
			if err != nil {
				return nil, err
			}
			m := &mutator{fset: fset, src: src, file: name, info: info, change: map[ast.Node]func() string{}, ids: &ids, off: off, seen: map[string]int{}}
			m.collect(parsed[i])
			text := m.text(parsed[i])
			head := string(src[:m.offset(parsed[i].Pos())])
			changed := filepath.Join(dir, name)
			if err := os.WriteFile(changed, []byte(head+text), 0o600); err != nil {
				return nil, err
			}
			abs, err := filepath.Abs(path)
			if err != nil {
				return nil, err
			}
			overlay[abs] = changed
			all = append(all, m.mutants...)
			lines[name] = idsByLine(head + text)
		}
		abs, err := filepath.Abs(filepath.Join(of.dir, "zz_mutants.go"))
		if err != nil {
			return nil, err
		}
		overlay[abs] = filepath.Join(dir, "zz_mutants.go")
		if err := os.WriteFile(overlay[abs], fmt.Appendf(nil, support, filepath.Base(of.dir)), 0o600); err != nil {
			return nil, err
		}
		j, err := json.Marshal(map[string]any{"Replace": overlay})
		if err != nil {
			return nil, err
		}
		overlayFile := filepath.Join(dir, "overlay.json")
		if err := os.WriteFile(overlayFile, j, 0o600); err != nil {
			return nil, err
		}
		cmd := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-gcflags=-e", "-overlay", overlayFile, "-o", program, "./"+of.dir)
		out, err := cmd.CombinedOutput()
		if err == nil {
			return all, nil
		}
		// A change that does not compile is none.
		before := len(off)
		for _, e := range regexp.MustCompile(`([a-z_]+\.go):(\d+):`).FindAllStringSubmatch(string(out), -1) {
			line, _ := strconv.Atoi(e[2])
			for _, id := range lines[e[1]][line] {
				off[id] = true
			}
		}
		if len(off) == before {
			return nil, fmt.Errorf("compiling the mutants: %w\n%s", err, out)
		}
	}
	return nil, fmt.Errorf("the mutants do not compile")
}

var idCall = regexp.MustCompile(`mutant[A-Z][a-z]*\((\d+)`)

func idsByLine(text string) map[int][]int {
	out := map[int][]int{}
	for i, line := range strings.Split(text, "\n") {
		for _, m := range idCall.FindAllStringSubmatch(line, -1) {
			id, _ := strconv.Atoi(m[1])
			out[i+1] = append(out[i+1], id)
		}
	}
	return out
}

// load parses and checks the package.
func (of target) load(ctx context.Context) (*token.FileSet, []*ast.File, *types.Info, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-export", "-deps", "-json=ImportPath,Export,GoFiles,Dir", "./"+of.dir)
	out, err := cmd.Output()
	if err != nil {
		return nil, nil, nil, fmt.Errorf("listing %s: %w", of.dir, err)
	}
	exports := map[string]string{}
	var own []string
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath, Export, Dir string
			GoFiles                 []string
		}
		if err := d.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			return nil, nil, nil, err
		}
		exports[p.ImportPath] = p.Export
		if strings.HasSuffix(filepath.ToSlash(p.ImportPath), "/"+of.dir) {
			own = p.GoFiles
		}
	}
	fset := token.NewFileSet()
	var all, ours []*ast.File
	byName := map[string]*ast.File{}
	for _, name := range own {
		f, err := parser.ParseFile(fset, filepath.Join(of.dir, name), nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return nil, nil, nil, err
		}
		all = append(all, f)
		byName[name] = f
	}
	for _, name := range of.files {
		if byName[name] == nil {
			return nil, nil, nil, fmt.Errorf("%s is gone from %s: correct the list of files", name, of.dir)
		}
		ours = append(ours, byName[name])
	}
	info := &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}}
	conf := types.Config{Importer: importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })}
	if _, err := conf.Check(of.dir, fset, all, info); err != nil {
		return nil, nil, nil, fmt.Errorf("checking %s: %w", of.dir, err)
	}
	return fset, ours, info, nil
}

func (m *mutator) offset(p token.Pos) int { return m.fset.Position(p).Offset }

func (m *mutator) source(n ast.Node) string {
	return string(m.src[m.offset(n.Pos()):m.offset(n.End())])
}

// text is the source of a node with all changes in it.
func (m *mutator) text(n ast.Node) string {
	if c, ok := m.change[n]; ok {
		return c()
	}
	return m.inner(n)
}

// inner is text without the change of the node itself.
func (m *mutator) inner(n ast.Node) string {
	var changed []ast.Node
	ast.Inspect(n, func(k ast.Node) bool {
		if k == nil {
			return false
		}
		if _, ok := m.change[k]; ok && k != n {
			changed = append(changed, k)
			return false
		}
		return true
	})
	var b strings.Builder
	at := m.offset(n.Pos())
	for _, k := range changed {
		b.Write(m.src[at:m.offset(k.Pos())])
		b.WriteString(m.text(k))
		at = m.offset(k.End())
	}
	b.Write(m.src[at:m.offset(n.End())])
	return b.String()
}

// add makes a mutant of a node; with makes the changed source.
func (m *mutator) add(n ast.Node, what string, with func(id int, inner func() string) string) {
	*m.ids++
	id := *m.ids
	if m.off[id] {
		return
	}
	text := strings.Join(strings.Fields(m.source(n)), " ")
	if len(text) > 100 {
		text = text[:100] + "…"
	}
	key := fmt.Sprintf("%s %s %s %q", m.file, m.fn, what, text)
	m.seen[key]++
	if k := m.seen[key]; k > 1 {
		key += fmt.Sprintf(" #%d", k)
	}
	m.mutants = append(m.mutants, mutant{id, key, fmt.Sprintf("%s:%d", m.file, m.fset.Position(n.Pos()).Line)})
	before := m.change[n]
	if before == nil {
		before = func() string { return m.inner(n) }
	}
	m.change[n] = func() string { return with(id, before) }
}

// collect finds what can be changed in a file.
func (m *mutator) collect(f *ast.File) {
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok || fn.Body == nil || quiet.MatchString(fn.Name.Name) {
			continue
		}
		m.fn = fn.Name.Name
		var stack []ast.Node
		ast.Inspect(fn.Body, func(n ast.Node) bool {
			if n == nil {
				stack = stack[:len(stack)-1]
				return true
			}
			if !m.look(n, stack) {
				return false
			}
			stack = append(stack, n)
			return true
		})
	}
}

// look makes the mutants of one node and says whether to look below it.
func (m *mutator) look(n ast.Node, stack []ast.Node) bool {
	var parent ast.Node
	if len(stack) > 0 {
		parent = stack[len(stack)-1]
	}
	switch n := n.(type) {
	case *ast.GenDecl:
		return n.Tok == token.VAR
	case *ast.CallExpr:
		if s, ok := n.Fun.(*ast.SelectorExpr); ok {
			if x, ok := s.X.(*ast.Ident); ok && (x.Name == "fmt" || x.Name == "errors") {
				return false
			}
		}
		if id, ok := n.Fun.(*ast.Ident); ok && (id.Name == "make" || id.Name == "panic") {
			return false // sizes are no decisions
		}
	case *ast.CompositeLit:
		if id, ok := n.Type.(*ast.Ident); ok && id.Name == "Problem" {
			return false
		}
	case *ast.IfStmt:
		m.flip(n.Cond)
	case *ast.ForStmt:
		if n.Cond != nil {
			m.flip(n.Cond)
		}
	case *ast.CaseClause:
		if s, ok := stack[len(stack)-2].(*ast.SwitchStmt); ok && s.Tag == nil {
			for _, e := range n.List {
				m.flip(e)
			}
		}
	case *ast.ReturnStmt:
		for _, e := range n.Results {
			if m.isBool(e) {
				m.flip(e)
			} else if other := m.other(e); other != "" {
				m.add(e, "return "+other, func(id int, inner func() string) string {
					return fmt.Sprintf("mutantPick(%d, %s, %s)", id, inner(), other)
				})
			}
		}
	case *ast.BinaryExpr:
		m.binary(n, parent)
	case *ast.ExprStmt:
		if call, ok := n.X.(*ast.CallExpr); ok {
			if id, ok := call.Fun.(*ast.Ident); !ok || id.Name != "panic" {
				m.drop(n, parent)
			}
		}
	case *ast.AssignStmt:
		if n.Tok != token.DEFINE {
			m.drop(n, parent)
		}
	case *ast.IncDecStmt:
		m.drop(n, parent)
	case *ast.BranchStmt:
		if n.Tok == token.CONTINUE || n.Tok == token.BREAK {
			m.drop(n, parent)
		}
	case *ast.BasicLit:
		m.literal(n, parent)
	}
	return true
}

func (m *mutator) isBool(e ast.Expr) bool {
	t, ok := m.info.Types[e]
	if !ok {
		return false
	}
	b, ok := t.Type.Underlying().(*types.Basic)
	return ok && b.Info()&types.IsBoolean != 0
}

func (m *mutator) flip(e ast.Expr) {
	m.add(e, "negate", func(id int, inner func() string) string { return fmt.Sprintf("mutantFlip(%d, %s)", id, inner()) })
}

// other is another value of three-valued logic.
func (m *mutator) other(e ast.Expr) string {
	id, ok := e.(*ast.Ident)
	if !ok {
		return ""
	}
	if _, ok := m.info.Uses[id].(*types.Const); !ok {
		return ""
	}
	switch id.Name {
	case "yes":
		return "no"
	case "no":
		return "yes"
	case "maybe":
		return "no"
	}
	return ""
}

func (m *mutator) binary(n *ast.BinaryExpr, parent ast.Node) {
	if t, ok := m.info.Types[n]; ok && t.Value != nil {
		return
	}
	replace := func(op string) {
		m.add(n, n.Op.String()+" becomes "+op, func(id int, inner func() string) string {
			return fmt.Sprintf("(mutantOn(%d) && (%s %s %s) || !mutantOn(%d) && (%s))", id, m.text(n.X), op, m.text(n.Y), id, inner())
		})
	}
	switch n.Op {
	case token.LAND:
		replace("||")
	case token.LOR:
		replace("&&")
	case token.LSS:
		replace("<=")
	case token.LEQ:
		replace("<")
	case token.GTR:
		replace(">=")
	case token.GEQ:
		replace(">")
	case token.EQL, token.NEQ:
		// Where it is a whole condition it is negated anyway.
		if b, ok := parent.(*ast.BinaryExpr); ok && (b.Op == token.LAND || b.Op == token.LOR) {
			m.flip(n)
		}
	case token.ADD, token.SUB:
		if t, ok := m.info.Types[n]; ok && types.Identical(t.Type, types.Typ[types.Int]) {
			op := map[token.Token]string{token.ADD: "-", token.SUB: "+"}[n.Op]
			m.add(n, n.Op.String()+" becomes "+op, func(id int, inner func() string) string {
				return fmt.Sprintf("mutantPick(%d, %s, %s %s %s)", id, inner(), m.text(n.X), op, m.text(n.Y))
			})
		}
	}
}

// drop removes a statement of a block.
func (m *mutator) drop(n ast.Stmt, parent ast.Node) {
	switch parent.(type) {
	case *ast.BlockStmt, *ast.CaseClause:
	default:
		return
	}
	m.add(n, "drop", func(id int, inner func() string) string { return fmt.Sprintf("if !mutantOn(%d) { %s }", id, inner()) })
}

// literal adds one to a whole number.
func (m *mutator) literal(n *ast.BasicLit, parent ast.Node) {
	t, ok := m.info.Types[n]
	if !ok || n.Kind != token.INT || !types.Identical(t.Type, types.Typ[types.Int]) || t.Value == nil || t.Value.Kind() != constant.Int {
		return
	}
	if b, ok := parent.(*ast.BinaryExpr); ok && slices.Contains([]token.Token{token.SHL, token.SHR}, b.Op) {
		return
	}
	m.add(n, "plus one", func(id int, inner func() string) string { return fmt.Sprintf("(%s+mutantAdd(%d))", inner(), id) })
}
