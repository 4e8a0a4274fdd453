// Package etcdtest runs real etcd clusters for tests: members that can be killed,
// frozen and cut off from each other, and connections to them that lose what is asked or
// what is answered.
//
// A cut off member keeps its process and its memory, as behind a broken switch: its
// peers' connections go through proxies, which find out who is at the other end by the
// header that members send.
//
// # Trust
//
// It is linked into tests only. Everything listens on the loopback interface.
package etcdtest
