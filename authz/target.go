package authz

import typev1beta1 "istio.io/api/type/v1beta1"

// target is what a policy is attached to instead of selecting by labels.
type target struct{ group, kind, name string }

// The labels of a gateway's pods: its name, and who made it, which tells a
// waypoint.
const (
	gatewayLabel  = "gateway.networking.k8s.io/gateway-name"
	managedLabel  = "gateway.istio.io/managed"
	managedInMesh = "istio.io-mesh-controller"
)

// targetsOf are the references of a policy; as in Istio the single one counts
// where there is no list.
func targetsOf(ref *typev1beta1.PolicyTargetReference, refs []*typev1beta1.PolicyTargetReference) []target {
	if len(refs) == 0 && ref != nil {
		refs = []*typev1beta1.PolicyTargetReference{ref}
	}
	var ts []target
	for _, r := range refs {
		ts = append(ts, target{r.GetGroup(), r.GetKind(), r.GetName()})
	}
	return ts
}

// selects reports whether the policy, which is of the workload's namespace or of
// the root namespace, selects a workload; local says that it is of the
// workload's. To a sidecar a policy with a target is nothing. The pods of a
// gateway honour those for that gateway, and selectors; a waypoint honours no
// selectors, nor here what is attached to Services, of which nothing is known.
func (p *policy) selects(labels map[string]string, local bool) bool {
	if p.kind == KindPeerAuthentication {
		return selects(p.selector, labels)
	}
	gateway, ok := labels[gatewayLabel]
	waypoint := ok && labels[managedLabel] == managedInMesh
	if len(p.targets) == 0 {
		// What cannot be enforced denies a waypoint too.
		return (!waypoint || p.whole.Reason != "") && selects(p.selector, labels)
	}
	for _, t := range p.targets {
		switch {
		case !ok:
		case t.group == "gateway.networking.k8s.io" && t.kind == "Gateway":
			if local && t.name == gateway {
				return true
			}
		case t.group == "gateway.networking.k8s.io" && t.kind == "GatewayClass":
			if waypoint && p.root && t.name == "istio-waypoint" {
				return true
			}
		}
	}
	return false
}
