package demo

import (
	"context"
	"io"
	"time"

	"github.com/signet-mesh/signet/identity/attest/devissuer"
)

type (
	Process = process
	Outcome = outcome
	Result  = result
	Report  = report
)

const (
	Held, Failed, NotRun = held, failed, notRun
	TokenTTL             = tokenTTL
)

var (
	Start        = start
	StartTraffic = startTraffic
	XFCCValue    = xfccValue
	ClaimPorts   = claimPorts
	FindEnvoy    = findEnvoy
	FindProgram  = findProgram
	BasePolicies = basePolicies
	Closing      = closing
	MeshPolicy   = meshPolicy
	Tail         = tail
	RowNames     = rowNames
	DialWire     = dialWire
	QuoteYAML    = quoteYAML
	ReplaceFile  = replaceFile
)

func (p *process) PID() int               { return p.pid }
func (p *process) Kill()                  { p.kill() }
func (p *process) End()                   { p.end() }
func (p *process) Ended() <-chan struct{} { return p.ended }
func (p *process) Surprise() error        { return p.surprise() }

func (t *traffic) End() Report   { return t.end() }
func (t *traffic) Failures() int { return t.failures() }

// EndAfter is End that calls do when no further request may begin.
func (t *traffic) EndAfter(do func()) Report {
	go func() { <-t.stop; do() }()
	return t.end()
}

func (r report) Failed() int               { return r.failed() }
func (r report) Slowest() time.Duration    { return r.slowest() }
func (r report) Err(connections int) error { return r.err(connections) }
func (r report) Requests() int             { return len(r.samples) }
func (r report) Dials() int                { return r.dials }
func (r report) During(from, to time.Time) int {
	return r.during(from, to)
}

func (w *wire) Get(ctx context.Context, path string) (status int, body string, err error) {
	a, err := w.get(ctx, path)
	return a.status, a.body, err
}
func (w *wire) Close()                               { w.close() }
func (w *wire) Refusal(patience time.Duration) error { return w.refusal(patience) }

func (o outcome) PrintTable(w io.Writer) error { return o.printTable(w) }
func (o outcome) PrintJSON(w io.Writer) error  { return o.printJSON(w) }

// Kubelet gives the tokens of one issuer.
func Kubelet(dir string, issuer *devissuer.Issuer) (files []string, project func() error, run func(context.Context) error) {
	k := &kubelet{dir: dir, issuers: map[string]*devissuer.Issuer{}}
	for _, p := range allPods() {
		k.issuers[p.app] = issuer
	}
	for _, p := range []pod{agentPod, serverPod, clientPod} {
		files = append(files, k.tokenFile(p))
	}
	return files, k.project, k.run
}

// Sabotages are what --break does, by row.
func Sabotages() map[string]string {
	m := map[string]string{}
	for _, r := range rows {
		m[r.name] = r.sabotage
	}
	return m
}
