package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/gob"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"kedge/ca/ledger"
	"kedge/issuer/admin"
	"kedge/test/bench/envoys"
)

// streamsVerb is the argument that makes this program hold streams to a server.
const streamsVerb = "streams"

// The aims.
const (
	mostPush       = 2.0 // s until all have acknowledged
	mostPushCPU    = 2.0 // of the bare server's
	mostIdleMemory = 1.5 // of the bare server's
)

// sdsServer is a server with streams.
type sdsServer struct {
	*server
	name   string
	bare   bool
	socket string // of the process that holds the streams
	leaf   []byte
	roots  int // that it has
	push   func(roots int) (began func() (time.Time, error), err error)
}

// sds measures what it takes to bring a new root to very many Envoys, and what they cost while nothing happens.
func (b *bench) sds(ctx context.Context) (text string, err error) {
	dir := filepath.Join(b.dir, "sds")
	b.progress("SDS: issuing %d certificates", b.streams)
	identities, err := issueIdentities(ctx, dataFolder(dir), b.streams)
	if err != nil {
		return "", err
	}
	b.progress("SDS: building a kedge whose port has connections in memory")
	program, err := b.kedgeInMemory(ctx)
	if err != nil {
		return "", err
	}
	pushes, err := b.pushes(ctx, program, dir, identities)
	if err != nil {
		return "", err
	}
	idle, err := b.idleStreams(ctx, program, dir, identities)
	if err != nil {
		return "", err
	}
	return sdsTables(b.streams, pushes, b.idle, idle), nil
}

// issueIdentities makes the data folder of a CA, and client certificates of it, in a file.
func issueIdentities(ctx context.Context, dir string, count int) (path string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	book, err := ledger.Open(dir, ledger.Options{TrustDomain: trustDomain, ProgramVersion: "0.1.0", Logger: log})
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, book.Close()) }()
	authority, err := openCA(ctx, dir, book, time.Now, log)
	if err != nil {
		return "", err
	}
	identities, next := make([]envoys.Identity, count), make(chan int)
	errs := make([]error, 64) // as many share a commit
	var issuing sync.WaitGroup
	for worker := range errs {
		issuing.Go(func() {
			for i := range next {
				certificate, err := prove(ctx, authority, i, time.Now())
				if err != nil {
					errs[worker] = err
					continue
				}
				identities[i] = envoys.Identity{Chain: certificate.Certificate, Key: must(x509.MarshalPKCS8PrivateKey(certificate.PrivateKey))}
			}
		})
	}
	for i := range count {
		next <- i
	}
	close(next)
	issuing.Wait()
	if err := errors.Join(errs...); err != nil {
		return "", err
	}
	path = filepath.Join(filepath.Dir(dir), "identities")
	return path, envoys.WriteIdentities(path, identities)
}

// kedgeInMemory builds cmd/kedge with two files more, testdata/envoys.go and profile.go, and two places in it changed: it listens by that file, and connections that need no descriptor are not
// counted as if they did. As with profiles, that is laid over the source for this build only.
func (b *bench) kedgeInMemory(ctx context.Context) (string, error) {
	replace := map[string]string{}
	for _, name := range []string{"envoys.go", "profile.go"} {
		replace[filepath.Join(b.source, "cmd", "kedge", "bench_"+name)] = filepath.Join(b.source, "test", "bench", "testdata", name)
	}
	for i, change := range []struct{ path, from, to string }{
		{"cmd/kedge/listen.go", `net.Listen("tcp", address)`, "listenInMemory(key, address)"},
		{"issuer/gate/listener.go", "func DescriptorsAllow() int {\n", "func DescriptorsAllow() int {\n\treturn 1 << 20\n}\n\nfunc _() int {\n"},
	} {
		original := filepath.Join(b.source, change.path)
		text, err := os.ReadFile(original)
		if err != nil {
			return "", err
		}
		if !strings.Contains(string(text), change.from) {
			return "", fmt.Errorf("%s has no %q any more, which is to be %q here", change.path, change.from, change.to)
		}
		changed := filepath.Join(b.dir, fmt.Sprintf("changed-%d.go", i))
		if err := os.WriteFile(changed, []byte(strings.Replace(string(text), change.from, change.to, 1)), 0o600); err != nil {
			return "", err
		}
		replace[original] = changed
	}
	return b.buildOver(ctx, "kedge-in-memory", replace)
}

