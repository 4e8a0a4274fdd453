//go:build race

package extauthz_test

// raceEnabled: everything takes ten times as long.
const raceEnabled = true
