package storage

import (
	"errors"
	"fmt"
	"time"
)

// How long a remote log waits before it opens itself anew, and then each time.
const (
	reopenFirst = 100 * time.Millisecond
	reopenMost  = 2 * time.Second
)

// notDurable is ErrNotDurable, in the words for who reads it.
func (l *FileLog) notDurable() error {
	if l.remote {
		return remoteNotDurable{}
	}
	return ErrNotDurable
}

// remoteNotDurable is the ErrNotDurable of a log that opens itself anew.
type remoteNotDurable struct{}

func (remoteNotDurable) Error() string {
	return "not durable: a write failed, and the log is opened anew until that succeeds"
}

func (remoteNotDurable) Unwrap() error { return ErrNotDurable }

// unlock gives the folder up, if it is held.
func (l *FileLog) unlock() error {
	if l.lock == nil {
		return nil
	}
	lock := l.lock
	l.lock = nil
	return lock.Close()
}

// closeFile closes the file that is being written, if one is open.
func (l *FileLog) closeFile() error {
	if l.file == nil {
		return nil
	}
	f := l.file
	l.file = nil
	return f.Close()
}

// errTakenOver is why a remote log stays unusable.
var errTakenOver = errors.New("it is not as this process left it: another one wrote to it or put another in its place; find out which process that is, and restart this one")

// reopen opens a remote log anew until that succeeds or the log is closed.
func (l *FileLog) reopen() {
	for pause := reopenFirst; ; pause = min(2*pause, reopenMost) {
		select {
		case <-l.closing:
			return
		case <-time.After(pause):
		}
		err := l.reopenOnce()
		if err == nil {
			l.log.Info("the issuance log is open again after a write that failed", "dir", l.dir, "records", l.Head().Sequence)
			return
		}
		if errors.Is(err, errTakenOver) || errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNewerFormat) {
			l.log.Error("the issuance log stays closed", "dir", l.dir, "err", err)
			return
		}
	}
}

// reopenOnce takes the folder anew, after which no write of before can land any more,
// reads what is there, and goes on from it.
func (l *FileLog) reopenOnce() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.leading {
		l.idle.Wait()
	}
	if l.closed {
		return nil
	}
	l.leading = true
	l.mu.Unlock()
	n := &FileLog{dir: l.dir, instance: l.instance, segmentSize: l.segmentSize, fs: l.fs, now: l.now, log: l.log, remote: true}
	err := errors.Join(l.closeFile(), l.unlock())
	if err == nil {
		err = n.reread(l)
	}
	if err != nil {
		err = errors.Join(err, n.closeFile(), n.unlock())
	}
	l.mu.Lock()
	if err != nil {
		l.stopped = err
	} else {
		l.failed, l.stopped = nil, nil
		l.lock, l.file, l.seed, l.tailFirst = n.lock, n.file, n.seed, n.tailFirst
		l.chain, l.segments, l.checkpoint = n.chain, n.segments, n.checkpoint
		l.metrics.failing(false)
	}
	l.passLead()
	return err
}

// reread opens what l had open, and compares.
func (n *FileLog) reread(l *FileLog) (err error) {
	if n.lock, err = lockFolder(n.fs, n.dir, false, 0); err != nil {
		return err
	}
	indexes, err := n.list()
	if err != nil {
		return err
	}
	if len(indexes) == 0 {
		return fmt.Errorf("%w: it is empty", errTakenOver)
	}
	if err := n.load(indexes); err != nil {
		return err
	}
	before, now := l.chain.newest, n.chain.newest
	if n.logID != l.logID || now != before && (now != l.doubt || l.doubt.sequence <= before.sequence) {
		return fmt.Errorf("%w: it ended at record %d and ends at record %d", errTakenOver, before.sequence, now.sequence)
	}
	if same, known := n.chain.holds(l.chain.unsigned()); !same || !known {
		return fmt.Errorf("%w: record %d has another hash", errTakenOver, before.sequence)
	}
	return nil
}