// startSDS starts one of the servers, on both cores when it has the streams in its own process.
func (b *bench) startSDS(ctx context.Context, bare bool, program, dir, identities string, start func(*exec.Cmd) error) (*sdsServer, error) {
	name := "kedge"
	if bare {
		name = "bare"
	}
	folder := filepath.Join(b.dir, "run-"+name)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, err
	}
	s := &sdsServer{bare: bare, socket: filepath.Join(folder, "orders"), roots: 1}
	if err := os.RemoveAll(s.socket); err != nil {
		return nil, err
	}
	var err error
	if bare {
		err = b.startBareSDS(ctx, s, dir, folder, start)
	} else {
		err = b.startKedgeSDS(ctx, s, program, dir, folder, start)
	}
	return s, err
}

func (b *bench) startKedgeSDS(ctx context.Context, s *sdsServer, program, dir, folder string, start func(*exec.Cmd) error) (err error) {
	config, anchors := filepath.Join(folder, "kedge.yaml"), filepath.Join(folder, "anchors.pem")
	s.name = "Kedge"
	write := func(roots int) error {
		var text []byte
		for i := 1; i < roots; i++ {
			text = append(text, anotherRoot(i)...)
		}
		return errors.Join(os.WriteFile(anchors+".new", text, 0o600), os.Rename(anchors+".new", anchors))
	}
	text := fmt.Sprintf(`dataDir: %q
csr: {listen: "127.0.0.1:0", maxConnectionAge: 24h}
operations: {listen: "127.0.0.1:0"}
root: {kind: file, anchorsFile: %q}
`, dataFolder(dir), anchors)
	if err := errors.Join(os.WriteFile(config, []byte(text), 0o600), write(2)); err != nil {
		return err
	}
	s.roots = 2 // an anchors file has one at least
	client := admin.NewClient(filepath.Join(dataFolder(dir), "admin.sock"))
	s.server, err = b.launchOn(ctx, start, folder, []string{envoys.Variable + "=" + s.socket, profileVariable + "=" + s.profile()}, func(started *server) error {
		status, err := client.Status(ctx)
		if err != nil {
			return err
		}
		started.address, started.operations = status.CSRAddress, status.OpsAddress
		if bundle, err := client.Bundle(ctx); err != nil || len(bundle.Roots) < s.roots {
			return fmt.Errorf("the bundle has %d roots (%w)", len(bundle.Roots), err)
		}
		started.roots, err = readRoots(status.RootFile)
		return err
	}, program, "serve", "--config", config)
	if err != nil {
		return err
	}
	if s.leaf, err = s.server.leaf(ctx); err != nil {
		return err
	}
	s.push = func(roots int) (func() (time.Time, error), error) {
		return func() (time.Time, error) { return s.changedAt() }, write(roots)
	}
	return nil
}

// changedAt is when the last new trust anchor was in the bundle, as the log says.
func (s *sdsServer) changedAt() (time.Time, error) {
	text, err := os.ReadFile(s.log)
	if err != nil {
		return time.Time{}, err
	}
	lines := bytes.Split(text, []byte("\n"))
	for i := len(lines) - 1; i >= 0; i-- {
		var line struct {
			Time time.Time `json:"time"`
			Msg  string    `json:"msg"`
		}
		if json.Unmarshal(lines[i], &line) == nil && line.Msg == newAnchor {
			return line.Time, nil
		}
	}
	return time.Time{}, fmt.Errorf("the log does not say %q", newAnchor)
}

// newAnchor is what Kedge logs when there is one.
const newAnchor = "the trust anchors changed"

func (b *bench) startBareSDS(ctx context.Context, s *sdsServer, dir, folder string, start func(*exec.Cmd) error) (err error) {
	s.name = "bare"
	root, err := os.ReadFile(filepath.Join(dataFolder(dir), "root", "root-cert.pem"))
	if err != nil {
		return err
	}
	certificate := newAuthority().leaf(2, net.IPv4(127, 0, 0, 1))
	order := bareSDSOrder{Certificate: envoys.Identity{Chain: certificate.Certificate, Key: must(x509.MarshalPKCS8PrivateKey(certificate.PrivateKey))}, ClientCAs: root,
		Root: anotherRoot(1), Address: filepath.Join(folder, "address")}
	s.leaf = certificate.Certificate[0]
	if err := os.RemoveAll(order.Address); err != nil {
		return err
	}
	var input bytes.Buffer
	if err := gob.NewEncoder(&input).Encode(order); err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	s.server, err = b.launchOn(ctx, func(c *exec.Cmd) error {
		c.Stdin = &input
		return start(c)
	}, folder, []string{envoys.Variable + "=" + s.socket}, func(started *server) error {
		text, err := os.ReadFile(order.Address)
		if err == nil && len(text) == 0 {
			err = errors.New("it has no address yet")
		}
		started.address = string(text)
		return err
	}, program, bareSDSVerb)
	s.push = func(roots int) (func() (time.Time, error), error) {
		began := time.Now()
		_, err := envoys.Do(s.socket, envoys.Order{Push: roots})
		return func() (time.Time, error) { return began, nil }, err
	}
	return err
}

