package storage

// Err is nil while records can be appended, else the reason why not: the log is
// closed, or a write failed and it must be opened again. It says nothing about
// the next write.
func (l *FileLog) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.usable()
}

// Err is nil while the store can be used, else the reason why not.
func (b *Bolt) Err() error { return b.usable() }
