package istio_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/istio"
	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	pb "istio.io/api/security/v1alpha1"
)

const serverID = "spiffe://cluster.local/ns/default/sa/server"

func (w *world) token(p identity.Workload) edit { return bearer(w.issuer.Token(p, "istio-ca")) }

// TestRenewalIsOffByDefault: a certificate alone proves nothing, a token beside it
// does.
func TestRenewalIsOffByDefault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.allow(t, serverID, w.token(server))
	w.deny(t, codes.Unauthenticated, msgCaller, with(c))
	w.allow(t, serverID, with(c), w.token(server))
}

func TestRenewalByCertificate(t *testing.T) {
	t.Parallel()
	w := newWorld(t, renewalFor("default/server"))
	first := w.allow(t, serverID, w.token(server))
	second := w.allow(t, serverID, with(first))
	r := w.record(second.Leaf)
	if r.Evidence.String() != "EVIDENCE_RENEWAL" || string(r.Requester) != string(ca.Serial(first.Leaf)) || r.PodUid != server.PodUID ||
		r.TokenAt != w.record(first.Leaf).TokenAt || r.TokenAt == 0 {
		t.Errorf("record %v", r)
	}
	third := w.allow(t, serverID, with(second))
	w.allow(t, serverID, with(first)) // an answer may have been lost

	// Accounts for which it is not on, and certificates of other kinds.
	other := w.allow(t, "spiffe://cluster.local/ns/default/sa/client", w.token(client))
	w.deny(t, codes.Unauthenticated, msgCaller, with(other))
	w.deny(t, codes.Unauthenticated, msgImpersonate, with(third), as(serverID))
	zt := w.allow(t, serverID, w.token(ztunnel), as(serverID))
	w.deny(t, codes.Unauthenticated, msgCaller, with(zt))
	serving, _, err := w.authority.IssueServing(t.Context(), "test", spiffeid.RequireFromString(serverID), nil)
	if err != nil {
		t.Fatal(err)
	}
	w.deny(t, codes.Unauthenticated, msgCaller, with(serving))
	w.deny(t, codes.Unauthenticated, msgCaller, with(third), md("clusterid", "remote"))

	// The pod must be alive, and be the same.
	w.pods.Delete(server.PodUID)
	w.deny(t, codes.Unauthenticated, msgCaller, with(third))
	changed := server
	changed.Node = "node-b"
	w.pods.Set(changed)
	w.deny(t, codes.Unauthenticated, msgCaller, with(third))
	w.pods.Set(server)
	w.allow(t, serverID, with(third))
}

// TestARevokedCertificateDoesNotRenew over the connection on which it did before: what was
// verified for the handshake does not say that it was not revoked since.
func TestARevokedCertificateDoesNotRenew(t *testing.T) {
	t.Parallel()
	w := newWorld(t, renewalFor("default/server"))
	first := w.allow(t, serverID, w.token(server))
	conn := w.dial(first)
	renew := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := conn.CreateCertificate(ctx, &pb.IstioCertificateRequest{Csr: csrPEM(t, newKey(t), &x509.CertificateRequest{})})
		return err
	}
	for range 2 { // the second time nothing is verified
		if err := renew(); err != nil {
			t.Fatal(err)
		}
	}
	n := w.records()
	w.revoke(first)
	if err := renew(); status.Code(err) != codes.Unauthenticated || status.Convert(err).Message() != msgCaller {
		t.Errorf("after it was revoked: %v", err)
	}
	if got := w.records(); got != n {
		t.Errorf("%d certificates were issued after it was revoked", got-n)
	}
	// A token is another proof, and so is another certificate.
	w.allow(t, serverID, with(w.allow(t, serverID, w.token(server))))
}

// revoke has an operator revoke a certificate.
func (w *world) revoke(c *tls.Certificate) {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), "a")
	listener, err := net.Listen("unix", path)
	if err != nil {
		w.t.Fatal(err)
	}
	s := w.authority.NewAdminServer()
	var done sync.WaitGroup
	done.Go(func() { _ = s.Serve(listener) })
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { conn.Close(); s.Stop(); done.Wait() }()
	if _, err := capb.NewAdminClient(conn).Revoke(w.t.Context(), &capb.RevokeRequest{Serial: ca.Serial(c.Leaf), Reason: 1}); err != nil {
		w.t.Fatal(err)
	}
}

// TestAForeignCertificateEndsTheHandshake, as in istiod: before any RPC.
func TestAForeignCertificateEndsTheHandshake(t *testing.T) {
	t.Parallel()
	w, foreign := newWorld(t, renewalFor("*/*")), newWorld(t)
	c := foreign.allow(t, serverID, foreign.token(server))
	if _, _, err := w.try(with(c), w.token(server)); status.Code(err) != codes.Unavailable {
		t.Errorf("%v; want a failed handshake", err)
	}
}

