package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os/user"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"

	"kedge/ca/atomicfile"
	"kedge/cmd/kedge/config"
	"kedge/issuer/agent"
	"kedge/issuer/gate"
	"kedge/issuer/ops"
)

// alongside is what 'kedge agent' was told.
type alongside struct {
	server, root, tokenFile, clientCertificate, out, state string
	sockets                                                []string
}

func newAgentCommand(t *target) *cobra.Command {
	f := alongside{}
	c := &cobra.Command{
		Use: "agent", Short: "Keep workloads on this machine in SVIDs: SDS, SPIFFE Workload API, files", Args: arguments(),
		Long: `Run beside a workload until SIGTERM or SIGINT: make its key on this machine, have its SVID issued by a CA's CSR API, renew it at half of its life, and
hand it out on unix sockets, by Envoy's SDS and by the SPIFFE Workload API, and as PEM files. Whoever may use the socket has the workload's identity.

For one workload flags are enough:

  kedge agent --server ca.example.org:15012 --root root-cert.pem --token-file token --socket /run/web/agent.sock

For several, for other modes and for metrics, --config names a YAML file (docs/agent-configuration.md). The CA need not be there at the start: the sockets are up, and
it is asked again until it answers. docs/agent.md has the rest.`,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := f.configuration(t.config)
			if err != nil {
				return usageError{err}
			}
			options, err := agentOptions(cfg)
			if err != nil {
				return usageError{err}
			}
			if err := keepSecretsInMemory(); err != nil {
				return err
			}
			log, err := newLogger(c.ErrOrStderr(), cfg.Log, new(slog.LevelVar))
			if err != nil {
				return err
			}
			options.Logger = log
			return runAgent(c.Context(), cfg, options)
		},
	}
	c.Flags().StringVar(&f.server, "server", "", "address of the CA, such as ca.example.org:15012")
	c.Flags().StringVar(&f.root, "root", "", "PEM file with the roots that the server must prove itself under")
	c.Flags().StringVar(&f.tokenFile, "token-file", "", "file with the token that says whose the identity is")
	c.Flags().StringVar(&f.clientCertificate, "client-certificate", "", "folder with cert-chain.pem and key.pem, in place of a token")
	c.Flags().StringArrayVar(&f.sockets, "socket", nil, "path of a unix socket; may be given several times")
	c.Flags().StringVar(&f.out, "out", "", "folder for the SVID as PEM files; made if need be")
	c.Flags().StringVar(&f.state, "state", "", "folder on a tmpfs in which the SVID is kept over a restart")
	return c
}

// configuration is that of the file, or of the flags.
func (f *alongside) configuration(file string) (*config.Agent, error) {
	flags := f.server+f.root+f.tokenFile+f.clientCertificate+f.out+f.state != "" || len(f.sockets) > 0
	var cfg *config.Agent
	switch {
	case file != "" && flags:
		return nil, errors.New("with --config everything stands in the file: leave the other flags out")
	case file != "":
		loaded, err := config.LoadAgent(file)
		if err != nil {
			return nil, err
		}
		cfg = loaded
	default:
		if err := f.check(); err != nil {
			return nil, err
		}
		cfg = config.DefaultAgent()
		cfg.Server, cfg.RootFile, cfg.State = f.server, f.root, f.state
		w := config.DefaultAgentWorkload()
		w.TokenFile, w.ClientCertificate, w.Files.Dir = f.tokenFile, f.clientCertificate, f.out
		for _, path := range f.sockets {
			s := config.DefaultAgentSocket()
			s.Path = path
			w.Sockets = append(w.Sockets, s)
		}
		cfg.Workloads = []config.AgentWorkload{w}
	}
	return cfg, cfg.Validate()
}

