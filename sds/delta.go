package sds

import (
	"maps"
	"strconv"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// delta is the incremental protocol on one stream: requests add and remove names,
// responses hold what changed and name what is gone.
type delta struct {
	subscription
	typeURL string
}

func (p *delta) request(r *discoveryv3.DeltaDiscoveryRequest) (ev event, err error) {
	if err := checkType(r.GetTypeUrl(), p.typeURL); err != nil {
		return event{}, err
	}
	add, remove := r.GetResourceNamesSubscribe(), r.GetResourceNamesUnsubscribe()
	for _, names := range [][]string{add, remove} {
		if err := checkNames(names); err != nil {
			return event{}, err
		}
	}
	first := !p.started
	if first {
		p.start(r.GetNode())
		if len(add) == 0 {
			add = []string{Wildcard}
		}
	} else if n, err := strconv.ParseUint(r.GetResponseNonce(), 10, 64); err == nil && n <= p.nonce {
		// Unlike in state of the world, a request with an old nonce counts: names
		// that it adds or removes do not come again.
		if r.GetErrorDetail() != nil {
			ev = p.refuse(n, r.GetErrorDetail().GetMessage())
		} else {
			p.acknowledge(n)
		}
	}
	for _, n := range add {
		p.names[n] = struct{}{}
		if h := p.held[n]; h != nil {
			// The client may have dropped it meanwhile, so it gets it again even if
			// the version is the same.
			h.again = true
		}
	}
	for _, n := range remove {
		p.unsubscribe(n)
	}
	if len(p.names) > maxNames {
		return event{}, tooMany(len(p.names))
	}
	if first {
		if err := p.resume(r.GetInitialResourceVersions()); err != nil {
			return event{}, err
		}
	}
	ev.ask = first || len(add) > 0 || len(remove) > 0
	return ev, nil
}

func (p *delta) unsubscribe(name string) {
	if _, ok := p.names[name]; !ok {
		return
	}
	delete(p.names, name)
	if name == Wildcard {
		maps.DeleteFunc(p.held, func(n string, _ *held) bool {
			_, asked := p.names[n]
			return !asked
		})
		return
	}
	if _, all := p.names[Wildcard]; !all {
		delete(p.held, name)
	} else if h := p.held[name]; h != nil {
		// The client must learn whether the wildcard gives it: it gets it again,
		// or hears that it is gone.
		h.again = true
	}
}

// resume takes over what the client has from an earlier stream, so that it is not
// sent again.
func (p *delta) resume(versions map[string]string) error {
	if len(versions) > maxNames {
		return tooMany(len(versions))
	}
	_, all := p.names[Wildcard]
	for n, v := range versions {
		if err := checkNames([]string{n, v}); err != nil {
			return err
		}
		if _, asked := p.names[n]; asked || all {
			p.held[n] = &held{version: v, acked: true}
		}
	}
	return nil
}

// respond is the response that is due, nil if the client knows all there is to know, and
// how many names turned out to be unknown.
func (p *delta) respond(rs []Resource, complete bool) (resp *discoveryv3.DeltaDiscoveryResponse, omitted int) {
	_, fresh, gone, omitted := p.compare(rs, complete)
	if len(fresh) == 0 && len(gone) == 0 {
		return nil, omitted
	}
	p.nonce++
	p.sent(fresh)
	resp = &discoveryv3.DeltaDiscoveryResponse{
		SystemVersionInfo: versionOf(fresh),
		TypeUrl:           p.typeURL,
		Nonce:             nonceText(p.nonce),
		RemovedResources:  gone,
		Resources:         make([]*discoveryv3.Resource, len(fresh)),
	}
	for i, r := range fresh {
		resp.Resources[i] = &discoveryv3.Resource{Name: r.Name, Version: r.Version, Resource: r.Body}
	}
	return resp, omitted
}
