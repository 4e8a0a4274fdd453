//go:build race

package ca_test

// raceEnabled: everything takes several times as long. What damages a great many things
// one after the other does so without the race detector, and looks with it only at a
// few of them; see the Makefile.
const raceEnabled = true
