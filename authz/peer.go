package authz

import (
	"cmp"
	"slices"

	security "istio.io/api/security/v1beta1"
)

// Mode is a PeerAuthentication's effective mode.
//
// To a decision only STRICT matters: it denies a peer without a verified
// certificate. PERMISSIVE and DISABLE deny nobody. Under DISABLE Istio's proxy
// does not terminate mutual TLS at all, so that a peer can prove no name; a
// proxy that terminates it all the same has verified the name, and policies see
// it.
type Mode uint8

const (
	// ModePermissive takes mutual TLS and plaintext; it is the default.
	ModePermissive Mode = iota
	// ModeDisable takes plaintext only.
	ModeDisable
	// ModeStrict takes mutual TLS only.
	ModeStrict
)

// String is the mode as Istio writes it: PERMISSIVE, DISABLE or STRICT.
func (m Mode) String() string {
	switch m {
	case ModeDisable:
		return "DISABLE"
	case ModeStrict:
		return "STRICT"
	}
	return "PERMISSIVE"
}

// peerModes is what the PeerAuthentications of a workload come to.
type peerModes struct {
	mode peerMode
	// ports are the modes by port, of the workload's own PeerAuthentication.
	ports map[uint16]peerMode
	// worst is what holds where the port is unknown: STRICT if that is in force
	// anywhere. uniform says that it is in force everywhere.
	worst   peerMode
	uniform bool
}

// peerMode is a mode and who set it; nil where it is the default.
type peerMode struct {
	mode Mode
	by   *Rule
}

func (p *peerModes) at(port uint16) peerMode {
	if m, ok := p.ports[port]; ok {
		return m
	}
	return p.mode
}

// compose merges the PeerAuthentications that select a workload, as Istio's
// ComposePeerAuthentication does: mesh, then namespace, then workload, each
// inheriting what it leaves UNSET; of several in one scope the oldest wins, and
// among equally old ones the first by name, then namespace. Modes by port come
// from the workload's winner alone. The policies are in any order, and are sorted.
func compose(policies []*policy, root string) peerModes {
	var mesh, namespace, workload *policy
	slices.SortFunc(policies, older)
	for _, p := range policies {
		scope := &namespace
		switch {
		case len(p.selector) > 0:
			scope = &workload
		case p.key.namespace == root:
			scope = &mesh
		}
		if *scope == nil {
			*scope = p
		}
	}
	var out peerModes
	for _, p := range []*policy{mesh, namespace, workload} {
		if p == nil {
			continue
		}
		if m, set := modeOf(p.peer.GetMtls()); set {
			out.mode = peerMode{m, p.whole}
		}
	}
	out.worst, out.uniform = out.mode, true
	if workload != nil {
		for port, mtls := range workload.peer.GetPortLevelMtls() {
			m, set := modeOf(mtls)
			if !set {
				continue // the port has the workload's mode
			}
			if out.ports == nil {
				out.ports = make(map[uint16]peerMode)
			}
			byPort := peerMode{m, workload.whole}
			out.ports[uint16(port)] = byPort
			out.uniform = out.uniform && m == out.mode.mode
			if m == ModeStrict && out.worst.mode != ModeStrict {
				out.worst = byPort
			}
		}
	}
	return out
}

func older(a, b *policy) int {
	return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.key.name, b.key.name), cmp.Compare(a.key.namespace, b.key.namespace))
}

func modeOf(m *security.PeerAuthentication_MutualTLS) (mode Mode, set bool) {
	switch m.GetMode() {
	case security.PeerAuthentication_MutualTLS_DISABLE:
		return ModeDisable, true
	case security.PeerAuthentication_MutualTLS_PERMISSIVE:
		return ModePermissive, true
	case security.PeerAuthentication_MutualTLS_STRICT:
		return ModeStrict, true
	}
	return 0, false
}

// check denies a plaintext peer where mutual TLS is required, in whose name and
// why. The reason is empty if PeerAuthentication has nothing against the request.
func (p *peerModes) check(r *Request) (*Rule, Reason) {
	m, sure := p.worst, p.uniform
	if r.Known&FieldDestinationPort != 0 {
		m, sure = p.at(r.DestinationPort), true
	}
	if m.mode != ModeStrict || r.Known&FieldPeer != 0 && r.Authenticated {
		return nil, ""
	}
	if !sure || r.Known&FieldPeer == 0 {
		return m.by, ReasonPlaintextUnknown
	}
	return m.by, ReasonPlaintext
}
