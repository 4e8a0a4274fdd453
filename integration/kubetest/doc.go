// Package kubetest runs a real Kubernetes API server with its etcd in tests, on
// loopback, in about three seconds.
//
//	cluster := kubetest.Start(t, kubetest.Options{})
//	cluster.Apply(t, "../deploy/manifests/rbac.yaml")
//	node := cluster.Node(t, "node-a")
//	pod := cluster.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "web", Node: node.Name})
//	token := cluster.Token(t, pod, "signet", 10*time.Minute)
//
// It has Istio's policy types and RBAC as Kubernetes makes it; there is no
// controller, scheduler or kubelet, so nothing happens by itself: a deleted pod
// stays, terminating, until its grace period of zero is asked for, and a namespace
// never goes. Either process can be ended, killed and started again with the same
// address and data ([Process]), and the API server can get a new serving
// certificate.
//
// Where the programs come from is package parts' affair; `make tools` builds them.
// A test skips where they are missing, except in CI ($CI is set), where it fails.
//
// # Trust
//
// For tests only: the administrator's token is a constant, etcd asks nobody who
// they are and syncs nothing to the disk. Everything listens on loopback.
package kubetest
