// Package storagetest tests engines of package storage, and those who rely on
// one. [Store] and [Log] are the suites that every engine must pass; [CrashFS] is
// a file system in memory below a storage.FileLog that records the order of
// writes and syncs, fails any of them, and forgets at a crash what was not synced.
//
// # Trust
//
// It is linked into tests only. A test that passes on CrashFS shows that nothing
// depends on bytes that were not synced, for a disk that keeps what it
// acknowledged and writes single bytes whole; it says nothing about other disks.
package storagetest
