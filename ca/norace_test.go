//go:build !race

package ca_test

const raceEnabled = false
