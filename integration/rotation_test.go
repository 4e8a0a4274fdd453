package integration_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/integration/envoytest"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

var rotateFor = flag.Duration("rotate", 0, "how long authorities are replaced under traffic, by hand, by hand with CRLs, and by schedule; 0: once by hand")

// nodes is a standalone installation with an agent on node-a and one on node-b, and an
// Envoy with each: w0's on node-a asks w1's on node-b. Each request has a connection, and
// so a handshake, of its own, and none is sent again.
type nodes struct {
	*standalone
	client, server proxy
	ask            func() int
}

// proxy is an Envoy, and how to ask its agent what the agent gave it.
type proxy struct {
	*envoytest.Envoy
	name, socket string
}

func newNodes(t *testing.T, yaml string) *nodes {
	t.Helper()
	// A tmpfs: an agent that is started again finds its state.
	state, err := os.MkdirTemp("/dev/shm", "signet-rotation-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(state) })
	n := &nodes{standalone: newStandalone(t, programs(t), 1, "", func(s *standalone) {
		s.caYAML = yaml
		if strings.Contains(yaml, "crl: ") {
			s.agent = "sds: {crl: true}\n"
		}
		s.http["signet-agent@b"] = freeAddr(t)
		s.before = func() {
			list := "- {namespace: signet-system, serviceAccount: signet-agent, pod: uid-agent-b, podUID: uid-agent-b, node: node-b}\n" +
				"- {namespace: default, serviceAccount: w1, pod: uid-w1, podUID: uid-w1, node: node-b}\n"
			s.write("signet-ca.yaml", readFile(t, filepath.Join(s.dir, "signet-ca.yaml"))+list)
			s.write("agent-b-token", s.token("signet-ca", "signet-system", "signet-agent", "uid-agent-b", "node-b"))
			for _, d := range []string{s.dir + "/sock-b", state + "/a", state + "/b"} {
				if err := os.Mkdir(d, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			config := readFile(t, filepath.Join(s.dir, "signet-agent.yaml"))
			s.write("signet-agent.yaml", strings.Replace(config, `stateDir: ""`, "allowSwap: true\nstateDir: "+state+"/a", 1))
			s.write("signet-agent@b.yaml", strings.NewReplacer(`stateDir: ""`, "allowSwap: true\nstateDir: "+state+"/b", "node: node-a", "node: node-b", "/sock/", "/sock-b/",
				"agent-token", "agent-b-token", s.http["signet-agent"], s.http["signet-agent@b"]).Replace(config))
		}
	})}
	n.start("signet-agent@b")
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello\n") }))
	t.Cleanup(app.Close)
	inbound, outbound := freeAddr(t), freeAddr(t)
	n.server = n.proxy(t, "w1", "node-b", "sock-b", "--inbound", inbound, "--app", strings.TrimPrefix(app.URL, "http://"))
	n.client = n.proxy(t, "w0", "node-a", "sock", "--no-inbound", "--outbound-retries", "0",
		"--outbound", "server="+outbound+","+inbound+",spiffe://cluster.local/ns/default/sa/w1")
	n.ask = func() int { return get("http://" + outbound + "/") }
	becomes(t, 200, "/", func(string) int { return n.ask() })
	return n
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// proxy starts an Envoy. One with an upstream makes a connection for each request.
func (n *nodes) proxy(t *testing.T, name, node, sock string, args ...string) proxy {
	t.Helper()
	n.write(name+"-token", n.token("signet", "default", name, "uid-"+name, node))
	file, socket := filepath.Join(n.dir, name+".yaml"), filepath.Join(n.dir, sock, "agent.sock")
	cmd := exec.Command(filepath.Join(n.bin, "signet"), append([]string{"envoy", "bootstrap", "-o", file, "--socket", socket,
		"--token-file", filepath.Join(n.dir, name+"-token"), "--admin", freeAddr(t)}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	config, pooled := readFile(t, file), "          auto_config: {}\n"
	if slices.Contains(args, "--no-inbound") {
		if !strings.Contains(config, pooled) {
			t.Fatal("the bootstrap has no upstream with auto_config")
		}
		n.write(name+".yaml", strings.Replace(config, pooled, "          common_http_protocol_options: {max_requests_per_connection: 1}\n"+pooled, 1))
	}
	return proxy{envoytest.Start(t, file), name, socket}
}

// tally counts handshakes between the two Envoys.
type tally struct {
	client, server int64 // that succeeded, as each side counts
	failed         int64 // as the side that saw most counts
}

func (a tally) less(b tally) tally {
	return tally{a.client - b.client, a.server - b.server, a.failed - b.failed}
}

// handshakes are all so far; towards the agents there are none. What fails counts under
// each name that it has: a connection that did not come about, and why.
func (n *nodes) handshakes(t *testing.T) (sum tally) {
	t.Helper()
	bad := map[string]int64{}
	for name, v := range n.client.Stats(t) {
		stat, upstream := strings.CutPrefix(name, "cluster.upstream_server.")
		switch {
		case !upstream:
		case stat == "ssl.handshake":
			sum.client += v
		case stat == "upstream_cx_connect_fail", stat == "ssl.connection_error", strings.HasPrefix(stat, "ssl.fail_verify"):
			bad[stat] += v
		}
	}
	for name, v := range n.server.Stats(t) {
		listener, stat, ssl := strings.Cut(name, ".ssl.")
		switch {
		case !ssl || !strings.HasPrefix(listener, "listener."):
		case stat == "handshake":
			sum.server += v
		case stat == "connection_error", strings.HasPrefix(stat, "fail_verify"):
			bad["server."+stat] += v
		}
	}
	if len(bad) < 10 {
		t.Fatalf("Envoy has not the statistics that this looks at: %v", bad)
	}
	return tally{sum.client, sum.server, slices.Max(slices.Collect(maps.Values(bad)))}
}

// phase does something under traffic, some of which comes before and some after it. No
// request and no handshake fails, and each request had a handshake of its own.
func (n *nodes) phase(t *testing.T, name string, do func()) {
	t.Helper()
	began, before := time.Now(), n.handshakes(t)
	requests := load(t, 200, n.ask)
	flows := func() {
		t.Helper()
		seen := requests.count.Load()
		until(t, name+": traffic flows", func() bool { return requests.count.Load() >= seen+20 })
	}
	flows()
	do()
	flows()
	good, failures := requests.stop()
	made := n.handshakes(t).less(before)
	t.Logf("note: %-52s %5.1f s: %4d requests, %d failed; handshakes: %4d at the client, %4d at the server, %d failed",
		name, time.Since(began).Seconds(), good, len(failures), made.client, made.server, made.failed)
	if len(failures) > 0 || made.failed != 0 || made.client < int64(good) || made.server < int64(good) {
		t.Errorf("%s: %d requests failed: %.300v", name, len(failures), failures)
	}
}

// authorities is what `signet ca authority list` shows.
type authorities struct{ *capb.AuthoritiesResponse }

func (n *nodes) list(t *testing.T) authorities {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+n.dir+"/ca/admin.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	a, err := capb.NewAdminClient(conn).Authorities(t.Context(), &capb.AuthoritiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return authorities{a}
}

// of are the IDs of authorities of a kind in a state.
func (a authorities) of(kind, state string) (ids []string) {
	for _, x := range a.GetAuthorities() {
		if x.GetKind() == kind && x.GetState() == state {
			ids = append(ids, x.GetId())
		}
	}
	return ids
}

// operate runs signet ca authority.
func (n *nodes) operate(args ...string) string {
	n.tb.Helper()
	return n.signet(append([]string{"ca", "authority", "--socket", n.dir + "/ca/admin.sock"}, args...)...)
}

// settles waits until there is one root.
func (n *nodes) settles(t *testing.T) {
	t.Helper()
	until(t, "one root is left", func() bool {
		a := n.list(t)
		return len(a.of("root", "active")) == 1 && len(a.of("root", "old"))+len(a.of("root", "published"))+len(a.of("root", "prepared")) == 0
	})
}

// another does something until another authority of a kind is active, and returns the ID
// of the former one.
func (n *nodes) another(t *testing.T, kind string, do func()) (former string) {
	t.Helper()
	former = n.list(t).of(kind, "active")[0]
	do()
	until(t, "another "+kind+" is active", func() bool { a := n.list(t).of(kind, "active"); return len(a) == 1 && a[0] != former })
	return former
}

// revoke revokes a tainted root when nobody is waited for.
func (n *nodes) revoke(t *testing.T, root string) {
	t.Helper()
	until(t, "nobody is waited for", func() bool { return len(n.list(t).GetRevocations()) == 0 })
	n.operate("revoke", root)
}

// presents are the serial of the leaf that an agent has for a proxy now, and the ID of
// the intermediate that issued it.
func (n *nodes) presents(t *testing.T, p proxy) (leaf, intermediate string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn := n.dialAt(p.socket)
	defer conn.Close()
	r, err := fetch(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+readFile(t, filepath.Join(n.dir, p.name+"-token"))), conn, "default")
	if err != nil {
		t.Fatal(err)
	}
	var secret tlsv3.Secret
	if err := r.GetResources()[0].UnmarshalTo(&secret); err != nil {
		t.Fatal(err)
	}
	chain := certificates(t, secret.GetTlsCertificate().GetCertificateChain().GetInlineBytes())
	id := func(i int) string { return hex.EncodeToString(chain[i].SerialNumber.FillBytes(make([]byte, 17))) }
	return id(0), id(1)
}

// uses reports whether an Envoy has a certificate with that serial.
func (p proxy) uses(t *testing.T, serial string) bool {
	t.Helper()
	resp, err := http.Get("http://" + p.Admin() + "/certs")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var in struct {
		Certificates []struct {
			Chain []struct {
				Serial string `json:"serial_number"`
			} `json:"cert_chain"`
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&in); err != nil {
		t.Fatal(err)
	}
	for _, c := range in.Certificates {
		for _, l := range c.Chain {
			if strings.TrimLeft(l.Serial, "0") == strings.TrimLeft(serial, "0") {
				return true
			}
		}
	}
	return false
}

// follow waits until both Envoys use an SVID that the intermediate issued which signs now.
func (n *nodes) follow(t *testing.T) {
	t.Helper()
	for _, p := range []proxy{n.client, n.server} {
		until(t, p.name+"'s Envoy has an SVID of the intermediate that signs now", func() bool {
			leaf, intermediate := n.presents(t, p)
			return slices.Contains(n.list(t).of("intermediate", "active"), intermediate) && p.uses(t, leaf)
		})
	}
}

// TestNoHandshakeFailsWhileAuthoritiesAreReplaced, under constant mTLS traffic between two
// Envoys on two agents: a phase ends when both have SVIDs of what signs then.
func TestNoHandshakeFailsWhileAuthoritiesAreReplaced(t *testing.T) {
	t.Parallel()
	const svids = "svid: {ttl: 15s, agentTTL: 15s, minTTL: 5s, maxTTL: 15s, backdate: 1s}\n"
	hands := map[string]string{"by hand": ""}
	if *rotateFor > 0 {
		hands["by hand and with CRLs"] = "crl: {enabled: true}, "
	}
	for name, crl := range hands {
		t.Run(name, func(t *testing.T) {
			n := newNodes(t, "authority: {"+crl+"propagation: 1s, taintSpread: 1s}\n"+svids)
			for began := time.Now(); ; {
				n.replaceByHand(t)
				if t.Failed() || time.Since(began) > *rotateFor/time.Duration(len(hands)+1) {
					break
				}
			}
		})
	}
	if *rotateFor > 0 {
		t.Run("by schedule", func(t *testing.T) {
			n := newNodes(t, "authority: {propagation: 1s, taintSpread: 1s, intermediateTTL: 30s, rootTTL: 1m}\n"+svids)
			n.phase(t, fmt.Sprintf("by schedule, for %v", *rotateFor/3), func() {
				seen := map[string]map[string]bool{"root": {}, "intermediate": {}}
				began, kills, victims := time.Now(), 0, []string{"signet-ca", "signet-agent"}
				for killed := began; time.Since(began) < *rotateFor/3; time.Sleep(200 * time.Millisecond) {
					if time.Since(killed) > 7*time.Second { // a moment of a rotation that nothing chose
						n.stop(victims[0], syscall.SIGKILL)
						n.start(victims[0])
						killed, victims[0], victims[1] = time.Now(), victims[1], victims[0]
						kills++
					}
					a := n.list(t)
					for kind, ids := range seen {
						for _, id := range a.of(kind, "active") {
							ids[id] = true
						}
					}
				}
				t.Logf("note: %d roots and %d intermediates were active one after the other; the authority and node-a's agent were killed %d times", len(seen["root"]), len(seen["intermediate"]), kills)
				if *rotateFor > 3*time.Minute && len(seen["root"]) < 2 {
					t.Error("the root was not replaced")
				}
			})
		})
	}
}

func (n *nodes) replaceByHand(t *testing.T) {
	t.Helper()
	prepare := func() { n.operate("prepare") }
	n.phase(t, "another intermediate", func() { n.another(t, "intermediate", func() { n.operate("renew") }); n.follow(t) })
	n.phase(t, "the intermediate is tainted", func() {
		n.another(t, "intermediate", func() { n.operate("taint", n.list(t).of("intermediate", "active")[0]) })
		n.follow(t)
	})
	n.phase(t, "another root", func() { n.another(t, "root", prepare); n.follow(t) })
	n.phase(t, "the former root leaves when nothing below it is left", func() { n.settles(t) })
	n.phase(t, "another root, the former one is tainted and revoked", func() {
		former := n.another(t, "root", prepare)
		n.operate("taint", former)
		n.revoke(t, former)
		n.follow(t)
	})
	n.phase(t, "replace-root --now", func() {
		n.another(t, "root", func() { n.operate("replace-root", "--now") })
		n.follow(t)
		n.settles(t)
	})
}

// TestARotationNamesTheAgentThatIsStopped, waits for it, and is forced; what the list then
// says does not verify there until the agent is back, and then does.
func TestARotationNamesTheAgentThatIsStopped(t *testing.T) {
	t.Parallel()
	n := newNodes(t, "authority: {propagation: 1s, taintSpread: 1s}\nsvid: {ttl: 2m, agentTTL: 40s, minTTL: 5s, maxTTL: 2m, backdate: 1s}\n")
	first := n.list(t).of("root", "active")[0]
	// Envoy keeps what it has.
	n.stop("signet-agent", syscall.SIGKILL)
	n.phase(t, "node-a's agent is stopped: the next root waits", func() {
		n.operate("prepare")
		until(t, "only node-a is missing", func() bool {
			w := n.list(t).GetActivation()
			return slices.Equal(w.GetNodes(), []string{"node-a"}) && w.GetUntil() == nil
		})
		said, err := exec.Command(filepath.Join(n.bin, "signet"), "ca", "authority", "activate", "--socket", n.dir+"/ca/admin.sock").CombinedOutput()
		t.Logf("note: activate says: %s", bytes.TrimSpace(said))
		if err == nil || !bytes.Contains(said, []byte("nothing was done: it waits for the agents on node-a (")) {
			t.Errorf("it does not name node-a alone, or did not wait: %v", err)
		}
		if text := n.operate("list"); !strings.Contains(text, "it waits for the agents on node-a; ") {
			t.Errorf("list says\n%s", text)
		}
		until(t, "readiness names it", func() bool {
			ready, err := http.Get("http://" + n.http["signet-ca"] + "/readyz")
			if err != nil {
				t.Fatal(err)
			}
			defer ready.Body.Close()
			body, err := io.ReadAll(ready.Body)
			return err == nil && ready.StatusCode == 200 && strings.Contains(string(body), "node-a")
		})
		time.Sleep(time.Second)
		if n.list(t).of("root", "active")[0] != first {
			t.Error("it did not wait")
		}
	})
	before := n.handshakes(t)
	requests := load(t, 200, n.ask)
	t.Logf("note: activate --force says: %s", strings.TrimSpace(n.operate("activate", "--force")))
	if a := n.list(t); !slices.Equal(a.GetLacking(), []string{"node-a"}) {
		t.Errorf("the list does not say who lacks the root: %v", a.GetLacking())
	}
	n.operate("taint", first) // so that node-b's SVIDs are below the next root now, and not in a minute
	until(t, "node-a refuses what is below the root that it lacks", func() bool { return n.handshakes(t).failed > before.failed })
	good, failures := requests.stop()
	made := n.handshakes(t).less(before)
	t.Logf("note: %-52s        %4d requests, %d failed; handshakes: %4d at the client, %4d at the server, %d failed, as list says",
		"forced, node-a lacks the root", good, len(failures), made.client, made.server, made.failed)

	began := time.Now()
	n.start("signet-agent")
	until(t, "node-a does not lack it any more", func() bool { return len(n.list(t).GetLacking()) == 0 })
	becomes(t, 200, "/", func(string) int { return n.ask() })
	t.Logf("note: %.1f s after its start the agent on node-a is well again", time.Since(began).Seconds())
	n.phase(t, "node-a is back, the former root is revoked", func() {
		n.revoke(t, first)
		n.follow(t)
		n.settles(t)
	})
	if out := n.signet("ca", "log", "list", "--socket", n.dir+"/ca/admin.sock"); !strings.Contains(out, "is activated; waiting: 1 nodes have not acknowledged it: node-a force") {
		t.Errorf("the issuance log does not say so:\n%s", out)
	}
}
