package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// profileVariable tells the program of profiledKedge where to write its profiles.
const profileVariable = "KEDGE_BENCH_PROFILE"

// profiledKedge builds cmd/kedge with one file more, testdata/profile.go, which lets the program profile itself at a signal. The file is laid over the
// source tree for this build only (go build -overlay), so that the product has neither an end point nor a build tag for it.
func (b *bench) profiledKedge(ctx context.Context) (string, error) {
	return b.buildOver(ctx, "kedge-profiled", map[string]string{
		filepath.Join(b.source, "cmd", "kedge", "bench_profile.go"): filepath.Join(b.source, "test", "bench", "testdata", "profile.go"),
	})
}

// buildOver builds cmd/kedge with other files in the place of those of its source, or beside them.
func (b *bench) buildOver(ctx context.Context, name string, replace map[string]string) (string, error) {
	overlay, program := filepath.Join(b.dir, name+".json"), filepath.Join(b.dir, name)
	text, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(overlay, text, 0o600); err != nil {
		return "", err
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-overlay", overlay, "-o", program, "./cmd/kedge")
	build.Dir = b.source
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", name, err, out)
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
	certificates, err := fill(ctx, dataFolder(dir), smallLedger, 0)
	if err != nil {
		return "", err
	}
	file := filepath.Join(b.dir, "cpu.pprof")
	s, err := b.startKedge(ctx, program, dir, profileVariable+"="+file)
	if err != nil {
		return "", err
	}
	defer stopped(s, &err)
	for _, sc := range scenarios {
		cost, err := b.profile(ctx, s, sc, certificates, file)
		if err != nil {
			return "", err
		}
		flat, err := pprof(ctx, file, "-top", "-nodecount=25")
		if err != nil {
			return "", err
		}
		traces, err := pprof(ctx, file, "-traces")
		if err != nil {
			return "", err
		}
		shares, err := classify(traces)
		if err != nil {
			return "", err
		}
		text += profileText(sc, cost, shares, flat)
		if b.keep != "" {
			if err := os.Rename(file, filepath.Join(b.keep, strings.ReplaceAll(sc.name, " ", "-")+".pprof")); err != nil {
				return "", err
			}
		}
	}
	return text, nil
}

// profile writes a profile of a server under load to file, and returns the µs of CPU time that a certificate took meanwhile.
func (b *bench) profile(ctx context.Context, s *server, sc scenario, certificates []*tls.Certificate, file string) (cost float64, err error) {
	if err := os.RemoveAll(file); err != nil {
		return 0, err
	}
	ask, release, err := s.asking(ctx, sc, certificates)
	if err != nil {
		return 0, err
	}
	defer release()
	next := b.crowd.cycle()
	askFor := func(d time.Duration) (calls int, err error) {
		const some = 10 * inFlight
		for end := time.Now().Add(d); time.Now().Before(end); calls += some {
			requests := make([]request, some)
			for i := range requests {
				if requests[i] = next(); sc.certificates {
					requests[i].token = ""
				}
			}
			err := closed(ctx, inFlight, some, func(ctx context.Context, slot, i int) error {
				_, err := ask(ctx, slot, requests[i])
				return err
			})
			if err != nil {
				return 0, err
			}
		}
		return calls, nil
	}
	toggle := func() error { return s.command.Process.Signal(syscall.SIGUSR1) }
	if _, err := askFor(b.settings.profile / 5); err != nil {
		return 0, err
	}
	before, err := s.cpu()
	if err != nil {
		return 0, err
	}
	if err := toggle(); err != nil {
		return 0, err
	}
	calls, err := askFor(b.settings.profile)
	if err != nil {
		return 0, err
	}
	if err := toggle(); err != nil {
		return 0, err
	}
	after, err := s.cpu()
	if err != nil {
		return 0, err
	}
	return micros(after-before) / float64(calls), poll(ctx, func() error {
		_, err := os.Stat(file)
		return err
	}, s.ended)
}

// pprof is what 'go tool pprof' says of a profile, without the lines that name the file.
func pprof(ctx context.Context, file string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, "go", append(append([]string{"tool", "pprof"}, args...), file)...).Output()
	if err != nil {
		return "", fmt.Errorf("reading a profile: %w", err)
	}
	_, text, ok := strings.Cut(string(out), "\nDuration: ")
	if !ok {
		return "", fmt.Errorf("go tool pprof says %q", out)
	}
	_, text, _ = strings.Cut(text, "\n")
	return text, nil
}