// TestRenewalEndsAtTheMaximumAge: a chain of renewals does not outlive the token
// that it goes back to, also not by a restart.
func TestRenewalEndsAtTheMaximumAge(t *testing.T) {
	t.Parallel()
	const age = 8 * time.Second
	w := newWorld(t, renewalFor("default/*"), func(w *world) { w.cfg.MaxTokenAge = age })
	start := time.Now()
	c := w.allow(t, serverID, w.token(server))
	c = w.allow(t, serverID, with(c))
	w.restart()
	if time.Since(start) < age/2 {
		c = w.allow(t, serverID, with(c))
	}
	for deadline := start.Add(age + time.Minute); ; {
		next, key, err := w.try(with(c))
		if err != nil {
			if status.Code(err) != codes.Unauthenticated {
				t.Fatal(err)
			}
			break
		}
		c = w.checkChain(t, serverID, next.GetCertChain(), key)
		if time.Now().After(deadline) {
			t.Fatalf("still renewed %v after the token", time.Since(start))
		}
		time.Sleep(100 * time.Millisecond)
	}
	// Records have whole seconds.
	if after := time.Since(start); after < age-time.Second {
		t.Errorf("refused %v after the token", after)
	}
	// A fresh token begins anew.
	w.allow(t, serverID, with(w.allow(t, serverID, with(c), w.token(server))))
}

// TestRenewalSurvivesARestart: what may be renewed is read from the issuance log.
func TestRenewalSurvivesARestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, renewalFor("default/server"))
	c := w.allow(t, serverID, w.token(server))
	second := w.allow(t, serverID, with(c))
	w.allow(t, "spiffe://cluster.local/ns/default/sa/client", w.token(client))
	w.restart()
	if n := w.Renewable(); n != 2 {
		t.Errorf("%d certificates are remembered; want 2", n)
	}
	w.allow(t, serverID, with(w.allow(t, serverID, with(second))))
	// Turned off, it is off for what exists, too.
	w.cfg.RenewalFor = nil
	w.restart()
	w.deny(t, codes.Unauthenticated, msgCaller, with(c))
}

// TestOnlyAFewCertificatesOfAPodAreRemembered: the least recently used go first,
// so one that is in use stays.
func TestOnlyAFewCertificatesOfAPodAreRemembered(t *testing.T) {
	t.Parallel()
	w := newWorld(t, renewalFor("default/server"))
	used := w.allow(t, serverID, w.token(server))
	idle := w.allow(t, serverID, w.token(server))
	number := func(i int) []byte {
		return binary.BigEndian.AppendUint64(make([]byte, 9, 17), uint64(i))
	}
	for i := range 2 * istio.MaxOfOnePod {
		w.Remember(number(i), server, time.Now(), time.Now().Add(time.Hour))
		if i%(istio.MaxOfOnePod/4) == 0 {
			w.allow(t, serverID, with(used))
		}
	}
	if n := w.Renewable(); n != istio.MaxOfOnePod {
		t.Errorf("%d are remembered; want %d", n, istio.MaxOfOnePod)
	}
	w.allow(t, serverID, with(used))
	w.deny(t, codes.Unauthenticated, msgCaller, with(idle))
	w.Forget(time.Now().Add(2 * time.Hour))
	if n := w.Renewable(); n != 0 {
		t.Errorf("%d are remembered after all expired", n)
	}
	w.deny(t, codes.Unauthenticated, msgCaller, with(used))
}

// TestAForgedSerialIsWorthNothing: the number alone, in a certificate of another
// account, does not renew.
func TestAForgedSerialIsWorthNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, renewalFor("*/*"))
	c := w.allow(t, "spiffe://cluster.local/ns/default/sa/client", w.token(client))
	// Another pod's record under this certificate's number.
	w.Remember(ca.Serial(c.Leaf), server, time.Now(), time.Now().Add(time.Hour))
	w.deny(t, codes.Unauthenticated, msgCaller, with(c))
}

// TestAnyPodOfANode: without a view, certificates renew too.
func TestAnyPodOfANode(t *testing.T) {
	t.Parallel()
	w := newWorld(t, renewalFor("*/*"), anyPodOf("node-a"))
	stranger := identity.Workload{Namespace: "any", ServiceAccount: "thing", Pod: "thing-0", PodUID: "uid-thing", Node: "node-a"}
	id := "spiffe://cluster.local/ns/any/sa/thing"
	w.allow(t, id, with(w.allow(t, id, w.token(stranger))))
	elsewhere := stranger
	elsewhere.Node, elsewhere.PodUID = "node-b", "uid-b"
	w.deny(t, codes.Unauthenticated, msgCaller, w.token(elsewhere))
	// A node account is still held to the pods that are known.
	w.deny(t, codes.Unauthenticated, msgImpersonate, w.token(ztunnel), as(id))
	w.allow(t, serverID, w.token(ztunnel), as(serverID))
}
