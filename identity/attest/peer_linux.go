package attest

import (
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// peerOf is the process at the other end of a Unix socket, for nothing but to count
// together what is its: its number; where that is unknown, since it is in another
// namespace, what the kernel has for it (Linux 6.9); and else the user that it is.
func peerOf(c net.Conn) (who string) {
	s, ok := c.(syscall.Conn)
	if !ok {
		return ""
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return ""
	}
	_ = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return
		}
		if cred.Pid != 0 {
			who = fmt.Sprintf("process %d", cred.Pid)
			return
		}
		if who = processOf(int(fd)); who == "" {
			who = fmt.Sprintf("user %d", cred.Uid)
		}
	})
	return who
}

// processOf names the process by the inode of a pidfd for it, which no other process
// has or will have; empty where the kernel has no such inodes.
func processOf(fd int) string {
	pidfd, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return ""
	}
	defer unix.Close(pidfd)
	var fs unix.Statfs_t
	var st unix.Stat_t
	if unix.Fstatfs(pidfd, &fs) != nil || int64(fs.Type) != unix.PID_FS_MAGIC || unix.Fstat(pidfd, &st) != nil {
		return ""
	}
	return fmt.Sprintf("inode %d", st.Ino)
}
