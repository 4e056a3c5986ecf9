package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// profileVariable tells the program of profiledKedge where to write its profiles.
const profileVariable = "KEDGE_BENCH_PROFILE"

// profiledKedge builds cmd/kedge with one file more, testdata/profile.go, which lets the program profile itself at a signal. The file is laid over the
// source tree for this build only (go build -overlay), so that the product has neither an end point nor a build tag for it.
func (b *bench) profiledKedge(ctx context.Context) (string, error) {
	overlay, program := filepath.Join(b.dir, "overlay.json"), filepath.Join(b.dir, "kedge-profiled")
	text, err := json.Marshal(map[string]any{"Replace": map[string]string{
		filepath.Join(b.source, "cmd", "kedge", "bench_profile.go"): filepath.Join(b.source, "test", "bench", "testdata", "profile.go"),
	}})
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(overlay, text, 0o600); err != nil {
		return "", err
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-overlay", overlay, "-o", program, "./cmd/kedge")
	build.Dir = b.source
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building a kedge that profiles itself: %w\n%s", err, out)
	}
	return program, nil
}

// profiles shows where Kedge's CPU time goes.
func (b *bench) profiles(ctx context.Context) (text string, err error) {
	b.progress("profiles")
	program, err := b.profiledKedge(ctx)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(b.dir, "profile")
	certificates, err := fill(ctx, dataFolder(dir), smallLedger)
	if err != nil {
		return "", err
	}
	file := filepath.Join(b.dir, "cpu.pprof")
	s, err := b.startKedge(ctx, program, dir, profileVariable+"="+file)
	if err != nil {
		return "", err
	}
	defer stopped(s, &err)
	for _, sc := range []scenario{byToken, byCertificate} {
		var proofs []*tls.Certificate
		if sc.certificates {
			proofs = certificates
		}
		if err := b.profile(ctx, s, proofs, file); err != nil {
			return "", err
		}
		for _, view := range views {
			lines, err := view.top(ctx, file)
			if err != nil {
				return "", err
			}
			text += profileText(sc, view, lines)
		}
		if b.keep != "" {
			if err := os.Rename(file, filepath.Join(b.keep, strings.ReplaceAll(sc.name, " ", "-")+".pprof")); err != nil {
				return "", err
			}
		}
	}
	return text, nil
}

// profile writes a profile of a server under load to file.
func (b *bench) profile(ctx context.Context, s *server, proofs []*tls.Certificate, file string) error {
	if err := os.RemoveAll(file); err != nil {
		return err
	}
	callers, release, err := s.crew(ctx, inFlight, proofs)
	if err != nil {
		return err
	}
	defer release()
	next := b.crowd.cycle()
	toggle := func() error { return s.command.Process.Signal(syscall.SIGUSR1) }
	ask := func(d time.Duration) error {
		const some = 10 * inFlight
		for end := time.Now().Add(d); time.Now().Before(end); {
			requests := make([]request, some)
			for i := range requests {
				if requests[i] = next(); proofs != nil {
					requests[i].token = ""
				}
			}
			err := closed(ctx, inFlight, some, func(ctx context.Context, slot, i int) error {
				_, err := callers[slot].ask(ctx, requests[i])
				return err
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
	if err := ask(b.settings.profile / 5); err != nil {
		return err
	}
	if err := toggle(); err != nil {
		return err
	}
	if err := ask(b.settings.profile); err != nil {
		return err
	}
	if err := toggle(); err != nil {
		return err
	}
	return poll(ctx, func() error {
		_, err := os.Stat(file)
		return err
	}, s.ended)
}

// view is a way to look at a profile.
type view struct {
	title string
	args  []string
}

var views = []view{
	{"by what runs", []string{"-nodecount=25"}},
	// What is not shown counts for what calls it.
	{"by what it is for", []string{"-nodecount=40", "-cum", "-show=" +
		`^kedge/|^crypto/x509\.|^crypto/tls\.\(\*Conn\)|^github.com/|^log/slog\.|^go\.etcd\.io/bbolt\.\(\*(Tx|Bucket|node)|^google\.golang\.org/(grpc|protobuf)|` +
		`^golang\.org/x/net|^runtime\.(gcBgMarkWorker|gcAssistAlloc|schedule|mallocgc)$|^encoding/|fdatasync|Fdatasync`}},
}

// top is what pprof says of a profile.
func (v view) top(ctx context.Context, file string) (string, error) {
	out, err := exec.CommandContext(ctx, "go", append(append([]string{"tool", "pprof", "-top"}, v.args...), file)...).Output()
	if err != nil {
		return "", fmt.Errorf("reading a profile: %w", err)
	}
	_, lines, ok := strings.Cut(string(out), "Showing nodes")
	if !ok {
		return "", fmt.Errorf("go tool pprof says %q", out)
	}
	return "Showing nodes" + lines, nil
}
