package token

import "github.com/prometheus/client_golang/prometheus/testutil"

// Tried is how many keys v has tried.
func Tried(v *Verifier) float64 { return testutil.ToFloat64(v.tried) }
