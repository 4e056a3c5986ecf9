package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/ca"
	"kedge/ca/atomicfile"
)

// Options say what an agent does. They are valid: whoever reads them from people has checked them.
type Options struct {
	Server   string        // address of the CA, host:port
	RootFile string        // PEM file of the roots that the CA's server must prove itself under, read again for every connection
	KeyType  string        // one of istio.KeyTypes
	TTL      time.Duration // that is asked for; 0: the CA's default
	State    string        // folder in memory (tmpfs or ramfs) in which keys and SVIDs are kept over a restart; "": nowhere
	// Grace is for how long a consumer that went away counts as holding what it held, and how long after the agent's start nothing is acknowledged to the CA: consumers
	// of before may hold an older trust bundle, and come back.
	Grace     time.Duration
	Workloads []Workload

	Now     func() time.Time // the wall clock; default time.Now
	Logger  *slog.Logger
	Metrics prometheus.Registerer // nil: nothing is counted
}

// Workload is one identity, and how it is handed out.
type Workload struct {
	Name              string // for logs and metrics, and for the file in State
	TokenFile         string // a token that says whose the identity is; or
	ClientCertificate string // the folder with the files of an SVID that does
	Sockets           []Socket
	Files             *Files // nil: none are written
}

// Socket is a unix socket with both SDS and the Workload API.
type Socket struct {
	Path           string
	Access         atomicfile.Access // of the socket
	MaxConnections int
}

// Files are the SVID's PEM files, in a folder.
type Files struct {
	Dir         string
	Access      atomicfile.Access
	RereadAfter time.Duration // after which programs have read new files
}

// Agent is what runs beside workloads.
type Agent struct {
	o          Options
	identities []*identity
	doors      []*door
	state      *os.File // the state folder, locked; nil: there is none
}

// New opens the sockets, and takes up what an earlier run kept. The CA is asked for nothing yet.
func New(o Options) (*Agent, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	a := &Agent{o: o}
	if o.State != "" {
		folder, err := openState(o.State)
		if err != nil {
			return nil, err
		}
		a.state = folder
	}
	for _, w := range o.Workloads {
		i := newIdentity(&a.o, w)
		if err := i.recall(); err != nil { // it can be had anew
			i.log.Warn("what was kept in the state folder is not used", "error", err)
		}
		a.identities = append(a.identities, i)
		d, err := openDoor(i, w.Sockets)
		if err != nil {
			a.Close()
			return nil, fmt.Errorf("workload %q: %w", w.Name, err)
		}
		a.doors = append(a.doors, d)
	}
	if o.Metrics != nil {
		o.Metrics.MustRegister(collector{a})
	}
	return a, nil
}

// Run serves until ctx ends, or a socket fails.
func (a *Agent) Run(ctx context.Context) error {
	told := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var running sync.WaitGroup
	for n, i := range a.identities {
		running.Go(func() { i.keep(ctx) })
		running.Go(func() { i.report(ctx) })
		running.Go(func() { a.doors[n].watch(ctx, i) })
		if i.w.Files != nil {
			running.Go(func() { i.keepFiles(ctx) })
		}
		for _, serve := range a.doors[n].servers() {
			running.Go(func() {
				if err := serve(); err != nil {
					cancel(fmt.Errorf("workload %q: %w", i.w.Name, err))
				}
			})
		}
	}
	<-ctx.Done()
	a.closeDoors()
	running.Wait() // nothing is written to the state folder after that
	a.Close()
	if told.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

// Ready says which workload has no SVID now, and why; nil: all have theirs.
func (a *Agent) Ready(context.Context) error {
	for _, i := range a.identities {
		if err := i.missing(); err != nil {
			return fmt.Errorf("workload %q: %w", i.w.Name, err)
		}
	}
	return nil
}

// Problems lists what is wrong though the agent goes on.
func (a *Agent) Problems() []ca.Problem {
	var all []ca.Problem
	for _, i := range a.identities {
		all = append(all, i.problems()...)
	}
	return all
}

// Close closes the sockets of an agent, and gives its state folder back. Run does so at its end.
func (a *Agent) Close() {
	a.closeDoors()
	if a.state != nil {
		_ = a.state.Close() // a second time, if Run did
	}
}

func (a *Agent) closeDoors() {
	var closing sync.WaitGroup
	for _, d := range a.doors {
		closing.Go(d.close)
	}
	closing.Wait()
}
