package sds

import (
	"maps"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"
)

// sotw is the state-of-the-world protocol on one stream: each request lists all
// the names that the client wants, each response holds all the resources that
// exist of them.
type sotw struct {
	subscription
	typeURL string
	// implied: the wildcard comes from a first request without names.
	implied bool
	version string // of the newest response
}

func (p *sotw) request(r *discoveryv3.DiscoveryRequest) (ev event, err error) {
	if err := checkType(r.GetTypeUrl(), p.typeURL); err != nil {
		return event{}, err
	}
	if err := checkNames(r.GetResourceNames()); err != nil {
		return event{}, err
	}
	first := !p.started
	if first {
		p.start(r.GetNode())
	}
	// A nonce means something after the first response only; what a client may
	// bring from an earlier stream is nothing to this one.
	if nonce := r.GetResponseNonce(); p.nonce > 0 && nonce != "" {
		if nonce != nonceText(p.nonce) {
			// The request answers a response that another one has overtaken. Its
			// names come again with the answer to that.
			return event{}, nil
		}
		switch {
		case r.GetErrorDetail() != nil:
			ev = p.refuse(p.nonce, r.GetErrorDetail().GetMessage())
		case r.GetVersionInfo() == p.version:
			p.acknowledge(p.nonce)
		default:
			// After a refusal, a request for other names has the version that the
			// client still uses, and no error: no acknowledgment.
		}
	}
	ev.ask = p.subscribe(r.GetResourceNames(), first) || first
	return ev, nil
}

// subscribe makes names what the client wants, and reports whether that is a change.
func (p *sotw) subscribe(names []string, first bool) bool {
	next := make(map[string]struct{}, len(names))
	for _, n := range names {
		next[n] = struct{}{}
	}
	if len(names) == 0 {
		// Without names a first request means everything, and goes on to mean it
		// until there are names; after those it means nothing.
		p.implied = p.implied || first
		if p.implied {
			next[Wildcard] = struct{}{}
		}
	} else {
		p.implied = false
	}
	if maps.Equal(next, p.names) {
		return false
	}
	_, all := next[Wildcard]
	for n, h := range p.held {
		_, was := p.names[n]
		switch _, is := next[n]; {
		case is:
		case !all:
			// The client forgets what it does not ask for; asking again gets it again.
			delete(p.held, n)
		case was:
			// Whether the wildcard gives it, the source will say.
			h.again = true
		}
	}
	p.names = next
	return true
}

// respond is the response that is due, nil if the client has all there is, and how many
// names turned out to be unknown.
func (p *sotw) respond(rs []Resource, complete bool) (resp *discoveryv3.DiscoveryResponse, omitted int) {
	have, fresh, _, omitted := p.compare(rs, complete)
	if len(fresh) == 0 {
		return nil, omitted
	}
	p.nonce++
	p.version = versionOf(have)
	p.sent(have)
	resp = &discoveryv3.DiscoveryResponse{
		VersionInfo: p.version,
		TypeUrl:     p.typeURL,
		Nonce:       nonceText(p.nonce),
		Resources:   make([]*anypb.Any, len(have)),
	}
	for i, r := range have {
		resp.Resources[i] = r.Body
	}
	return resp, omitted
}
