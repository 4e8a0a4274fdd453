package attest_test

import (
	"testing"
	"time"

	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
)

// TestTokensByAWrongClock: a machine's clock that is off is a token that was made at
// another time. By a wrong year every token is refused, and by the right clock the same
// verifier takes the next one.
func TestTokensByAWrongClock(t *testing.T) {
	t.Parallel()
	const year = 365 * 24 * time.Hour
	w := newWorld(t)
	for _, c := range []struct {
		name string
		off  time.Duration // of the machine's clock
		says string        // why it is refused; empty: it is not
	}{
		{"-5m", -5 * time.Minute, "in the future"}, // the skew is a minute
		{"+5m", 5 * time.Minute, ""},
		{"+11m", 11 * time.Minute, "expired"}, // tokens of ten minutes
		{"-1y", -year, "in the future"},
		{"+1y", year, "expired"},
	} {
		token := w.issuer.Token(server, audience, attesttest.Issued(time.Now().Add(-c.off)))
		if c.says == "" {
			w.accept(t, token)
		} else {
			w.refuse(t, token, attest.ErrRefused, c.says)
		}
		w.accept(t, w.issuer.Token(server, audience))
		t.Logf("note: tokens, clock %s: refused %t; right again: accepted", c.name, c.says != "")
	}
}
