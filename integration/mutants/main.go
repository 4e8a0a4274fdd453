// Command mutants removes, one at a time, the checks that stand between an agent
// and an identity that is not its own, and runs the property test on each: it must
// fail. It is part of make soak.
//
//	mutants [-worlds 24] [NAME...]
//
// # Trust
//
// It compiles and runs changed copies of this repository's own code, through an
// overlay of the go command; the files themselves stay as they are.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// mutant is a check that is removed: in file, old becomes new.
type mutant struct{ name, file, old, new string }

var mutants = []mutant{
	// Which pods are alive.
	{"ended pods count", "ca/kube/view.go", `o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed`, `false`},
	{"pods count beyond their grace", "ca/kube/view.go", `!p.ends.IsZero() && !now.Before(p.ends)`, `false`},
	{"nobody ends pods when their grace does", "ca/kube/view.go", "v.settle(slices.Values(over))", "_ = over"},
	{"pods end when their deletion begins", "ca/kube/view.go", "p.ends = o.DeletionTimestamp.Add(graceLeeway)", "p.ends = time.Unix(0, 0)"},
	{"pods need no node", "ca/kube/view.go", `if w.NodeUID, ok = v.nodes[w.Node]; !ok {`, `if w.NodeUID = v.nodes[w.Node]; false {`},
	{"pods need no account", "ca/kube/view.go", "w.ServiceAccountUID, ok = v.accounts[p.account()]\n\treturn w, ok", "w.ServiceAccountUID = v.accounts[p.account()]\n\treturn w, true"},
	{"accounts that are being deleted count", "ca/kube/view.go", `return o.DeletionTimestamp == nil`, `return true`},
	{"a recreated pod leaves its UID behind", "ca/kube/view.go", `if p == nil || p.w.PodUID != old.w.PodUID {`, `if p == nil {`},
	{"a deleted pod leaves its UID behind", "ca/kube/view.go", `if p == nil || p.w.PodUID != old.w.PodUID {`, `if p != nil && p.w.PodUID != old.w.PodUID {`},
	{"a list of pods deletes nothing", "ca/kube/view.go", `if list[k] == nil {`, `if false {`},
	{"a list of names deletes nothing", "ca/kube/view.go", `clear(u.known)`, ``},
	{"a deleted name goes on", "ca/kube/view.go", "delete(u.known, n)", ""},
	{"pods do not follow their node and account", "ca/kube/view.go", "delete(u.known, n)\n\tu.v.settle(maps.Keys(u.users[n]))", "delete(u.known, n)"},
	{"pods do not follow a replaced node or account", "ca/kube/view.go", "u.known[n] = string(o.UID)\n\tu.v.settle(maps.Keys(u.users[n]))", "u.known[n] = string(o.UID)"},
	// What an agent may obtain.
	{"agents obtain pods of any node", "ca/service.go", `if w.Node != r.Node || w.NodeUID != "" && r.NodeUID != "" && w.NodeUID != r.NodeUID {`, `if false {`},
	{"nobody looks at the agent again at the end", "ca/service.go", "// is under way then must not be issued.\n\tif err := a.alive(r); err != nil {", "// is under way then must not be issued.\n\tif err := error(nil); err != nil {"},
	{"unknown pods are issued", "ca/service.go", `if w, ok = a.cfg.Pods.Lookup(e.PodUid); !ok {`, `if w, ok = a.cfg.Pods.Lookup(e.PodUid); !ok && false {`},
	{"agents outlive their pods", "ca/agents.go", `case !ok:`, "case !ok:\n\t\treturn nil\n\tcase false:"},
	{"agents outlive their nodes", "ca/agents.go", `case w.NodeUID != "" && r.NodeUID != "" && w.NodeUID != r.NodeUID:`, `case false:`},
	{"agents outlive their SVIDs", "ca/agents.go", `if !time.Now().Before(r.NotAfter) {`, `if false {`},
	{"streams outlive their agents", "ca/service.go", "cancelCause(err)\n\t\t\t\treturn", "return"},
	{"renewal needs no fresh token", "ca/service.go", `now.Sub(old.TokenAt) >= a.cfg.TokenEvery`, `false`},
	{"agents are not told of pods that go", "ca/service.go", `m.Deleted = append(m.Deleted, uid)`, ``},
	// Which tokens are good.
	{"the API server is not asked about agents", "ca/kube/review.go", `!a.review || err != nil`, `true || err != nil`},
	{"refused reviews count", "ca/kube/review.go", `case !s.Authenticated:`, `case false:`},
	{"reviews for no audience count", "ca/kube/review.go", `case !slices.Contains(s.Audiences, audience):`, `case !slices.Contains(s.Audiences, audience) && false:`},
	{"reviews are not compared with the view", "ca/kube/review.go", `if c.theirs != c.ours {`, `if false {`},
	{"the user of a review is not compared", "ca/kube/review.go", `{"user", u.Username, "system:serviceaccount:" + w.Namespace + ":" + w.ServiceAccount},`, ``},
	{"the account UID of a review is not compared", "ca/kube/review.go", `{"service account UID", u.UID, w.ServiceAccountUID},`, ``},
	{"the pod of a review is not compared", "ca/kube/review.go", `{"pod", extra(u, extraPodName), w.Pod},`, ``},
	{"the pod UID of a review is not compared", "ca/kube/review.go", `{"pod UID", extra(u, extraPodUID), w.PodUID},`, ``},
	{"the node of a review is not compared", "ca/kube/review.go", `{"node", extra(u, extraNodeName), w.Node},`, ``},
	{"the node UID of a review is not compared", "ca/kube/review.go", `{"node UID", extra(u, extraNodeUID), w.NodeUID},`, ``},
	{"reviews are remembered for ever", "ca/kube/review.go", `known.until = now.Add(reviewMemory)`, `known.until = now.Add(1000 * time.Hour)`},
	{"tokens need no node UID", "ca/kube/review.go", `cfg.RequireNodeUID = c.keys, c.Pods(), true`, `cfg.RequireNodeUID = c.keys, c.Pods(), false`},
	{"any account may be an agent", "identity/attest/attest.go", `if a.allowed != nil {`, `if false {`},
	{"tokens outlive their pods", "identity/attest/attest.go", "if !ok {\n\t\treturn w, refuseAs(ErrUnknownPod", "if false {\n\t\treturn w, refuseAs(ErrUnknownPod"},
	{"tokens outlive their accounts", "identity/attest/attest.go", `v.ServiceAccountUID != "" && v.ServiceAccountUID != p.serviceAccountUID`, `false`},
	{"tokens outlive their nodes", "identity/attest/attest.go", ` || (v.NodeUID != "" && p.nodeUID != "" && v.NodeUID != p.nodeUID)`, ``},
	{"tokens may name another node", "identity/attest/attest.go", `v.Node != p.node || `, ``},
	{"tokens may name another pod or account", "identity/attest/attest.go", `if v.PodUID != p.podUID || v.Namespace != p.namespace || v.ServiceAccount != p.serviceAccount || v.Pod != p.pod {`, `if false {`},
	{"expired tokens are good", "identity/attest/token.go", `if !now.Before(exp) {`, `if false {`},
	{"tokens for others are good", "identity/attest/token.go", `len(c.Audience) != 1 || c.Audience[0] != a.cfg.Audience`, `false`},
	{"signatures are not verified", "identity/attest/token.go", "payload, err := jws.Verify(key.Public)", "payload, err := jws.UnsafePayloadWithoutVerification(), error(nil)"},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("mutants", flag.ContinueOnError)
	worlds := flags.Int("worlds", 24, "random clusters for each mutant")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var alive []string
	for _, m := range mutants {
		if flags.NArg() > 0 && !slices.Contains(flags.Args(), m.name) {
			continue
		}
		began := time.Now()
		why, err := m.run(ctx, *worlds)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			fmt.Println(m.name, err)
			alive = append(alive, m.name+" (not tried)")
			continue
		}
		if why == "" {
			alive = append(alive, m.name)
			why = "SURVIVED"
		}
		fmt.Printf("%-48s %6.1fs  %s\n", m.name, time.Since(began).Seconds(), why)
	}
	if len(alive) > 0 {
		return fmt.Errorf("%d checks can be removed and the property test does not notice: %s", len(alive), strings.Join(alive, ", "))
	}
	return nil
}

