package storage

import "errors"

// The errors that callers act on. They are wrapped: compare with errors.Is.
var (
	// ErrNotFound is returned by Get for a key that does not exist.
	ErrNotFound = errors.New("not found")
	// ErrConflict is returned by Commit when a condition does not hold; nothing
	// was changed. Read again, decide again.
	ErrConflict = errors.New("conflict: changed by another writer")
	// ErrCompacted is yielded by Watch when changes after the revision that was
	// asked for are no longer known. List again and watch from its revision.
	ErrCompacted = errors.New("history compacted: list again and watch from there")
	// ErrLocked is returned on opening what another process has open.
	ErrLocked = errors.New("locked by another process")
	// ErrNewerFormat is returned on opening what a newer version wrote. Nothing
	// was changed.
	ErrNewerFormat = errors.New("written by a newer signet-ca; use that version")
	// ErrCorrupt is returned when stored bytes are not what was written. Nothing
	// was changed or repaired.
	ErrCorrupt = errors.New("damaged; restore it from a backup")
	// ErrClosed is returned by everything after Close.
	ErrClosed = errors.New("closed")
	// ErrReadOnly is returned by what would change a log that was opened to be read.
	ErrReadOnly = errors.New("opened for reading only")
	// ErrNotDurable is returned when a write or fsync failed, and by every later
	// call until the store or log is opened again: what the disk holds is
	// unknown, so nothing may be signed or decided on it.
	ErrNotDurable = errors.New("not durable: a write failed; check the disk and restart")
	// ErrUnknown is returned by Commit when nobody knows whether the change has
	// happened. Read again and decide on that: what is read then stays so, since the
	// change has happened by then or never will.
	ErrUnknown = errors.New("outcome unknown: the change may have happened; read again")
	// ErrClock is returned by Append when the wall clock is five minutes or more
	// before the newest record. Nothing was written.
	ErrClock = errors.New("clock is too far before the newest record; correct the clock")
)
