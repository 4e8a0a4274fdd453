package sds_test

import (
	"strings"
	"testing"
)

var deltaCases = []struct{ name, script string }{
	{"a name that exists is sent at once", `
		set default 1
		+ default
		go
		< default=1
		ack
		quiet`},
	{"an unknown name is said not to exist, once, and the stream stays", `
		set default 1
		+ default nosuch
		go
		< default=1 -nosuch
		ack
		set default 2
		< default=2
		ack
		set nosuch 1
		< nosuch=1
		metric signet_sds_omitted_names_total 1`},
	{"a name without content is not said to be gone, and comes later", `
		pending default
		set ROOTCA r1
		+ default ROOTCA
		go
		< ROOTCA=r1
		ack
		quiet
		set default 1
		< default=1`},
	{"a resource that loses its content is not taken away", `
		set default 1
		+ default
		go
		< default=1
		ack
		pending default
		quiet`},
	{"only what changed is sent", `
		set default 1
		set ROOTCA r1
		+ default ROOTCA
		go
		< ROOTCA=r1 default=1
		ack
		set default 2
		< default=2
		ack
		set ROOTCA r2
		< ROOTCA=r2`},
	{"a resource that goes is said to be gone", `
		set default 1
		+ default
		go
		< default=1
		ack
		drop default
		< -default
		ack
		quiet
		set default 1
		< default=1`},
	{"a reconnecting client with the same version is sent nothing", `
		set default 1
		set ROOTCA r1
		+ default ROOTCA
		resume default=1 ROOTCA=r1
		go
		quiet
		set ROOTCA r2
		< ROOTCA=r2`},
	{"a reconnecting client with an older version is sent that one", `
		set default 2
		set ROOTCA r1
		+ default ROOTCA
		resume default=1 ROOTCA=r1
		go
		< default=2`},
	{"a reconnecting client learns what is gone", `
		set default 1
		+ default old
		resume default=1 old=1
		go
		< -old`},
	{"a reconnecting client of the wildcard learns what is gone", `
		set default 1
		resume default=1 old=1
		go
		< -old`},
	{"versions of names that are not asked for do not matter", `
		set default 1
		+ default
		resume default=1 other=1
		go
		quiet
		set other 2
		quiet`},
	{"versions count in the first request only", `
		set default 1
		set ROOTCA r1
		+ default
		go
		< default=1
		+ ROOTCA
		resume ROOTCA=r1
		go
		< ROOTCA=r1`},
	{"a first request without names is the wildcard", `
		set default 1
		set ROOTCA r1
		go
		< ROOTCA=r1 default=1
		ack
		drop ROOTCA
		< -ROOTCA`},
	{"the wildcard can be left", `
		set default 1
		set ROOTCA r1
		go
		< ROOTCA=r1 default=1
		ack
		+ default
		- *
		go
		< default=1
		ack
		set ROOTCA r2
		quiet
		set default 2
		< default=2`},
	{"a name subscribed to again is sent again in the same version", `
		set default 1
		+ default
		go
		< default=1
		ack
		+ default
		go
		< default=1
		ack
		quiet`},
	{"an unknown name subscribed to again is said to be gone again", `
		+ nosuch
		go
		< -nosuch
		ack
		+ nosuch
		go
		< -nosuch`},
	{"an unsubscribed name is not followed", `
		set default 1
		set ROOTCA r1
		+ default ROOTCA
		go
		< ROOTCA=r1 default=1
		ack
		- ROOTCA
		go
		quiet
		set ROOTCA r2
		quiet`},
	{"unsubscribing everything leaves a quiet stream that can be used again", `
		set default 1
		+ default
		go
		< default=1
		ack
		- default
		go
		quiet
		set default 2
		quiet
		+ default
		go
		< default=2`},
	{"unsubscribing a name that was never asked for does nothing", `
		set default 1
		+ default
		go
		< default=1
		- other
		go
		quiet`},
	{"unsubscribing a name that the wildcard gives sends it again", `
		set default 1
		+ * default
		go
		< default=1
		ack
		- default
		go
		< default=1`},
	{"unsubscribing a name that the wildcard does not give says that it is gone", `
		set default 1
		set mine 1
		+ * mine
		go
		< default=1 mine=1
		ack
		- mine
		go
		< -mine`},
	{"a refused response is not sent again, the next version is", `
		set default 1
		+ default
		go
		< default=1
		nack bad certificate
		again
		quiet
		sleep 1h
		quiet
		metric signet_sds_nacks_total 1
		log bad certificate
		set default 2
		< default=2`},
	{"names in an answer to an older response count", `
		set default 1
		set ROOTCA r1
		+ default
		go
		< default=1
		set default 2
		< default=2
		+ ROOTCA
		old ack
		< ROOTCA=r1`},
	{"a nonce that was never sent is no answer, and its names count", `
		set default 1
		set ROOTCA r1 3
		+ ROOTCA
		go
		< ROOTCA=r1
		raw nonce=99 names=default
		< default=1
		trust 3 0
		old ack
		trust 3 3
		raw nonce=-1 error=x
		raw nonce=xyz error=x
		quiet
		metric signet_sds_nacks_total 0`},
	{"another type ends the stream", `
		raw type=bad names=default
		end InvalidArgument type URL is "bad"`},
	{"too many names in one request end the stream", `
		+ ` + strings.Repeat("x ", 257) + `
		go
		end InvalidArgument asks for 257 names`},
	{"too many names in all end the stream", `
		+ ` + numbered("a", 200) + `
		go
		< ` + numbered("-a", 200) + `
		+ ` + numbered("b", 57) + `
		go
		end InvalidArgument asks for 257 names`},
	{"too many known versions end the stream", `
		+ default
		resume ` + numbered("a", 257) + `
		go
		end InvalidArgument asks for 257 names`},
	{"a name that is too long ends the stream", `
		+ ` + strings.Repeat("x", 2049) + `
		go
		end InvalidArgument a resource name has 2049 bytes`},
	{"a known version that is too long ends the stream", `
		+ a
		resume a=` + strings.Repeat("x", 2049) + `
		go
		end InvalidArgument a resource name has 2049 bytes`},
	{"a source that fails makes nothing gone", `
		set default 1
		fail out of order
		+ default nosuch
		go
		< default=1
		ack
		quiet
		heal
		sleep 5s
		< -nosuch`},
	{"what the source sends unasked does not go out", `
		set default 1
		extra key-of-another 9
		+ default
		go
		< default=1`},
	{"the end of the proof ends the stream", `
		+ default
		go
		< -default
		expire
		end Unavailable the proof of identity expires; reconnect with a fresh token`},
}

func TestDelta(t *testing.T) {
	for _, c := range deltaCases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			play(t, true, c.script)
		})
	}
}