// run is how the property test failed on the mutant; empty if it did not.
func (m mutant) run(ctx context.Context, worlds int) (why string, err error) {
	text, err := os.ReadFile(m.file)
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(text), m.old); n != 1 {
		return "", fmt.Errorf("%q occurs %d times in %s: bring the list up to date", m.old, n, m.file)
	}
	dir, err := os.MkdirTemp("", "signet-mutant-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	changed, overlay := filepath.Join(dir, "changed.go"), filepath.Join(dir, "overlay.json")
	file, err := filepath.Abs(m.file)
	if err != nil {
		return "", err
	}
	list, err := json.Marshal(map[string]map[string]string{"Replace": {file: changed}})
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(changed, []byte(strings.Replace(string(text), m.old, m.new, 1)), 0o600); err != nil {
		return "", err
	}
	if err := os.WriteFile(overlay, list, 0o600); err != nil {
		return "", err
	}
	// Not vet: an unused variable of the mutant is not what is asked for.
	cmd := exec.CommandContext(ctx, "go", "test", "-overlay", overlay, "-vet=off", "-count=1", "-timeout=5m", "-run=TestAnAgentObtainsExactlyTheLivePodsOfItsNode",
		"./ca/kube", "-worlds", fmt.Sprint(worlds))
	out, err := cmd.CombinedOutput()
	if err == nil || ctx.Err() != nil {
		return "", ctx.Err()
	}
	if bytes.Contains(out, []byte("[build failed]")) || bytes.Contains(out, []byte("[setup failed]")) {
		return "", fmt.Errorf("it does not compile:\n%s", out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "_test.go:") || strings.Contains(line, "panic:") {
			return "found: " + strings.TrimSpace(line)[:min(110, len(strings.TrimSpace(line)))], nil
		}
	}
	return "", fmt.Errorf("it fails for another reason:\n%s", out)
}