// anotherRoot is the i-th root, in PEM. It is made once.
func anotherRoot(i int) []byte {
	roots.Lock()
	defer roots.Unlock()
	if roots.made == nil {
		roots.made = map[int][]byte{}
	}
	if roots.made[i] == nil {
		key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		template := &x509.Certificate{SerialNumber: big.NewInt(int64(i)), Subject: pkix.Name{Organization: []string{"Kedge"}, CommonName: fmt.Sprintf("root %d", i)},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(10, 0, 0), BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
		roots.made[i] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))})
	}
	return roots.made[i]
}

var roots struct {
	sync.Mutex
	made map[int][]byte
}

// pushRun is how the pushes of one server went.
type pushRun struct {
	name        string
	took, first sample // s until all have acknowledged, and until the first had it
	cpu, all    sample // µs of CPU for each stream until then, and until there was nothing more to do
	responses   sample // for each stream
	opened      float64
}

// pushes pushes a root to all streams of the one server, and then of the other, and so on. Both have all of their streams all the time, each in its own process.
func (b *bench) pushes(ctx context.Context, program, dir, identities string) (runs []*pushRun, err error) {
	var servers []*sdsServer
	for _, bare := range []bool{false, true} {
		s, err := b.startSDS(ctx, bare, program, dir, identities, b.cores.startOnBoth)
		if err != nil {
			return nil, err
		}
		defer stopped(s.server, &err)
		b.progress("SDS: %d streams to %s, in memory", b.streams, s.name)
		began := time.Now()
		if _, err := envoys.Do(s.socket, envoys.Order{Open: &envoys.Open{Count: b.streams, Identities: identities, ServerLeaf: s.leaf}}); err != nil {
			return nil, fmt.Errorf("opening streams to %s: %w\n%s", s.name, err, s.tail())
		}
		servers, runs = append(servers, s), append(runs, &pushRun{name: s.name, opened: time.Since(began).Seconds()})
	}
	for range b.pushCount {
		for i, s := range servers {
			if err := b.onePush(ctx, s, runs[i]); err != nil {
				return nil, fmt.Errorf("a push of %s: %w\n%s", s.name, err, s.tail())
			}
		}
	}
	return runs, nil
}

// profile is where a server writes its profile.
func (s *sdsServer) profile() string { return s.socket + ".pprof" }

// profiled begins a profile of a push, and returns what ends and keeps it. The bare server has none.
func (b *bench) profiled(ctx context.Context, s *sdsServer) (end func() error, err error) {
	if b.keep == "" || s.bare {
		return func() error { return nil }, nil
	}
	toggle := func() error { return s.command.Process.Signal(syscall.SIGUSR1) }
	return func() error {
		if err := toggle(); err != nil {
			return err
		}
		return poll(ctx, func() error {
			return os.Rename(s.profile(), filepath.Join(b.keep, fmt.Sprintf("sds-%d.pprof", s.roots)))
		}, s.ended)
	}, toggle()
}

func (b *bench) onePush(ctx context.Context, s *sdsServer, run *pushRun) error {
	if err := s.rest(ctx); err != nil {
		return err
	}
	end, err := b.profiled(ctx, s)
	if err != nil {
		return err
	}
	before, err := s.cpu()
	if err != nil {
		return err
	}
	s.roots++
	began, err := s.push(s.roots)
	if err != nil {
		return err
	}
	report, err := envoys.Do(s.socket, envoys.Order{Await: s.roots})
	if err != nil {
		return err
	}
	acknowledged, err := s.cpu()
	if err != nil {
		return err
	}
	if err := end(); err != nil {
		return err
	}
	if err := s.rest(ctx); err != nil {
		return err
	}
	after, err := s.cpu()
	if err != nil {
		return err
	}
	at, err := began()
	if err != nil {
		return err
	}
	run.took.add(report.Last.Sub(at).Seconds())
	run.first.add(report.First.Sub(at).Seconds())
	run.cpu.add(micros(acknowledged-before) / float64(b.streams))
	run.all.add(micros(after-before) / float64(b.streams))
	run.responses.add(float64(report.Responses) / float64(b.streams))
	b.progress("SDS: %s pushed %d roots in %.2f s, %.0f µs a stream, %.0f in all", s.name, s.roots, report.Last.Sub(at).Seconds(), micros(acknowledged-before)/float64(b.streams),
		micros(after-before)/float64(b.streams))
	return nil
}

// rest waits until a server has nothing to do.
func (s *sdsServer) rest(ctx context.Context) error {
	const interval, little = 250 * time.Millisecond, 10 * time.Millisecond
	for {
		before, err := s.cpu()
		if err != nil {
			return err
		}
		if !pause(ctx, interval, 0) {
			return ctx.Err()
		}
		after, err := s.cpu()
		if err != nil {
			return err
		}
		if after-before < little {
			return nil
		}
	}
}

