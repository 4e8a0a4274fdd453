// Package provider asks the extension providers of CUSTOM policies: external
// authorizers that speak Envoy's ext_authz over gRPC, or over HTTP.
//
// # Which provider is asked what
//
// A [Spec] is written as in meshConfig.extensionProviders of Istio. A gRPC provider
// gets the proxy's CheckRequest byte by byte. An HTTP provider gets method, path,
// host, Authorization and what else the Spec names of the request, as from Envoy: an
// answer 200 allows, 5xx is a failure, and any other denies with that status, whose
// headers and body go to the client.
//
// # Closed
//
// Only an answer that is whole, in time and says one thing allows: a gRPC status OK
// without the answer to a denial beside it, or HTTP 200. Whatever else happens is an
// error of [Providers.Ask], which denies: nobody of that name, no connection, no
// answer in time, bytes that are none, an answer that is too large, a failure that
// the provider reports, more requests in flight than the Spec allows. An empty
// CheckResponse, which Envoy takes for an allowance, is no answer here. failOpen is
// refused where the Spec is read.
//
// A request is sent once. The exception is a kept-alive connection that the provider
// closed before it can have seen the request; the request then goes over another one.
//
// # Trust
//
// An attacker who controls a provider decides what its CUSTOM policies match, within
// DENY and ALLOW, which come after it: it can deny those requests, change their
// headers on the way to the workload, and answer denied clients in its name. It can
// hold requests up for no longer than the timeout and make the agent hold no more
// than the largest answer for each request in flight. One who is on the way to a
// provider without TLS has the same.
package provider
