// Package run is what Signet's daemons have in common around their wiring:
// reading a configuration file strictly, logging, metrics and health over HTTP,
// and an orderly end.
//
// # Trust
//
// The HTTP address serves /metrics, /healthz, /readyz and, when switched on,
// pprof, to whoever reaches it: an attacker who does can at most read names of
// metrics and reasons of readiness, which hold no secret. It must not be exposed
// beyond the cluster. A configuration file is as trusted as the binary.
package run
