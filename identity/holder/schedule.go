package holder

import "time"

const (
	// firstRetry and lastRetry bound the exponential backoff.
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
	// hopelessRetry is the wait when all evidence was refused for good.
	hopelessRetry = 2 * time.Minute
	// minRetry and minHopelessRetry are what backoff shrinks to when an SVID is
	// about to expire.
	minRetry         = 250 * time.Millisecond
	minHopelessRetry = 5 * time.Second
	// maxAdvice bounds how long an authority can send us away.
	maxAdvice = 5 * time.Minute

	// minRenewal keeps an authority whose choice is always "now" from being
	// asked in a tight loop.
	minRenewal = 10 * time.Second

	// maxAttempt and minAttempt bound how long one call of the issuer may take.
	maxAttempt = 15 * time.Second
	minAttempt = time.Second
)

// renewAt is when to renew an SVID that was received at now and expires at
// notAfter. The authority's choice is obeyed as long as it leaves an eighth of
// the remaining life for retries and is not so early that it would make a loop.
// Where it is no choice (zero, or not before notAfter) renewal is at half the
// remaining life, moved by up to a tenth of it either way by r, which is in
// [0, 1), so that a fleet spreads. The result is after now if notAfter is.
func renewAt(now, notAfter, chosen time.Time, r float64) time.Time {
	left := notAfter.Sub(now)
	if left <= 0 {
		return now
	}
	if chosen.IsZero() || !chosen.Before(notAfter) {
		return now.Add(left/2 + time.Duration((2*r-1)*float64(left)/10))
	}
	earliest := now.Add(min(minRenewal, left/8))
	latest := notAfter.Add(-left / 8)
	switch {
	case chosen.Before(earliest):
		return earliest
	case chosen.After(latest):
		return latest
	}
	return chosen
}

// backoff is how long to wait before the next attempt after failures of them in
// a row, at least one. left is the remaining life of the SVID that is held, zero
// or less if there is none. advice is what the authority said: zero for nothing,
// negative if the evidence cannot succeed. r is in [0, 1).
//
// Positive advice is obeyed as it is, up to five minutes and up to half of left, with a
// tenth more at random: who gives it knows when there is room, and to wait longer leaves
// that room empty. Otherwise the wait is between half and all of an exponential step,
// never more than an eighth of left, so that retries become denser towards the end.
func backoff(failures int, left, advice time.Duration, r float64) time.Duration {
	step, floor := lastRetry, minRetry
	if advice < 0 {
		step, floor = hopelessRetry, minHopelessRetry
	} else if n := max(failures, 1) - 1; n < 5 {
		step = firstRetry << n
	}
	if left > 0 {
		step = min(step, max(left/8, floor))
	}
	if advice > 0 {
		advice = min(advice, maxAdvice)
		if left > 0 {
			advice = min(advice, left/2)
		}
		return max(minRetry, advice+time.Duration(r*float64(advice)/10))
	}
	return step/2 + time.Duration(r*float64(step/2))
}

// attemptTimeout is how long one attempt may take, where left is the shortest
// remaining life in the batch, zero or less if nothing in it is held: an
// authority that hangs must not use up the time in which another attempt could
// succeed.
func attemptTimeout(left time.Duration) time.Duration {
	if left <= 0 {
		return maxAttempt
	}
	return min(maxAttempt, max(left/4, minAttempt))
}
