package source

import (
	"time"

	"golang.org/x/sys/unix"
)

// Limits, for tests at the limits.
const (
	MaxFiles       = maxFiles
	MaxBytes       = maxBytes
	MaxFileBytes   = maxFileBytes
	GatherRemovals = gatherRemovals
)

// LoseEvents makes f believe that the kernel dropped events after those that it
// can read now.
func LoseEvents(f *Folder) error {
	if err := f.watch.drain(); err != nil {
		return err
	}
	f.watch.mu.Lock()
	defer f.watch.mu.Unlock()
	f.watch.noteOne(-1, unix.IN_Q_OVERFLOW, "", time.Now())
	return nil
}

// Between sets what f calls in each reading, after the files were read and before
// they count. It must be called before Run.
func Between(f *Folder, call func()) { f.between = call }

// Reread reads the folder at once. f must not run. It reports whether the folder
// changed so that it has to be read again.
func Reread(f *Folder) (again bool) {
	err := f.read()
	if err == errChanging {
		return true
	}
	f.publish(err)
	return false
}

// SavedForTest is what a Cluster with one good AuthorizationPolicy shop/a exports.
func SavedForTest(tb interface{ Fatal(...any) }, text string) []byte {
	body, err := encodeSaved(map[string]clusterDoc{"AuthorizationPolicy shop/a": {text: []byte(text), good: []byte(text)}})
	if err != nil {
		tb.Fatal(err)
	}
	return withHeader(time.Now(), body)
}
