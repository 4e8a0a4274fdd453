// Command istio answers what Istio itself does with security policies: whether
// its admission takes a resource, and which Envoy filters its control plane makes
// for a workload. Tests compare Signet with it. It also asks an authority for a
// certificate as Istio's own agent does.
//
// It reads one JSON request from each line of standard input and writes one JSON
// answer to a line of standard output, in the same order:
//
//	{"admit": "YAML of one resource"}
//	{"build": {"resources": "YAML documents", "namespace": "a", …}}
//	{"agent": {"address": "127.0.0.1:15012", "rootFile": "root.pem", …}}
//
// A line that does not begin with "{" is one that Istio's packages log while they
// are initialized, before anything can be told to them.
//
// Nothing here is written after Istio: the CRDs, the webhook, the selection, the
// composition, the builders, the agent's secret cache and its client are those of
// the module istio.io/istio.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"istio.io/istio/pkg/log"
)

type request struct {
	Admit *string `json:"admit,omitempty"`
	Build *build  `json:"build,omitempty"`
	Agent *agent  `json:"agent,omitempty"`
}

type answer struct {
	Admission *admission `json:"admission,omitempty"`
	Filters   *filters   `json:"filters,omitempty"`
	Secret    *secret    `json:"secret,omitempty"`
	// Error is set where Istio could not be asked.
	Error string `json:"error,omitempty"`
}

func main() {
	// Standard output is the protocol's.
	opts := log.DefaultOptions()
	opts.OutputPaths = []string{"stderr"}
	opts.SetDefaultOutputLevel("all", log.NoneLevel)
	_ = log.Configure(opts)
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "istio:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer) error {
	gate, err := newGate()
	if err != nil {
		return err
	}
	pilot := newPilot()
	lines := bufio.NewReader(in)
	w := bufio.NewWriter(out)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			b, err := json.Marshal(respond(gate, pilot, line))
			if err != nil {
				return err
			}
			if _, err := w.Write(append(b, '\n')); err != nil {
				return err
			}
			if err := w.Flush(); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func respond(gate *gate, pilot *pilot, line []byte) (a answer) {
	defer func() {
		if r := recover(); r != nil {
			a = answer{Error: fmt.Sprintf("panic: %v\n%s", r, debug.Stack())}
		}
	}()
	var req request
	if err := json.Unmarshal(line, &req); err != nil {
		return answer{Error: err.Error()}
	}
	switch {
	case req.Admit != nil:
		adm, err := gate.admit(*req.Admit)
		if err != nil {
			return answer{Error: err.Error()}
		}
		return answer{Admission: adm}
	case req.Build != nil:
		f, err := pilot.build(req.Build)
		if err != nil {
			return answer{Error: err.Error()}
		}
		return answer{Filters: f}
	}
	if req.Agent != nil {
		s, err := req.Agent.secret()
		if err != nil {
			return answer{Error: err.Error()}
		}
		return answer{Secret: s}
	}
	return answer{Error: "neither admit, build nor agent"}
}
