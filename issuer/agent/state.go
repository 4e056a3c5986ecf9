package agent

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"kedge/ca/atomicfile"
	"kedge/issuer/istio"
	"kedge/issuer/sds"
)

// kept is what is kept of an identity over a restart of the agent.
type kept struct {
	Server      string    `json:"server"` // the CA's address: of another one nothing counts
	Given       string    `json:"given"`  // the file or folder with what an admin gave to prove the identity by: of another one nothing counts
	Key         string    `json:"key"`    // PKCS#8 in PEM, as the others
	Chain       string    `json:"chain"`
	Bundle      string    `json:"bundle"`      // the trust bundle of now …
	Incarnation string    `json:"incarnation"` // … and its number
	Sequence    uint64    `json:"sequence"`
	RenewAt     time.Time `json:"renew_at"`
	Arrived     bool      `json:"arrived"` // see held
	Proof       string    `json:"proof"`   // SHA-256 of the proof that was shown
	Follows     string    `json:"follows"` // see serverRoots
}

// openState makes the state folder, and takes it for this agent, until the file is closed.
func openState(dir string) (*os.File, error) {
	if err := prepareState(dir); err != nil {
		return nil, err
	}
	folder, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("opening the state folder: %w", err)
	}
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		err = fmt.Errorf("locking the state folder %s: %w", dir, err)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("another agent has its state in %s: stop that, or name another folder", dir)
		}
		return nil, errors.Join(err, folder.Close())
	}
	return folder, nil
}

// prepareState makes the state folder, and makes sure that it is in memory and this user's alone: a key that is written to a disk can be read from it years later.
func prepareState(dir string) error {
	there := dir
	for ; ; there = filepath.Dir(there) {
		if _, err := os.Stat(there); !errors.Is(err, fs.ErrNotExist) || there == filepath.Dir(there) {
			break
		}
	}
	var system unix.Statfs_t
	if err := unix.Statfs(there, &system); err != nil {
		return fmt.Errorf("looking at the state folder %s: %w", dir, err)
	}
	if kind := int64(system.Type); kind != unix.TMPFS_MAGIC && kind != unix.RAMFS_MAGIC {
		return fmt.Errorf("the state folder %s is not in memory, and keys do not belong on a disk: name a folder on a tmpfs, such as one below /run or /dev/shm (in Kubernetes an emptyDir with the "+
			"medium Memory), or leave the state out: then a restart has every SVID issued anew", dir)
	}
	if err := atomicfile.MakeFolderToPass(dir); err != nil { // sockets may be beside it
		return err
	}
	var info unix.Stat_t
	if err := unix.Stat(dir, &info); err != nil {
		return fmt.Errorf("looking at the state folder %s: %w", dir, err)
	}
	if info.Mode&0o077 != 0 || int(info.Uid) != os.Geteuid() {
		return fmt.Errorf("the state folder %s holds keys, and others may enter it (mode %#o, uid %d): give it to the agent's user alone, with 'chmod 700 %s'", dir, info.Mode&0o777, info.Uid, dir)
	}
	return nil
}

func (i *identity) stateFile() string { return filepath.Join(i.o.State, i.w.Name+".json") }

// remember keeps what there is now. That it cannot is a problem, and no reason to stop.
func (i *identity) remember() {
	if i.o.State == "" {
		return
	}
	i.remembering.Lock() // the latest is written last
	defer i.remembering.Unlock()
	i.mu.Lock()
	if i.svid == nil || i.bundle == nil {
		i.mu.Unlock()
		return
	}
	state := kept{Server: i.o.Server, Given: i.proof().place(), Key: i.svid.KeyPEM, Chain: i.svid.ChainPEM, Bundle: i.bundle.PEM, Incarnation: i.bundle.Incarnation, Sequence: i.bundle.Sequence,
		RenewAt: i.svid.RenewAt, Arrived: i.svid.arrived, Proof: i.sum, Follows: i.follows}
	i.mu.Unlock()
	text, err := json.Marshal(state)
	if err == nil {
		err = atomicfile.Write(i.stateFile(), text)
	}
	if err != nil {
		err = fmt.Errorf("a restart of the agent would need a new SVID: %w", err)
		i.log.Error("the state is not kept", "error", err)
	}
	i.note("state", err)
}

// recall takes up what an earlier run kept. An SVID that has expired is of no use; its trust bundle is, since consumers may have it, and get no older one.
func (i *identity) recall() error {
	if i.o.State == "" {
		return nil
	}
	if err := atomicfile.Clean(i.stateFile()); err != nil {
		return err
	}
	text, err := os.ReadFile(i.stateFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var state kept
	if err := json.Unmarshal(text, &state); err != nil {
		return fmt.Errorf("reading %s: %w", i.stateFile(), err)
	}
	if state.Server != i.o.Server {
		return fmt.Errorf("%s is of the CA at %s", i.stateFile(), state.Server)
	}
	if state.Given != i.proof().place() {
		return fmt.Errorf("%s is of a workload that proves itself by %s", i.stateFile(), state.Given)
	}
	svid, err := state.svid()
	if err != nil {
		return fmt.Errorf("reading %s: %w", i.stateFile(), err)
	}
	wall := i.wall()
	i.mu.Lock()
	i.bundle = &bundle{Bundle: &sds.Bundle{TrustDomain: svid.ID.TrustDomain(), Incarnation: state.Incarnation, Sequence: state.Sequence, Roots: svid.Roots, PEM: state.Bundle},
		order: 1, taken: time.Now()}
	i.known[i.bundle.Bundle] = i.bundle.order
	i.sum, i.follows = state.Proof, state.Follows
	i.svid = hold(svid)
	i.svid.arrived, i.svid.RenewAt, i.svid.received = state.Arrived, state.RenewAt, time.Now()
	i.recalled, i.holders.begun = i.svid.handed, time.Now()
	half := svid.Leaf().NotAfter.Sub(svid.Leaf().NotBefore) / 2
	i.svid.renew = max(0, min(half, state.RenewAt.Sub(wall))) // the clock may have been set back
	i.mu.Unlock()
	i.publish()
	i.log.Info("going on with the SVID of before", "spiffe_id", svid.ID.String(), "serial", serialOf(svid.Leaf()), "not_after", svid.Leaf().NotAfter, "renewal", state.RenewAt)
	return nil
}

func (k kept) svid() (*istio.SVID, error) {
	block, _ := pem.Decode([]byte(k.Key))
	if block == nil {
		return nil, errors.New("it has no key")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, errors.New("its key cannot sign")
	}
	return istio.ReadSVID(key, k.Chain, k.Bundle, signedAt([]string{k.Chain}))
}
