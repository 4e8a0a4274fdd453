package ca_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest/attesttest"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestAnAgentGetsTheIdentitiesOfItsOwnNodeAndNoOther is a hand-made client with a
// good agent credential that tries everything else.
func TestAnAgentGetsTheIdentitiesOfItsOwnNodeAndNoOther(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, _ := w.attest(agentA)
	other := attesttest.NewIssuer(t)
	recreated := server
	recreated.PodUID = "uid-server-2"
	renamed := server
	renamed.ServiceAccount = "admin"
	moved := onNodeB
	moved.Node, moved.NodeUID = "node-a", "uid-node-a"
	const none = capb.Refusal_CODE_UNSPECIFIED
	for _, c := range []struct {
		name string
		item *capb.IssueItem
		code capb.Refusal_Code // none: issued
		id   string
	}{
		{"a token of a pod on its node is good", item(t, byToken(w.issuer.Token(server, "signet"))), none, "spiffe://cluster.local/ns/default/sa/server"},
		{"the UID of a pod on its node is good", item(t, byUID(client.PodUID)), none, "spiffe://cluster.local/ns/default/sa/client"},
		{"no evidence is refused", item(t, func(*capb.IssueItem) {}), capb.Refusal_CODE_EVIDENCE, ""},
		{"an empty token is refused", item(t, byToken("")), capb.Refusal_CODE_EVIDENCE, ""},
		{"an empty UID is refused", item(t, byUID("")), capb.Refusal_CODE_UNKNOWN_WORKLOAD, ""},
		{"the UID of a pod on another node is refused", item(t, byUID(onNodeB.PodUID)), capb.Refusal_CODE_OTHER_NODE, ""},
		{"the UID of another node's agent is refused", item(t, byUID(agentB.PodUID)), capb.Refusal_CODE_OTHER_NODE, ""},
		{"a token of a pod on another node is refused", item(t, byToken(w.issuer.Token(onNodeB, "signet"))), capb.Refusal_CODE_OTHER_NODE, ""},
		{"a token that lies about the node is refused", item(t, byToken(w.issuer.Token(moved, "signet"))), capb.Refusal_CODE_EVIDENCE, ""},
		{"an unknown UID is refused", item(t, byUID("uid-of-nobody")), capb.Refusal_CODE_UNKNOWN_WORKLOAD, ""},
		{"a token of a recreated pod is refused", item(t, byToken(w.issuer.Token(recreated, "signet"))), capb.Refusal_CODE_UNKNOWN_WORKLOAD, ""},
		{"a token with another service account than the pod's is refused", item(t, byToken(w.issuer.Token(renamed, "signet"))), capb.Refusal_CODE_EVIDENCE, ""},
		{"an agent's audience is refused", item(t, byToken(w.issuer.Token(server, "signet-ca"))), capb.Refusal_CODE_EVIDENCE, ""},
		{"a foreign issuer's token is refused", item(t, byToken(other.Token(server, "signet"))), capb.Refusal_CODE_EVIDENCE, ""},
		{"an expired token is refused", item(t, byToken(w.issuer.Token(server, "signet", attesttest.Issued(time.Now().Add(-time.Hour))))), capb.Refusal_CODE_EVIDENCE, ""},
		{"an unsigned token is refused", item(t, byToken(w.issuer.Token(server, "signet", attesttest.Unsigned()))), capb.Refusal_CODE_EVIDENCE, ""},
		{"a token with the public key as HMAC key is refused", item(t, byToken(w.issuer.Token(server, "signet", attesttest.HMAC(w.issuer.JWKS())))), capb.Refusal_CODE_EVIDENCE, ""},
		{"a token of 1 MB is refused", item(t, byToken(strings.Repeat("a", 1<<20))), capb.Refusal_CODE_EVIDENCE, ""},
		{"a UID of 1 MB is refused", item(t, byUID(strings.Repeat("a", 1<<20))), capb.Refusal_CODE_MALFORMED, ""},
		{"a missing kind is refused", item(t, func(i *capb.IssueItem) { byUID(server.PodUID)(i); i.Kind = nil }), capb.Refusal_CODE_UNSUPPORTED, ""},
		{"a JWT-SVID is refused", item(t, func(i *capb.IssueItem) {
			byUID(server.PodUID)(i)
			i.Kind = &capb.IssueItem_Jwt{Jwt: &capb.JWTKind{Audiences: []string{"a"}}}
		}), capb.Refusal_CODE_UNSUPPORTED, ""},
		{"a missing key is refused", item(t, func(i *capb.IssueItem) { byUID(server.PodUID)(i); i.PublicKey = nil }), capb.Refusal_CODE_MALFORMED, ""},
		{"a key of 1 MB is refused", item(t, func(i *capb.IssueItem) { byUID(server.PodUID)(i); i.PublicKey = make([]byte, 1<<20) }), capb.Refusal_CODE_MALFORMED, ""},
		{"an RSA key of 1024 bits is refused", item(t, func(i *capb.IssueItem) { byUID(server.PodUID)(i); i.PublicKey = rsaKey(t, 1024) }), capb.Refusal_CODE_MALFORMED, ""},
		{"an RSA key of 2048 bits is good", item(t, func(i *capb.IssueItem) { byUID(server.PodUID)(i); i.PublicKey = rsaKey(t, 2048) }), none, "spiffe://cluster.local/ns/default/sa/server"},
		{"an Ed25519 key is good", item(t, func(i *capb.IssueItem) { byUID(server.PodUID)(i); i.PublicKey = edKey(t) }), none, "spiffe://cluster.local/ns/default/sa/server"},
		{"a P-384 key is good", item(t, func(i *capb.IssueItem) { byUID(server.PodUID)(i); i.PublicKey = ecKey(t, elliptic.P384()) }), none, "spiffe://cluster.local/ns/default/sa/server"},
		{"a P-521 key is good", item(t, func(i *capb.IssueItem) { byUID(server.PodUID)(i); i.PublicKey = ecKey(t, elliptic.P521()) }), none, "spiffe://cluster.local/ns/default/sa/server"},
		{"a P-224 key is refused", item(t, func(i *capb.IssueItem) { byUID(server.PodUID)(i); i.PublicKey = ecKey(t, elliptic.P224()) }), capb.Refusal_CODE_MALFORMED, ""},
		{"a key with bytes behind it is refused", item(t, func(i *capb.IssueItem) { byUID(server.PodUID)(i); i.PublicKey = append(i.PublicKey, 0) }), capb.Refusal_CODE_MALFORMED, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			// Beside a good item: one bad item must fail alone.
			before := w.Log().Head().Sequence
			rs, err := issue(t, a, item(t, byUID(server.PodUID)), c.item)
			if err != nil {
				t.Fatal(err)
			}
			verify(t, w, rs[0].GetX509(), "spiffe://cluster.local/ns/default/sa/server")
			if got := rs[1].GetRefusal().GetCode(); got != c.code {
				t.Fatalf("got %v (%s), want %v", got, rs[1].GetRefusal().GetMessage(), c.code)
			}
			recorded := w.Log().Head().Sequence - before
			if c.code == none {
				verify(t, w, rs[1].GetX509(), c.id)
			} else if rs[1].GetX509() != nil || recorded != 1 {
				t.Errorf("a refused item left %d records", recorded-1)
			}
		})
	}
}

