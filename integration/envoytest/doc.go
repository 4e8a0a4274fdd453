// Package envoytest runs a real Envoy in tests, on Linux.
//
//	envoy := envoytest.Start(t, "testdata/envoy.yaml")
//	envoy.WaitReady(t)
//	url := "http://" + envoy.Listener(t, "inbound")
//
// Where Envoy comes from is package parts' affair; `make tools` gets it. A test
// skips where there is none, except in CI ($CI is set), where it fails.
//
// # Trust
//
// For tests only. The admin interface listens on a port of loopback that the
// system chose: another user of the machine who finds it can at most disturb the
// test.
package envoytest
