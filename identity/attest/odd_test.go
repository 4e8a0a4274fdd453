package attest_test

import (
	"testing"
	"time"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
)

// TestAnyPodOfANode: only on the nodes that are named is a token enough, and what
// the view knows of a pod still counts there.
func TestAnyPodOfANode(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *attest.Config) { c.AnyPodOf = []string{"node-a"} })
	stranger := identity.Workload{Namespace: "any", ServiceAccount: "thing", Pod: "thing-0", PodUID: "uid-thing", Node: "node-a"}
	got, _, err := w.Attest(t.Context(), attest.Evidence{Token: w.issuer.Token(stranger, audience)})
	if err != nil || !got.Equal(stranger) {
		t.Errorf("a pod of node-a proved %v, %v", got, err)
	}
	elsewhere := stranger
	elsewhere.Node, elsewhere.PodUID = "node-b", "uid-other"
	w.refuse(t, w.issuer.Token(elsewhere, audience), attest.ErrUnknownPod, "uid-other")
	w.accept(t, w.issuer.Token(server, audience))
	w.refuse(t, w.issuer.Token(server, audience, attesttest.Claim("kubernetes.io/pod/name", "another")), attest.ErrRefused, "view")
}

// TestExtendedTokens: a token that the API server extended to a year holds until
// it would have expired, and not at all where that is not configured.
func TestExtendedTokens(t *testing.T) {
	t.Parallel()
	issued := time.Now().Add(-time.Minute)
	extended := func(i *attesttest.Issuer, warn time.Duration) string {
		return i.Token(server, audience, attesttest.Issued(issued), attesttest.TTL(365*24*time.Hour),
			attesttest.Claim("kubernetes.io/warnafter", issued.Add(warn).Unix()))
	}
	w := newWorld(t, func(c *attest.Config) { c.Extended = true })
	good := extended(w.issuer, time.Hour)
	w.accept(t, good)
	_, until, err := w.Attest(t.Context(), attest.Evidence{Token: good})
	if want := issued.Add(time.Hour).Truncate(time.Second); err != nil || !until.Equal(want) {
		t.Errorf("it holds until %v, %v; want %v", until, err, want)
	}
	w.refuse(t, extended(w.issuer, 30*time.Second), attest.ErrRefused, "expired")
	w.refuse(t, w.issuer.Token(server, audience, attesttest.TTL(365*24*time.Hour)), attest.ErrRefused, "lifetime")
	strict := newWorld(t)
	strict.refuse(t, extended(strict.issuer, time.Hour), attest.ErrRefused, "lifetime")
}
