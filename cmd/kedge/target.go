package main

import (
	"fmt"
	"path/filepath"

	"kedge/cmd/kedge/config"
	"kedge/issuer/admin"
)

// target says which CA is meant.
type target struct {
	config string
	data   string
}

// load reads the configuration, with --data applied.
func (t *target) load() (*config.Config, error) {
	c := config.Default()
	if t.config != "" {
		loaded, err := config.Load(t.config)
		if err != nil {
			return nil, usageError{err}
		}
		c = loaded
	}
	if t.data != "" {
		c.MoveData(t.data)
	}
	return c, nil
}

// flags are those with which another command means the same CA.
func (t *target) flags() (flags string) {
	if t.config != "" {
		flags += " --config " + t.config
	}
	if t.data != "" {
		flags += " --data " + t.data
	}
	return flags
}

// client talks to the CA that runs on the target's data folder.
func (t *target) client() (*admin.Client, error) {
	c, err := t.load()
	if err != nil {
		return nil, err
	}
	socket, err := adminSocket(c.DataDir)
	if err != nil {
		return nil, usageError{fmt.Errorf("dataDir: %w", err)}
	}
	return admin.NewClient(socket), nil
}

// adminSocket is where the CA of a data folder answers its admins. Not every folder can have one: a socket's path is short.
func adminSocket(dataDir string) (string, error) {
	dir, err := filepath.Abs(dataDir)
	if err != nil {
		return "", fmt.Errorf("finding the data folder %s: %w", dataDir, err)
	}
	socket := filepath.Join(dir, "admin.sock")
	return socket, admin.CheckPath(socket)
}
