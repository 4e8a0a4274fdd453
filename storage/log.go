package storage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"time"
)

// Limits of a Log.
const (
	// MaxRecord is the longest record in bytes.
	MaxRecord = 64 << 10
	// MaxRecords is the largest number of records of one Append, and of a batch.
	MaxRecords = 4096
	// MaxAppend is the largest sum of one Append's records in bytes, 4 more
	// counted for each record.
	MaxAppend = 4 << 20
	// MaxSignature is the longest signature of a Head in bytes. The largest one
	// of a standard scheme for which Go has keys, ML-DSA-87, has 4627.
	MaxSignature = 8 << 10
	// MaxInstance is the highest instance: instances are the first byte of a
	// serial number, which must stay positive.
	MaxInstance = 0x7f
)

// clockTolerance is how far the wall clock may be behind the newest record: a
// smaller step back goes on from the newest record's time.
const clockTolerance = 5 * time.Minute

// Record is one entry of a Log.
type Record struct {
	// Sequence counts from 1 without gaps.
	Sequence uint64
	// Time is when the record's batch was written, by the wall clock of the
	// writer; it never decreases. UTC.
	Time time.Time
	// Data belongs to the receiver.
	Data []byte
}

// Head names the state of a log after a record: who has a head can tell whether
// a log still holds the same records up to there.
type Head struct {
	// Instance is whose log it is, 1 to MaxInstance.
	Instance uint32
	// Sequence is that of the last record covered, 0 for an empty log.
	Sequence uint64
	// Hash is the chain's hash after that record.
	Hash [32]byte
	// Time is that record's time, in UTC; zero for an empty log.
	Time time.Time
	// Signature is over SignedBytes; nil where nobody signed yet. The scheme and
	// the key are the authority's business.
	Signature []byte
}

const headDomain = "signet.storage.head.v1\x00"

// SignedBytes is the canonical form of a head that is signed and verified: the
// ASCII bytes "signet.storage.head.v1" and a zero byte, then big-endian Instance
// (4 bytes) and Sequence (8), Hash (32), and Time as Unix nanoseconds (8; 0 for
// the zero time). Two different heads never have the same form, and no other
// message that an authority signs begins with those bytes.
func (h Head) SignedBytes() []byte {
	return appendHeadFields(append(make([]byte, 0, len(headDomain)+headFields), headDomain...), h)
}

// Equal reports whether both name the same state and carry the same signature.
func (h Head) Equal(o Head) bool {
	return h.Instance == o.Instance && h.Sequence == o.Sequence && h.Hash == o.Hash &&
		h.Time.Equal(o.Time) && bytes.Equal(h.Signature, o.Signature)
}

// headFields is the size of a head without its signature.
const headFields = 4 + 8 + 32 + 8

func appendHeadFields(b []byte, h Head) []byte {
	b = binary.BigEndian.AppendUint32(b, h.Instance)
	b = binary.BigEndian.AppendUint64(b, h.Sequence)
	b = append(b, h.Hash[:]...)
	return binary.BigEndian.AppendUint64(b, uint64(unixNano(h.Time)))
}

// unixNano is 0 for the zero time, which time.Time.UnixNano leaves undefined.
func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromUnixNano(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// Log is an append-only sequence of opaque records. All methods are safe for
// concurrent use.
type Log interface {
	// Append adds records, which end up next to each other in the given order,
	// and returns the sequence of the last one. It returns without error only
	// when they are durable. Concurrent callers share one write.
	//
	// After an error the records may or may not be in the log. ErrNotDurable
	// stays until the log is opened again, which a remote one does by itself (see
	// LogOptions.Remote); ErrClock leaves the log usable. If ctx
	// ends before the records were written they are not; once they are being
	// written, Append returns when ctx ends but the records may land, and no
	// other caller's records are touched. The records may be reused on return.
	Append(ctx context.Context, records [][]byte) (last uint64, err error)

	// Scan yields the records from a sequence on, up to the newest one when it
	// was called, and checks the chain on the way. An error comes last.
	Scan(ctx context.Context, from uint64) iter.Seq2[Record, error]

	// Head is the newest durable state, unsigned.
	Head() Head

	// AppendHead records a signed head, durable on return. It must be a former
	// result of Head, of this log and not too old, with a signature, and not
	// before the newest signed head. The signature is not verified.
	AppendHead(ctx context.Context, h Head) error

	// SignedHead is the newest recorded signed head; ok is false if there is none.
	SignedHead() (h Head, ok bool)
}

// CheckAppend says what is wrong with the arguments of an Append, for engines.
func CheckAppend(records [][]byte) error {
	if len(records) == 0 {
		return errors.New("no records")
	}
	if len(records) > MaxRecords {
		return fmt.Errorf("%d records; at most %d are allowed at once", len(records), MaxRecords)
	}
	size := 0
	for i, r := range records {
		if len(r) == 0 {
			return fmt.Errorf("record %d is empty", i)
		}
		if len(r) > MaxRecord {
			return fmt.Errorf("record %d has %d bytes; at most %d are allowed", i, len(r), MaxRecord)
		}
		size += 4 + len(r)
	}
	if size > MaxAppend {
		return fmt.Errorf("records have %d bytes; at most %d are allowed at once", size, MaxAppend)
	}
	return nil
}
