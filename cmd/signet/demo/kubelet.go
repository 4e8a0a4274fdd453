package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/signet-mesh/signet/identity/attest/devissuer"
)

// trustDomain and the nodes of the demo's cluster.
const (
	trustDomain = "cluster.local"
	nodeA       = "node-a"
	nodeB       = "node-b"
)

// Audiences of tokens.
const (
	forAgent = "signet"    // a proxy shows it to its agent
	forCA    = "signet-ca" // an agent shows it to the authority
)

// pod is a pod of the demo's cluster.
type pod struct {
	name, uid                 string
	namespace, serviceAccount string
	node, nodeUID             string
	app                       string // the label of that name
	audience                  string // of the token that it gets
}

// id is the SPIFFE ID that the pod should get.
func (p pod) id() string {
	return "spiffe://" + trustDomain + "/ns/" + p.namespace + "/sa/" + p.serviceAccount
}

// The pods. Their UIDs only have to look like some.
var (
	agentPod = pod{"signet-agent-a", "0a9e7f5c-5b1d-4c3e-9a41-000000000001", "signet-system", "signet-agent", nodeA, nodeAUID, "signet-agent", forCA}
	// elsewhere runs on a node whose agent is not here.
	elsewhere = pod{"batch-0", "0a9e7f5c-5b1d-4c3e-9a41-000000000004", "default", "batch", nodeB, nodeBUID, "batch", forAgent}
	serverPod = pod{"server-0", "0a9e7f5c-5b1d-4c3e-9a41-000000000002", "default", "server", nodeA, nodeAUID, "server", forAgent}
	clientPod = pod{"client-0", "0a9e7f5c-5b1d-4c3e-9a41-000000000003", "default", "client", nodeA, nodeAUID, "client", forAgent}
)

const (
	nodeAUID = "0a9e7f5c-5b1d-4c3e-9a41-00000000000a"
	nodeBUID = "0a9e7f5c-5b1d-4c3e-9a41-00000000000b"
)

// allPods is what the authority is told.
func allPods() []pod { return []pod{agentPod, serverPod, clientPod, elsewhere} }

const (
	// tokenTTL is short, so that the tokens rotate while the demo runs. Kubelet's
	// shortest is 10 minutes.
	tokenTTL = 20 * time.Second
	// rotateAfter is three quarters of it; kubelet's is 80 %.
	rotateAfter = tokenTTL * 3 / 4
)

// kubelet gives the pods of node-a their tokens, and new ones in time, each in a
// folder of its own, by rename.
type kubelet struct {
	dir     string // of the tokens
	issuers map[string]*devissuer.Issuer
}

// tokenFile is where a pod finds its token.
func (k *kubelet) tokenFile(p pod) string { return filepath.Join(k.dir, p.app, "token") }

// project writes a new token for each pod.
func (k *kubelet) project() error {
	for _, p := range []pod{agentPod, serverPod, clientPod} {
		token, err := k.token(p, p.audience, time.Now())
		if err != nil {
			return err
		}
		if err := replaceFile(k.dir, k.tokenFile(p), token); err != nil {
			return fmt.Errorf("writing the token of pod %s: %w", p.name, err)
		}
	}
	return nil
}

// token is a token of a pod as it would have been issued at that moment.
func (k *kubelet) token(p pod, audience string, at time.Time) (string, error) {
	return k.issuers[p.app].Token(devissuer.Claims{
		Audience: []string{audience}, Namespace: p.namespace, ServiceAccount: p.serviceAccount,
		Pod: p.name, PodUID: p.uid, Node: p.node, NodeUID: p.nodeUID, TTL: tokenTTL,
	}, at)
}

// run rotates the tokens until ctx ends. The first ones must be there.
func (k *kubelet) run(ctx context.Context) error {
	tick := time.NewTicker(rotateAfter)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := k.project(); err != nil {
			return fmt.Errorf("rotating tokens: %w", err)
		}
	}
}

// replaceFile gives a file new content, readable by its owner only, by renaming
// one from folder tmp, which must be on the same file system, over it. So readers
// see all of it or none, and who watches the file's folder sees nothing else.
func replaceFile(tmp, name, content string) (err error) {
	f, err := os.CreateTemp(tmp, ".new-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.WriteString(content)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