// verify checks an SVID as a peer would, and that it is on record.
func verify(t *testing.T, w *world, s *capb.X509SVID, want string) *x509.Certificate {
	t.Helper()
	var chain []*x509.Certificate
	for _, der := range s.GetChain() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	if len(chain) != 2 {
		t.Fatalf("chain of %d certificates", len(chain))
	}
	trust, _ := w.Trust()
	id, _, err := x509svid.Verify(chain, trust)
	if err != nil {
		t.Fatal(err)
	}
	own, err := identity.CheckSVID(chain[0])
	if err != nil || own != id || id.String() != want || s.GetSpiffeId() != want {
		t.Errorf("it names %s (%s), %v; want %s", id, s.GetSpiffeId(), err, want)
	}
	if !w.recorded(chain[0]) {
		t.Error("it is not in the issuance log")
	}
	renew := s.GetRenewAt().AsTime()
	if !renew.After(time.Now()) || !renew.Before(chain[0].NotAfter) {
		t.Errorf("renewal at %s, valid until %s", renew, chain[0].NotAfter)
	}
	return chain[0]
}

func rsaKey(t *testing.T, bits int) []byte {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return spki(t, k.Public())
}

func edKey(t *testing.T) []byte {
	t.Helper()
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return spki(t, pub)
}

func ecKey(t *testing.T, c elliptic.Curve) []byte {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return spki(t, k.Public())
}

