package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"kedge/ca/atomicfile"
	"kedge/cmd/kedge/config"
)

func newServeCommand(t *target) *cobra.Command {
	return &cobra.Command{
		Use: "serve", Short: "Run the CA", Args: arguments(),
		Long: `Run the CA until SIGTERM or SIGINT. Without a configuration it makes a root of its own on the first start and keeps everything in
./kedge-data; the CSR API is on 127.0.0.1:15012, health and metrics are on 127.0.0.1:15014. The log goes to standard error.`,
		RunE: func(c *cobra.Command, _ []string) error {
			began := time.Now()
			shareOneCore()
			heap := collectSeldom()
			defer runtime.KeepAlive(heap)
			cfg, err := t.load()
			if err != nil {
				return err
			}
			warnings, err := judge(cfg)
			if err != nil {
				return err
			}
			if err := keepSecretsInMemory(); err != nil {
				return err
			}
			level := new(slog.LevelVar)
			log, err := newLogger(c.ErrOrStderr(), cfg.Log, level)
			if err != nil {
				return err
			}
			for _, warning := range warnings {
				log.Warn("configuration", "warning", warning)
			}
			s, err := startServer(c.Context(), cfg, log, level, began)
			if errors.Is(err, errStopped) {
				log.Info("stopping: the CA had not started yet")
				return nil
			}
			if err != nil {
				log.Error("the CA did not start", "error", err)
				return err
			}
			if c.Context().Err() == nil { // else it stops at once
				s.greet(c.OutOrStdout(), t)
			}
			return s.wait(c.Context())
		},
	}
}

// shareOneCore lets calls go on while the ledger waits for the disk, on a machine with one core: there Go would have one processor, and does not take it
// away from a system call for up to 10 ms.
func shareOneCore() {
	if runtime.GOMAXPROCS(0) < 2 {
		runtime.GOMAXPROCS(2)
	}
}

// collectSeldom makes the garbage collector come less often than by itself, unless GOGC says how often. What lives in a CA is small, some 10 MiB, and after every
// 10 MiB more all of it would be gone through: a sixth of all CPU time under load. So there are 32 MiB more, which nobody touches, so that the kernel
// never gives any for them. And with very many calls waiting what lives is large, and going through it whenever as much again was allocated cost a
// fourteenth of what could be served: so twice as much. What it costs is the garbage that waits longer. The caller keeps the result alive.
func collectSeldom() (floor []byte) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200)
	}
	return make([]byte, 32<<20)
}

// keepSecretsInMemory makes sure that no crash leaves key material behind: no core file, and no piped one either, which
// ignores RLIMIT_CORE but not the dumpable flag (core(5)).
func keepSecretsInMemory() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switching core dumps off: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("switching core dumps off: %w", err)
	}
	return nil
}

func newLogger(w io.Writer, c config.Log, level *slog.LevelVar) (*slog.Logger, error) {
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		return nil, fmt.Errorf("log.level: %w", err)
	}
	options := &slog.HandlerOptions{Level: level}
	if c.Format == "text" {
		return slog.New(slog.NewTextHandler(w, options)), nil
	}
	return slog.New(slog.NewJSONHandler(w, options)), nil
}

// greet tells a person what there is now, and what to do next.
func (s *server) greet(w io.Writer, t *target) {
	status := s.status()
	state := fmt.Sprintf("ready after %d ms", time.Since(s.started).Milliseconds())
	if !status.Ready {
		state = "but it is not ready yet, and goes on trying by itself"
	}
	fmt.Fprintf(w, "Kedge %s serves the trust domain %s, %s\n\n", version, status.TrustDomain, state)
	table := newTable(w)
	if !status.Ready {
		table.row("  not ready", status.NotReady)
	}
	table.row("  CSR API", status.CSRAddress+" (TLS)")
	table.row("  health, metrics", "http://"+status.OpsAddress)
	table.row("  root certificate", status.RootFile)
	table.row("  root fingerprint", "sha256:"+status.Root.String())
	table.row("  data folder", status.DataDir)
	if table.Flush() != nil {
		return // nobody reads it
	}
	next := "point an istio-agent's CA_ADDR here, with CA_ROOT_CA=" + status.RootFile
	if identities := s.config.Callers.JoinTokens.Identities; !status.Ready {
		next = "kedge doctor" + t.flags()
	} else if len(identities) > 0 {
		next = fmt.Sprintf("kedge token create%s --identity %s", t.flags(), example(identities[0]))
	}
	fmt.Fprintf(w, "\nNext: %s\n", next)
}

// example makes an identity that a pattern matches.
func example(pattern string) string {
	text := []byte{}
	for i := range len(pattern) {
		if pattern[i] == '*' {
			text = append(text, "web"...)
		} else {
			text = append(text, pattern[i])
		}
	}
	return string(text)
}

// makeDataFolder makes the data folder, or makes sure that it is this user's alone.
func makeDataFolder(dir string) error {
	if err := atomicfile.MakeFolder(dir); err != nil {
		return fmt.Errorf("the data folder: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("looking at the data folder: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("the data folder %s is a file: name another", dir)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("the data folder %s holds keys, and others may enter it (mode %#o): run 'chmod 700 %s'", dir, mode, dir)
	}
	return nil
}