// idleRun is what idle streams cost a server, over loopback, with the clients in another process.
type idleRun struct {
	name              string
	perStream, before float64 // octets; MB
	resident          float64 // octets of resident memory a stream
}

func (b *bench) idleStreams(ctx context.Context, program, dir, identities string) (runs []*idleRun, err error) {
	for _, bare := range []bool{false, true} {
		run, err := b.idleRun(ctx, bare, program, dir, identities)
		if err != nil {
			return nil, err
		}
		runs = append(runs, run)
	}
	return runs, nil
}

func (b *bench) idleRun(ctx context.Context, bare bool, program, dir, identities string) (run *idleRun, err error) {
	s, err := b.startSDS(ctx, bare, program, dir, identities, func(c *exec.Cmd) error { return b.cores.start(b.cores.server, c) })
	if err != nil {
		return nil, err
	}
	defer stopped(s.server, &err)
	b.progress("SDS: %d streams to %s, over loopback", b.idle, s.name)
	folder := filepath.Join(b.dir, "clients")
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, err
	}
	orders := filepath.Join(folder, "orders")
	if err := os.RemoveAll(orders); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	clients, err := b.launchOn(ctx, func(c *exec.Cmd) error {
		c.Stdin = strings.NewReader(s.address)
		return b.cores.start(b.cores.generator, c)
	}, folder, []string{envoys.Variable + "=" + orders}, func(*server) error {
		_, err := os.Stat(orders)
		return err
	}, self, streamsVerb)
	if err != nil {
		return nil, err
	}
	defer stopped(clients, &err)
	var used, resident [2]float64
	for i := range used {
		if i == 1 {
			if _, err := envoys.Do(orders, envoys.Order{Open: &envoys.Open{Count: b.idle, Identities: identities, ServerLeaf: s.leaf}}); err != nil {
				return nil, fmt.Errorf("opening streams to %s: %w\n%s", s.name, err, s.tail())
			}
			if err := s.rest(ctx); err != nil {
				return nil, err
			}
		}
		report, err := envoys.Do(s.socket, envoys.Order{Memory: true})
		if err != nil {
			return nil, err
		}
		used[i] = float64(report.Memory)
		if resident[i], err = s.memory("VmRSS"); err != nil {
			return nil, err
		}
	}
	return &idleRun{name: s.name, before: used[0] / 1e6, perStream: (used[1] - used[0]) / float64(b.idle), resident: 1000 * 1024 * (resident[1] - resident[0]) / float64(b.idle)}, nil
}

func sdsTables(count int, pushes []*pushRun, idleCount int, idle []*idleRun) string {
	t := newTable(fmt.Sprintf("A new root for %d Envoys, over connections in memory", count),
		"server | all acknowledged after, s | aim | the first had it after, s | CPU a stream until then, both sides, µs | compared with the bare one | aim | CPU until it rests, µs | responses a stream | opened in, s")
	for i, run := range pushes {
		timeAim, cpuAim, share := "–", "–", run.cpu.median()/pushes[1].cpu.median()
		if i == 0 {
			timeAim = fmt.Sprintf("≤ %.0f s: %s", mostPush, verdict(run.took.median() <= mostPush))
			cpuAim = fmt.Sprintf("≤ %.0f %%: %s", 100*mostPushCPU, verdict(share <= mostPushCPU))
		}
		t.row("%s | %s | %s | %s | %s | %.0f %% | %s | %s | %s | %.0f", run.name, run.took.of("%.2f"), timeAim, run.first.of("%.2f"), run.cpu.of("%.0f"), 100*share, cpuAim,
			run.all.of("%.0f"), run.responses.of("%.2f"), run.opened)
	}
	m := newTable(fmt.Sprintf("%d idle streams over loopback, in the server", idleCount), "server | KiB a stream in use | compared with the bare one | aim | KiB a stream resident | MB before")
	for i, run := range idle {
		share := run.perStream / idle[1].perStream
		aim := "–"
		if i == 0 {
			aim = fmt.Sprintf("≤ %.0f %%: %s", 100*mostIdleMemory, verdict(share <= mostIdleMemory))
		}
		m.row("%s | %.1f | %.0f %% | %s | %.1f | %.0f", run.name, run.perStream/1024, 100*share, aim, run.resident/1024, run.before)
	}
	return t.String() + "\n" + m.String()
}

// playStreams holds streams to the server whose address standard input says.
func playStreams() error {
	var address string
	if _, err := fmt.Fscan(os.Stdin, &address); err != nil {
		return err
	}
	if err := envoys.Play(address); err != nil {
		return err
	}
	stopped, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	<-stopped.Done()
	return nil
}
