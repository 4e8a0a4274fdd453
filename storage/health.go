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

// Holds reports whether the log holds the state that a head names. A head beyond
// the end, or with another hash at its place, is of a log that lost records, or of
// another log altogether. Neither time nor signature is compared.
// known is false for a head so old that only reading the whole log could tell.
func (l *FileLog) Holds(h Head) (same, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.chain.holds(h)
}
