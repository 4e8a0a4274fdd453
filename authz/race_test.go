//go:build race

package authz_test

// raceEnabled makes the long tests shorter where every memory access costs ten
// times as much.
const raceEnabled = true
