//go:build !race

package rotation_test

// whole is n, or the part of it that is looked at with the race detector: nothing here
// has goroutines, and with it everything takes several times as long; see the Makefile.
func whole(n, part int) int { return n }
