package holder

import (
	"os"
	"time"
)

// The pure functions, for their tables.
var (
	RenewAt        = renewAt
	Backoff        = backoff
	AttemptTimeout = attemptTimeout
	Noswap         = noswap
	AnySwap        = anySwap
	DecodeState    = decodeState
	EncodeState    = encodeState
)

// Numbers that tests assert against.
const (
	LastRetry     = lastRetry
	HopelessRetry = hopelessRetry
	MaxAttempt    = maxAttempt
	MaxBatch      = maxBatch
	MaxBatchBytes = maxBatchBytes
)

// FakeHost is a machine for tests; what is left zero is fine for keys.
type FakeHost struct {
	Magic     int64 // 0: tmpfs
	MagicErr  error
	Swaps     string // path; "" for a file that is not there
	Mountinfo string // path; "" for the real one
	UID       int    // added to the real one
	Fault     func(step string) error
}

// OpenStateFileOn opens a state file on a machine for tests.
func OpenStateFileOn(dir string, opt StateOptions, fake *FakeHost) (*StateFile, error) {
	h := realHost()
	h.fsType = func(*os.File) (int64, error) {
		if fake.Magic == 0 {
			return 0x01021994, fake.MagicErr
		}
		return fake.Magic, fake.MagicErr
	}
	h.swaps = fake.Swaps
	if h.swaps == "" {
		h.swaps = "/proc/no-swaps-here"
	}
	if fake.Mountinfo != "" {
		h.mountinfo = fake.Mountinfo
	}
	h.euid += fake.UID
	h.fault = func(step string) error {
		if fake.Fault == nil {
			return nil
		}
		return fake.Fault(step)
	}
	return openStateFile(dir, opt, h)
}

// SetSwaps changes what the machine of f says about swap.
func (f *StateFile) SetSwaps(path string) { f.host.swaps = path }

// WithNow gives a holder that will be made another system clock.
func WithNow(c *Config, now func() time.Time) { c.now = now }
