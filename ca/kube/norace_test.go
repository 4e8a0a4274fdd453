//go:build !race

package kube_test

const raceEnabled = false

// whole is n, or the part of it that is looked at with the race detector.
func whole(n, part int) int { return n }
