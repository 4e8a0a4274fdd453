package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/ca/capb"
)

// TestABanSaysWhoIsNotCounted: a replica knows its own agents.
func TestABanSaysWhoIsNotCounted(t *testing.T) {
	t.Parallel()
	said := func(others uint32) string {
		var out bytes.Buffer
		o := jsonBanAdded{Ban: jsonBan{Subject: "spiffe://td/ns/a/sa/b"}, Agents: []jsonBanAgent{{Node: "n", Connected: true, Enforces: true}}, OtherReplicas: others}
		o.NotEnforcedBy = notEnforcedBy(&capb.AddBanResponse{Ban: &capb.BanRecord{Subject: o.Ban.Subject}}, others)
		if err := o.print(&out); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	const others, cutOff = "agents of the other replicas, 2, are not among them", "agents of a replica that is cut off from etcd"
	if s := said(2); !strings.Contains(s, "agents: 1 of 1 deny it\n  "+others) || !strings.Contains(s, "  "+cutOff) {
		t.Errorf("of three replicas:\n%s", s)
	}
	if s := said(0); strings.Contains(s, "replica") {
		t.Errorf("where there is one authority:\n%s", s)
	}
}
