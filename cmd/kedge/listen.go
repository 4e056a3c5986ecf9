package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"syscall"
)

// listen opens a TCP port; key is the configuration's, for whoever has to change it.
func listen(key, address string, log *slog.Logger) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: stop what uses the address, or name another", key, err)
	}
	return door{l, key, log}, nil
}

// door is a listener that tells when it cannot take a connection. Its server waits, up to a second, and tries again; gRPC's does so without a word.
type door struct {
	net.Listener
	key string
	log *slog.Logger
}

func (d door) Accept() (net.Conn, error) {
	conn, err := d.Listener.Accept()
	switch {
	case err == nil || errors.Is(err, net.ErrClosed):
	case errors.Is(err, syscall.EMFILE):
		d.log.Error("connections wait, since this process has as many files and connections open as it may: raise the limit (ulimit -n, LimitNOFILE), or find out who floods it",
			"door", d.key, "error", err)
	default:
		d.log.Error("connections wait, since they cannot be taken", "door", d.key, "error", err)
	}
	return conn, err
}
