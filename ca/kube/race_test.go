//go:build race

package kube_test

// raceEnabled: everything takes ten times as long. What compares a great many things
// one after the other does so without the race detector, and looks with it only at a
// few of them; see the Makefile.
const raceEnabled = true