// part is a part of the work for a certificate: what has such a function in its stack, and belongs to none of the parts before.
type part struct {
	name    string
	pattern *regexp.Regexp
}

var parts = []part{
	{"garbage collection", regexp.MustCompile(`runtime\.(gc[A-Z]|bgsweep|bgscavenge|deductSweepCredit)`)},
	{"TLS handshake", regexp.MustCompile(`crypto/tls\.\(\*Conn\)\.(H|h)andshake`)},
	{"new connection, but its handshake", regexp.MustCompile(`grpc\.\(\*Server\)\.newHTTP2Transport|transport\.NewServerTransport$|net\.\(\*TCPListener\)|http2Server\)\.(Close|deleteStream)|net\.\(\*conn\)\.Close`)},
	{"CSR: verify its signature", regexp.MustCompile(`CertificateRequest\)\.CheckSignature`)},
	{"CSR: the rest", regexp.MustCompile(`kedge/ca\.(parseCSR|\(\*Granted\)\.ReadCSR)`)},
	{"token: verify its signature", regexp.MustCompile(`crypto/rsa\.VerifyPKCS1v15`)},
	{"token: the rest", regexp.MustCompile(`authn\.\(\*Authenticator\)\.token`)},
	{"client certificate: verify it", regexp.MustCompile(`kedge/ca\.\(\*clientIssuers\)\.find`)},
	{"client certificate: the rest", regexp.MustCompile(`kedge/ca\.\(\*ClientCertificates\)|ledger\.\(\*Ledger\)\.IssueState`)},
	{"leaf: sign", regexp.MustCompile(`crypto/ecdsa\.\(\*PrivateKey\)\.Sign`)},
	{"leaf: verify the new signature", regexp.MustCompile(`crypto/x509\.checkSignature`)},
	{"leaf: the rest", regexp.MustCompile(`kedge/ca\.\(\*Prepared\)\.Sign`)},
	{"ledger: fdatasync", regexp.MustCompile(`syscall\.Fdatasync`)},
	{"ledger: the rest of a commit", regexp.MustCompile(`ledger\.\(\*Ledger\)\.write`)},
	{"ledger: append", regexp.MustCompile(`ledger\.\(\*Ledger\)\.Append`)},
	{"log", regexp.MustCompile(`log/slog\.`)},
	{"metrics", regexp.MustCompile(`kedge/issuer/metrics\.`)},
	{"the rest of Kedge", regexp.MustCompile(`kedge/`)},
	{"gRPC: read", regexp.MustCompile(`http2Server\)\.HandleStreams`)},
	{"gRPC: write", regexp.MustCompile(`transport\.\(\*loopyWriter\)`)},
	{"gRPC: the rest", regexp.MustCompile(`google\.golang\.org/grpc`)},
	{"Go's scheduler and the rest", regexp.MustCompile(``)},
}

// share is how much of a profile is in a part.
type share struct {
	name string
	part float64
}

// classify sorts the stacks of 'go tool pprof -traces' into parts.
func classify(traces string) ([]share, error) {
	shares := make([]share, len(parts))
	for i, p := range parts {
		shares[i].name = p.name
	}
	var total float64
	for _, stack := range strings.Split(traces, "-----------+-------------------------------------------------------\n") {
		fields := strings.Fields(stack)
		if len(fields) < 2 || !strings.HasSuffix(fields[0], "s") {
			continue
		}
		took, err := time.ParseDuration(fields[0])
		if err != nil {
			return nil, fmt.Errorf("go tool pprof says %q: %w", stack, err)
		}
		total += took.Seconds()
		for i, p := range parts {
			if slices.ContainsFunc(fields[1:], p.pattern.MatchString) {
				shares[i].part += took.Seconds()
				break
			}
		}
	}
	if total == 0 {
		return nil, errors.New("the profile has no sample")
	}
	for i := range shares {
		shares[i].part /= total
	}
	slices.SortStableFunc(shares, func(a, b share) int { return cmp.Compare(b.part, a.part) })
	return shares, nil
}