func TestWhoMayBeAnAgent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	token := func(p identity.Workload, audience string, edits ...attesttest.Edit) func(*capb.AttestRequest) {
		return func(r *capb.AttestRequest) {
			r.Evidence = &capb.AttestRequest_Token{Token: w.issuer.Token(p, audience, edits...)}
		}
	}
	for _, c := range []struct {
		name string
		edit func(*capb.AttestRequest)
		code codes.Code
	}{
		{"an agent's token is good", token(agentA, "signet-ca"), codes.OK},
		{"no evidence is refused", func(*capb.AttestRequest) {}, codes.InvalidArgument},
		{"a workload's audience is refused", token(agentA, "signet"), codes.Unauthenticated},
		{"a workload's account is refused", token(server, "signet-ca"), codes.PermissionDenied},
		{"an agent pod that is not known yet may come again", token(identity.Workload{Namespace: "signet-system", ServiceAccount: "signet-agent", Pod: "x", PodUID: "x", Node: "node-a"}, "signet-ca"), codes.Unavailable},
		{"an agent pod of another node than it says is refused", token(identity.Workload{Namespace: "signet-system", ServiceAccount: "signet-agent", Pod: "agent-a", PodUID: "uid-agent-a", Node: "node-b"}, "signet-ca"), codes.Unauthenticated},
		{"a node that was replaced is refused", token(identity.Workload{Namespace: "signet-system", ServiceAccount: "signet-agent", Pod: "agent-a", PodUID: "uid-agent-a", Node: "node-a", NodeUID: "other"}, "signet-ca"), codes.Unauthenticated},
		{"an expired token is refused", token(agentA, "signet-ca", attesttest.Issued(time.Now().Add(-time.Hour))), codes.Unauthenticated},
		{"a token without a node is refused", token(agentA, "signet-ca", attesttest.Without("kubernetes.io/node")), codes.Unauthenticated},
		{"a token without a pod is refused", token(agentA, "signet-ca", attesttest.Without("kubernetes.io/pod")), codes.Unauthenticated},
		{"renewal without an SVID is refused", func(r *capb.AttestRequest) { r.Evidence = &capb.AttestRequest_Renewal{Renewal: &capb.Renewal{}} }, codes.Unauthenticated},
		{"a missing key is refused", func(r *capb.AttestRequest) { token(agentA, "signet-ca")(r); r.PublicKey = nil }, codes.InvalidArgument},
		{"a version of 1 MB is refused", func(r *capb.AttestRequest) { token(agentA, "signet-ca")(r); r.Version = strings.Repeat("v", 1<<20) }, codes.InvalidArgument},
		{"a token of 1 MB is refused", func(r *capb.AttestRequest) {
			r.Evidence = &capb.AttestRequest_Token{Token: strings.Repeat("a", 1<<20)}
		}, codes.Unauthenticated},
	} {
		t.Run(c.name, func(t *testing.T) {
			cert, err := w.tryAttest(w.dial(nil), c.edit)
			if status.Code(err) != c.code {
				t.Fatalf("got %v, want %v", err, c.code)
			}
			if err == nil {
				id, err := identity.CheckSVID(cert.Leaf)
				if node, ok := identity.AgentNode(id); err != nil || !ok || node != "node-a" {
					t.Errorf("SVID names %s, %v", id, err)
				}
			}
		})
	}
}

