package oracle_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"sync"
	"testing"

	"github.com/signet-mesh/signet/integration/parts"
)

// istio is the running program of module integration/istio.
type istio struct {
	mu  sync.Mutex // one question at a time
	in  io.WriteCloser
	out *bufio.Reader
}

// startIstio runs the program for a test. Without one the test is skipped, in CI
// it fails.
func startIstio(tb testing.TB) *istio {
	tb.Helper()
	part, err := parts.FindIstio("../..")
	if errors.Is(err, parts.ErrMissing) && os.Getenv("CI") == "" {
		tb.Skip(err)
	} else if err != nil {
		tb.Fatal(err)
	}
	// Should the test binary be killed, the program ends with its standard input.
	cmd := exec.Command(part.Path)
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			tb.Errorf("Istio's program: %v", err)
		}
	})
	tb.Logf("Istio %s", part.Version)
	return &istio{in: in, out: bufio.NewReader(out)}
}

func (i *istio) ask(tb testing.TB, question, answer any) {
	tb.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	b, err := json.Marshal(question)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := i.in.Write(append(b, '\n')); err != nil {
		tb.Fatalf("asking Istio: %v", err)
	}
	line, err := i.out.ReadBytes('\n')
	for err == nil && line[0] != '{' { // its log, see the program
		line, err = i.out.ReadBytes('\n')
	}
	if err != nil {
		tb.Fatalf("Istio's answer to %.500s: %v", b, err)
	}
	if err := json.Unmarshal(line, answer); err != nil {
		tb.Fatalf("Istio's answer: %v\n%.500s", err, line)
	}
}

// admission is what a cluster with Istio says to a resource.
type admission struct {
	Accepted bool     `json:"accepted"`
	By       string   `json:"by"`
	Message  string   `json:"message"`
	Warnings []string `json:"warnings"`
}

func (i *istio) admit(tb testing.TB, resource string) admission {
	tb.Helper()
	var answer struct {
		Admission admission `json:"admission"`
		Error     string    `json:"error"`
	}
	i.ask(tb, map[string]any{"admit": resource}, &answer)
	if answer.Error != "" {
		tb.Fatalf("asking Istio to admit: %s\n%s", answer.Error, resource)
	}
	return answer.Admission
}

// mesh is where policies stand and what they are for.
type mesh struct {
	Resources     string            `json:"resources"`
	Namespace     string            `json:"namespace"`
	Labels        map[string]string `json:"labels"`
	RootNamespace string            `json:"rootNamespace"`
	TrustDomain   string            `json:"trustDomain"`
	Aliases       []string          `json:"aliases"`
	Providers     []string          `json:"providers"`
	ManyProviders bool              `json:"manyProviders"`
	Ports         []uint32          `json:"ports"`
}

// filters are those that Istio makes for a workload.
type filters struct {
	HTTP  []json.RawMessage `json:"http"`
	TCP   []json.RawMessage `json:"tcp"`
	Mode  string            `json:"mode"`
	Modes map[uint32]string `json:"modes"`
}

// allowing says whether the last HTTP filter enforces ALLOW policies.
func (f filters) allowing() bool {
	if len(f.HTTP) == 0 {
		return false
	}
	var last struct {
		Config struct {
			Rules *struct {
				Action   string `json:"action"`
				Policies any    `json:"policies"`
			} `json:"rules"`
		} `json:"typedConfig"`
	}
	// The action ALLOW is the default, which JSON leaves out. Other filters have
	// rules of another form.
	return json.Unmarshal(f.HTTP[len(f.HTTP)-1], &last) == nil && last.Config.Rules != nil && last.Config.Rules.Action == ""
}

func (i *istio) build(tb testing.TB, m mesh) filters {
	tb.Helper()
	var answer struct {
		Filters filters `json:"filters"`
		Error   string  `json:"error"`
	}
	i.ask(tb, map[string]any{"build": m}, &answer)
	if answer.Error != "" {
		tb.Fatalf("asking Istio to build: %s\n%s", answer.Error, m.Resources)
	}
	return answer.Filters
}
