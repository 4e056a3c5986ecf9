// Package peercred says who is at the other end of a unix socket.
package peercred

import (
	"errors"
	"fmt"
	"net"
	"os/user"
	"strconv"

	"golang.org/x/sys/unix"
)

// Peer is who is at the other end of the socket, as the kernel says (SO_PEERCRED, unix(7)).
type Peer struct {
	PID int32
	UID uint32
	GID uint32
}

// String names the peer for the ledger: its user by name, where there is one.
func (p Peer) String() string {
	name := ""
	if u, err := user.LookupId(strconv.Itoa(int(p.UID))); err == nil {
		name = " (" + u.Username + ")"
	}
	return fmt.Sprintf("uid %d%s, pid %d", p.UID, name, p.PID)
}

// Of asks the kernel who made a connection.
func Of(conn net.Conn) (Peer, error) {
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return Peer{}, errors.New("the connection is not a unix socket")
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var ucred *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		ucred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return Peer{}, err
	}
	if failed != nil {
		return Peer{}, failed
	}
	return Peer{PID: ucred.Pid, UID: ucred.Uid, GID: ucred.Gid}, nil
}
