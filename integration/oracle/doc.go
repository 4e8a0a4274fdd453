// Package oracle holds package authz against those it must agree with: Istio's own
// admission, selection and policy compiler (module integration/istio, run as a
// program), and a real Envoy that runs the filters which this compiler makes. It
// has nothing but tests.
package oracle
