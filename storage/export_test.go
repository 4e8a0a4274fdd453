package storage

import "io"

// Examine is what OpenBolt does before it trusts a file.
func Examine(file io.ReaderAt, size int64) error { return examine(file, size) }