// TestOnlyALiveAgentIsServed: every other method wants an agent SVID that is on
// record, of a pod and node that are alive.
func TestOnlyALiveAgentIsServed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, certA := w.attest(agentA)
	key, pub := newKey(t)
	rs, err := issue(t, a, &capb.IssueItem{PublicKey: pub, Evidence: &capb.IssueItem_PodUid{PodUid: server.PodUID}, Kind: &capb.IssueItem_X509{X509: &capb.X509Kind{}}})
	if err != nil {
		t.Fatal(err)
	}
	workload := &tls.Certificate{Certificate: rs[0].GetX509().GetChain(), PrivateKey: key}
	refused := func(t *testing.T, c capb.AuthorityClient, want codes.Code) {
		t.Helper()
		if _, err := issue(t, c, item(t, byUID(server.PodUID))); status.Code(err) != want {
			t.Errorf("Issue: %v, want %v", err, want)
		}
		trust, err := c.WatchTrust(t.Context())
		if err == nil {
			_, err = trust.Recv()
		}
		if status.Code(err) != want {
			t.Errorf("WatchTrust: %v, want %v", err, want)
		}
		node, err := c.WatchNode(t.Context(), &capb.WatchNodeRequest{})
		if err == nil {
			_, err = node.Recv()
		}
		if status.Code(err) != want {
			t.Errorf("WatchNode: %v, want %v", err, want)
		}
	}
	t.Run("nobody", func(t *testing.T) { refused(t, w.dial(nil), codes.Unauthenticated) })
	t.Run("a workload", func(t *testing.T) { refused(t, w.dial(workload), codes.PermissionDenied) })
	t.Run("an agent of another authority", func(t *testing.T) {
		other := newWorld(t)
		_, foreign := other.attest(agentA)
		refused(t, w.dial(foreign), codes.Unavailable) // the handshake fails
	})
	t.Run("an agent whose record is gone", func(t *testing.T) {
		other := newWorld(t)
		_, cert := other.attest(agentA)
		// The same root, another store: a restored backup.
		if _, ok := other.Store().Get(t.Context(), "journal"); ok != nil {
			t.Fatal(ok)
		}
		entries, _, err := other.Store().List(t.Context(), "agents/")
		if err != nil || len(entries) != 1 {
			t.Fatal(entries, err)
		}
		other.forget(entries[0].Key)
		refused(t, other.dial(cert), codes.PermissionDenied)
	})
	t.Run("an agent whose account was taken off the list", func(t *testing.T) {
		other := newWorld(t)
		c, cert := other.attest(agentA)
		if _, err := issue(t, c, item(t, byUID(server.PodUID))); err != nil {
			t.Fatal(err)
		}
		renew := func(r *capb.AttestRequest) {
			r.Evidence = &capb.AttestRequest_Renewal{Renewal: &capb.Renewal{}}
		}
		if _, err := other.tryAttest(c, renew); err != nil {
			t.Fatal(err)
		}
		other.close()
		other.cfg.Agents = other.attestor("signet-ca", "signet-system/other")
		other.open()
		refused(t, other.dial(cert), codes.PermissionDenied)
		if _, err := other.tryAttest(other.dial(cert), renew); status.Code(err) != codes.PermissionDenied {
			t.Errorf("renewal: %v", err)
		}
	})
	t.Run("an agent whose pod is gone, while its streams are open", func(t *testing.T) {
		s, err := a.WatchNode(t.Context(), &capb.WatchNodeRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		w.pods.Delete(agentA.PodUID)
		for err == nil {
			_, err = s.Recv()
		}
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("the open stream ended with %v", err)
		}
		refused(t, w.dial(certA), codes.PermissionDenied)
		_, err = w.tryAttest(w.dial(certA), func(r *capb.AttestRequest) { r.Evidence = &capb.AttestRequest_Renewal{Renewal: &capb.Renewal{}} })
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("renewal: %v", err)
		}
		w.pods.Set(agentA)
	})
	t.Run("an agent whose node was replaced under the same name", func(t *testing.T) {
		replaced := agentA
		replaced.NodeUID = "uid-node-a-2"
		w.pods.Set(replaced)
		defer w.pods.Set(agentA)
		refused(t, w.dial(certA), codes.PermissionDenied)
	})
	t.Run("and again when all is well", func(t *testing.T) {
		if _, err := issue(t, w.dial(certA), item(t, byUID(server.PodUID))); err != nil {
			t.Error(err)
		}
	})
}

// forget removes a record and opens the authority again.
func (w *world) forget(key string) {
	w.t.Helper()
	if err := deleteKey(w.t, w.Store(), key); err != nil {
		w.t.Fatal(err)
	}
	w.close()
	w.open()
}

func TestABatchThatIsTooLargeIsRefusedWhole(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, _ := w.attest(agentA)
	before := w.Log().Head().Sequence
	one := item(t, byUID(server.PodUID))
	var items []*capb.IssueItem
	for range 10_000 {
		items = append(items, one)
	}
	if _, err := issue(t, a, items...); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "at most 256") {
		t.Errorf("10,000 items: %v", err)
	}
	if n := w.Log().Head().Sequence - before; n != 0 {
		t.Errorf("%d records were written", n)
	}
	if _, err := issue(t, a); err != nil {
		t.Errorf("an empty batch: %v", err)
	}
	if rs, err := issue(t, a, items[:256]...); err != nil || rs[255].GetX509() == nil {
		t.Errorf("256 items: %v", err)
	}
}
