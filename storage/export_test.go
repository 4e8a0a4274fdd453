package storage

import (
	"io"

	"go.etcd.io/bbolt"
)

// OSFS is the file system that a log has by default.
func OSFS() FS { return osFS{} }

// Examine is what OpenBolt does before it trusts a file.
func Examine(file io.ReaderAt, size int64) error { return examine(file, size) }

// CommitFailed is what the store makes of a commit that bbolt says has failed.
func (b *Bolt) CommitFailed(err error) error {
	return b.db.View(func(tx *bbolt.Tx) error { return b.commitFailed(err, tx.ID()) })
}

// ReencodeCheckpoint reads a checkpoint's file and writes it again.
func ReencodeCheckpoint(b []byte) ([]byte, error) {
	c, logID, err := parseCheckpoint(b)
	if err != nil {
		return nil, err
	}
	return c.encode(logID), nil
}