// check names the flags that are missing.
func (f *alongside) check() error {
	switch {
	case f.server == "":
		return errors.New("--server is missing: the address of the CA, or --config with a file in which everything stands")
	case !isAddress(f.server):
		return fmt.Errorf("--server %q is not HOST:PORT", f.server)
	case f.root == "":
		return errors.New("--root is missing: the PEM file with the roots that the server must prove itself under")
	case (f.tokenFile == "") == (f.clientCertificate == ""):
		return errors.New("one of --token-file and --client-certificate says whose the identity is: give one of them")
	case len(f.sockets) == 0 && f.out == "":
		return errors.New("--socket and --out are both missing: nobody would get the SVID")
	}
	return nil
}

// agentOptions is the configuration as package agent has it.
func agentOptions(c *config.Agent) (agent.Options, error) {
	o := agent.Options{Server: c.Server, RootFile: c.RootFile, KeyType: c.KeyType, TTL: c.TTL.Std(), State: c.State, Grace: c.ConsumerGrace.Std()}
	all := &config.Error{}
	for n, w := range c.Workloads {
		workload := agent.Workload{Name: w.Name, TokenFile: w.TokenFile, ClientCertificate: w.ClientCertificate}
		grant := func(path, mode, group string) atomicfile.Access {
			access, err := accessOf(mode, group)
			if err != nil {
				all.Problems = append(all.Problems, config.Problem{Path: fmt.Sprintf("workloads[%d].%s.group", n, path), Text: err.Error()})
			}
			return access
		}
		for m, s := range w.Sockets {
			workload.Sockets = append(workload.Sockets, agent.Socket{Path: s.Path, Access: grant(fmt.Sprintf("sockets[%d]", m), s.Mode, s.Group), MaxConnections: s.MaxConnections})
		}
		if w.Files.Dir != "" {
			workload.Files = &agent.Files{Dir: w.Files.Dir, Access: grant("files", w.Files.Mode, w.Files.Group), RereadAfter: w.Files.RereadAfter.Std()}
		}
		o.Workloads = append(o.Workloads, workload)
	}
	if len(all.Problems) > 0 {
		return o, all
	}
	return o, nil
}

// accessOf finds the group, which may be a number.
func accessOf(mode, group string) (atomicfile.Access, error) {
	access := atomicfile.Private
	var err error
	if access.Mode, err = config.ParseMode(mode); err != nil || group == "" {
		return access, err
	}
	if access.Group, err = strconv.Atoi(group); err == nil && access.Group >= 0 {
		return access, nil
	}
	found, err := user.LookupGroup(group)
	if err != nil {
		return access, fmt.Errorf("this machine knows no group %.40q: %w", group, err)
	}
	access.Group, err = strconv.Atoi(found.Gid)
	return access, err
}

func runAgent(ctx context.Context, c *config.Agent, o agent.Options) error {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	o.Metrics = registry
	a, err := agent.New(o)
	if err != nil {
		return err
	}
	told := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if c.Operations.Listen != "" {
		operations, err := listen("operations.listen", c.Operations.Listen, o.Logger)
		if err != nil {
			a.Close()
			return err
		}
		o.Logger.Info("health and metrics", "address", operations.Addr().String())
		server := ops.NewServer(&ops.Readiness{Probe: a.Ready}, a.Problems, registry)
		server.ErrorLog = slog.NewLogLogger(o.Logger.Handler(), slog.LevelWarn)
		monitors := gate.New(gate.Options{Connections: maxMonitors, Logger: o.Logger})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			if err := server.Serve(monitors.Listener(operations)); !errors.Is(err, http.ErrServerClosed) {
				cancel(fmt.Errorf("health and metrics: %w", err))
			}
		}()
		defer func() {
			limit, done := context.WithTimeout(context.Background(), httpStopLimit)
			defer done()
			if server.Shutdown(limit) != nil { // somebody reads very slowly
				_ = server.Close()
			}
			<-ended
		}()
	}
	if err = a.Run(ctx); err == nil && told.Err() == nil {
		err = context.Cause(ctx)
	}
	o.Logger.Info("stopped")
	return err
}
