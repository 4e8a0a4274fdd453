package sds_test

import (
	"strings"
	"testing"

	"github.com/signet-mesh/signet/sds"
)

var sotwCases = []struct{ name, script string }{
	{"a name that exists is sent at once", `
		set default 1
		> default
		< default=1
		ack
		quiet`},
	{"several names come in one response, ordered", `
		set default 1
		set ROOTCA r1
		> default ROOTCA
		< ROOTCA=r1 default=1
		ack
		quiet`},
	{"a name asked for twice in one request is sent once", `
		set default 1
		> default default
		< default=1`},
	{"an unknown name is omitted and the stream stays", `
		set default 1
		> nosuch default
		< default=1
		ack
		set default 2
		< default=2
		metric signet_sds_omitted_names_total 1`},
	{"unknown names alone get no response, and the stream stays", `
		> nosuch
		quiet
		sleep 1h
		quiet
		set nosuch 1
		< nosuch=1`},
	{"an empty response is never sent, not even when the last resource goes", `
		set default 1
		> default
		< default=1
		ack
		drop default
		quiet`},
	{"a resource that went and came back is sent again", `
		set default 1
		> default
		< default=1
		ack
		drop default
		quiet
		set default 1
		< default=1`},
	{"a name without content is sent when it has some; others do not wait", `
		pending default
		set ROOTCA r1
		> default ROOTCA
		< ROOTCA=r1
		ack
		quiet
		sleep 10m
		set default 1
		< ROOTCA=r1 default=1
		metric signet_sds_omitted_names_total 0`},
	{"a resource that loses its content stays with the client", `
		set default 1
		> default
		< default=1
		ack
		pending default
		quiet
		set default 1
		quiet
		set default 2
		< default=2`},
	{"a rotation is pushed, before and after the acknowledgment", `
		set default 1
		> default
		< default=1
		set default 2
		< default=2
		ack
		set default 3
		< default=3
		metric signet_sds_pushes_total 3`},
	{"nothing is sent when the source wakes without a difference", `
		set default 1
		> default
		< default=1
		ack
		set default 1
		set other 5
		quiet`},
	{"a change of another name is not pushed", `
		set default 1
		set ROOTCA r1
		> default
		< default=1
		ack
		set ROOTCA r2
		quiet`},
	{"a refused response is not sent again", `
		set default 1
		> default
		< default=1
		ack
		set default 2
		< default=2
		nack bad certificate
		quiet
		sleep 1h
		quiet
		metric signet_sds_nacks_total 1`},
	{"after a refusal the next version is pushed", `
		set default 1
		> default
		< default=1
		nack bad certificate
		set default 2
		< default=2
		ack
		quiet`},
	{"after a refusal the earlier version is pushed when the source goes back to it", `
		set default 1
		> default
		< default=1
		ack
		set default 2
		< default=2
		nack bad certificate
		set default 1
		< default=1`},
	{"a refusal is logged and counted once, with the proxy's name made harmless", `
		set default 1
		> default
		< default=1
		nack no` + "\x07\x1b[2J" + `good
		again
		again
		quiet
		metric signet_sds_nacks_total 1
		log proxy="sidecar~pod-a��[31m"
		log err="no��[2Jgood"
		log pod_uid=pod-a`},
	{"a long refusal is cut", `
		set default 1
		> default
		< default=1
		nack ` + strings.Repeat("x", 5000) + `
		log err=` + strings.Repeat("x", 256) + `…
		nolog ` + strings.Repeat("x", 257)},
	{"new names after a refusal are answered, and are no acknowledgment", `
		set default 1 
		set ROOTCA r1 4
		> ROOTCA
		< ROOTCA=r1
		ack
		trust 4 4
		set ROOTCA r2 5
		< ROOTCA=r2
		nack bad
		> ROOTCA default
		< ROOTCA=r2 default=1
		trust 5 4`},
	{"the answer to an overtaken response is ignored", `
		set default 1
		> default
		< default=1
		set default 2
		< default=2
		old ack
		quiet
		old nack
		quiet
		metric signet_sds_nacks_total 0
		ack
		quiet`},
	{"a nonce of an earlier stream does not matter to a new one", `
		set default 1
		raw nonce=77 version=abc names=default
		< default=1`},
	{"a nonce that was never sent is ignored", `
		set default 1
		set ROOTCA r1
		> default
		< default=1
		raw nonce=nonsense names=ROOTCA
		quiet
		raw nonce=9 names=ROOTCA
		quiet`},
	{"a request without a nonce counts after a response too", `
		set default 1
		set ROOTCA r1
		> default
		< default=1
		raw names=default,ROOTCA
		< ROOTCA=r1 default=1
		raw names=default,ROOTCA
		quiet`},
	{"a name added later is sent", `
		set default 1
		set ROOTCA r1
		> default
		< default=1
		ack
		> default ROOTCA
		< ROOTCA=r1 default=1
		ack
		quiet`},
	{"a name taken away is not followed any more", `
		set default 1
		set ROOTCA r1
		> default ROOTCA
		< ROOTCA=r1 default=1
		ack
		> default
		quiet
		set ROOTCA r2
		quiet
		set default 2
		< default=2`},
	{"a name taken away and asked for again is sent again in the same version", `
		set default 1
		set ROOTCA r1
		> default ROOTCA
		< ROOTCA=r1 default=1
		ack
		> default
		quiet
		> default ROOTCA
		< ROOTCA=r1 default=1`},
	{"a name taken away and asked for again while the source fails is sent again", `
		set default 1
		set ROOTCA r1
		> default ROOTCA
		< ROOTCA=r1 default=1
		ack
		fail out of order
		> default
		quiet
		> default ROOTCA
		< ROOTCA=r1 default=1`},
	{"a first request without names is the wildcard, also when it is acknowledged", `
		set default 1
		set ROOTCA r1
		set secret-of-others 1
		>
		< ROOTCA=r1 default=1
		ack
		quiet
		set default 2
		< ROOTCA=r1 default=2`},
	{"the wildcard can be asked for by its name, with other names", `
		set default 1
		set ROOTCA r1
		set mine 1
		> * mine
		< ROOTCA=r1 default=1 mine=1`},
	{"an empty list after names means nothing, and the stream stays", `
		set default 1
		> default
		< default=1
		ack
		>
		quiet
		set default 2
		quiet
		> default
		< default=2`},
	{"an empty list after the wildcard by its name means nothing", `
		set default 1
		> *
		< default=1
		ack
		>
		quiet
		set default 2
		quiet`},
	{"names after the implied wildcard replace it", `
		set default 1
		set ROOTCA r1
		>
		< ROOTCA=r1 default=1
		ack
		> ROOTCA
		quiet
		set default 2
		quiet
		set ROOTCA r2
		< ROOTCA=r2`},
	{"no type means the service's own type", `
		set default 1
		raw names=default
		< default=1`},
	{"another type ends the stream", `
		raw type=type.googleapis.com/envoy.config.cluster.v3.Cluster names=x
		end InvalidArgument this service serves ` + sds.SecretType},
	{"another type later ends the stream", `
		set default 1
		> default
		< default=1
		raw type=bad names=default nonce=1
		end InvalidArgument type URL is "bad"`},
	{"too many names end the stream", `
		raw names=` + strings.Repeat("x,", 256) + `x
		end InvalidArgument asks for 257 names; at most 256`},
	{"a name that is too long ends the stream and is not repeated", `
		raw names=` + strings.Repeat("x", 1<<20) + `
		end InvalidArgument a resource name has 1048576 bytes; at most 2048 are allowed`},
	{"what the source sends unasked does not go out", `
		set default 1
		extra key-of-another 9
		extra default 9
		> default
		< default=1
		ack
		set default 2
		< default=2`},
	{"a source that fails takes nothing away and is asked again", `
		set default 1
		> default nosuch
		< default=1
		ack
		fail out of order
		quiet
		log out of order
		sleep 6s
		quiet
		set default 2
		< default=2
		ack
		metric signet_sds_omitted_names_total 1`},
	{"a source that fails at first is asked until it works", `
		fail out of order
		set ROOTCA r1
		> default ROOTCA
		< ROOTCA=r1
		ack
		metric signet_sds_omitted_names_total 0
		heal
		quiet
		sleep 5s
		metric signet_sds_omitted_names_total 1`},
	{"a failure of the source is logged once for each time that it begins", `
		fail out of order
		> default
		sleep 1m
		logged 1 out of order
		metric signet_sds_source_errors_total 13
		heal
		sleep 5s
		fail out of order
		sleep 1m
		logged 2 out of order`},
	{"the end of the proof ends the stream with a constant text", `
		set default 1
		> default
		< default=1
		expire
		end Unavailable the proof of identity expires; reconnect with a fresh token`},
	{"a stream that never asked ends with the proof too", `
		quiet
		expire
		end Unavailable`},
	{"a client that reconnects is sent what there is", `
		set default 1
		> default
		< default=1
		ack
		reconnect
		> default
		< default=1
		metric signet_sds_open_streams 1`},
	{"a client that sends without end is slowed down, not ended", `
		set a 1
		set b 1
		> a
		< a=1
		` + strings.Repeat("> b\n< b=1\n> a\n< a=1\n", 49) + `
		> b
		< b=1
		> a
		quiet
		sleep 101ms
		< a=1`},
}

func TestStateOfTheWorld(t *testing.T) {
	for _, c := range sotwCases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			play(t, false, c.script)
		})
	}
}
