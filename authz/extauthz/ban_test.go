package extauthz_test

import (
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/identity"
)

// TestBansDenyChecks: of requests and of connections, by name and by certificate.
func TestBansDenyChecks(t *testing.T) {
	t.Parallel()
	serial, err := identity.ParseBanSubject("serial/01") // certificate makes that
	if err != nil {
		t.Fatal(err)
	}
	name, err := identity.ParseBanSubject(client)
	if err != nil {
		t.Fatal(err)
	}
	svid := certificate(t, "", nil, client)
	withCertificate := func(a *authv3.AttributeContext) { a.Source.Certificate = svid }
	tcp := func(a *authv3.AttributeContext) { a.Request = nil }
	for what, c := range map[string]struct {
		ban    identity.BanSubject
		change []func(*authv3.AttributeContext)
		denied bool
	}{
		"a name, HTTP":                            {name, nil, true},
		"a name, TCP":                             {name, []func(*authv3.AttributeContext){tcp}, true},
		"a certificate, HTTP":                     {serial, []func(*authv3.AttributeContext){withCertificate}, true},
		"a certificate, TCP":                      {serial, []func(*authv3.AttributeContext){withCertificate, tcp}, true},
		"a certificate that the proxy keeps back": {serial, nil, false},
	} {
		snapshot := compile(t, "").WithBans(identity.NewBans([]identity.Ban{{Subject: c.ban, Reason: "stolen"}}))
		var got extauthz.Record
		w := newWorldWith(t, extauthz.Config{Snapshot: fixed(snapshot), Records: recordFunc(func(r *extauthz.Record) { got = *r })})
		resp, err := w.Check(as(server), check(c.change...))
		if err != nil {
			t.Fatal(err)
		}
		if denied := resp.GetDeniedResponse() != nil; denied != c.denied {
			t.Errorf("%s: %v", what, resp)
		}
		if !c.denied {
			continue
		}
		if got.Decision.Reason != authz.ReasonBanned || got.Decision.Policy != c.ban.String() {
			t.Errorf("%s: recorded %+v", what, got.Decision)
		}
		if m := resp.GetDynamicMetadata().GetFields(); m["reason"].GetStringValue() != "banned" || m["policy"].GetStringValue() != c.ban.String() || m["kind"].GetStringValue() != "Ban" {
			t.Errorf("%s: %v", what, m)
		}
		if log := w.log.String(); !strings.Contains(log, "stolen") || !strings.Contains(log, "reason=banned") {
			t.Errorf("%s: logged %s", what, log)
		}
	}
}

type recordFunc func(*extauthz.Record)

func (f recordFunc) Add(r *extauthz.Record) { f(r) }
