package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// agentsAProcess is how many agents a process plays: each has a descriptor.
	agentsAProcess = 17_000
	// connecting is how many agents may be dialling or in a handshake: those whom the kernel lets wait (net.core.somaxconn is 4,096), and as many again
	// whom the server has accepted.
	connecting = 9000
	// herdPatience is when those are given up that have no certificate.
	herdPatience = 5 * time.Minute
	// tenths is in how many parts of the herd its pace is shown.
	tenths = 10
)

// herdRun is how a herd fared.
type herdRun struct {
	server  string
	agents  int
	served  sample // s since the beginning
	cpu     float64
	connect float64 // µs of CPU for a certificate over a new connection, right before
	busy    float64 // share of the server's core until the last was served
	reports agentsReport
	counted map[string]float64 // what Kedge counted during it
	rss     [2]float64         // MB, before and at most
	files   int                // at most
}

// stampede lets very many agents come at the same instant, as after a change of the root that reaches them by xDS.
func (b *bench) stampede(ctx context.Context) (string, error) {
	kedgeDir, istioDir := filepath.Join(b.dir, "herd-kedge"), filepath.Join(b.dir, "herd-istio")
	if _, err := fill(ctx, dataFolder(kedgeDir), smallLedger, 0); err != nil {
		return "", err
	}
	if err := b.prepareIstio(istioDir); err != nil {
		return "", err
	}
	starts := []func() (*server, error){
		func() (*server, error) { return b.startKedge(ctx, b.kedge, kedgeDir) },
		func() (*server, error) { return b.startIstio(ctx, istioDir) },
	}
	var runs []*herdRun
	for _, start := range starts {
		run, err := b.herdRun(ctx, start)
		if err != nil {
			return "", err
		}
		runs = append(runs, run)
	}
	return herdTables(runs), nil
}

func (b *bench) herdRun(ctx context.Context, start func() (*server, error)) (run *herdRun, err error) {
	s, err := start()
	if err != nil {
		return nil, err
	}
	defer stopped(s, &err)
	b.progress("a herd of %d agents at %s", b.herd, s.name)
	b.crowd.used = mark{}
	alone, err := b.costOf(ctx, s, byConnection, keyP256, nil)
	if err != nil {
		return nil, err
	}
	leaf, err := s.leaf(ctx)
	if err != nil {
		return nil, err
	}
	run = &herdRun{server: s.name, agents: b.herd, connect: alone.cpu, reports: agentsReport{Answers: map[string]int{}}}
	var crews []*agentsProcess
	defer func() {
		for _, c := range crews {
			c.end()
		}
	}()
	for first := 0; first < b.herd; first += agentsAProcess {
		count := min(agentsAProcess, b.herd-first)
		c, err := b.playAgents(ctx, agentsOrder{Address: s.address, Leaf: leaf, First: first, Count: count, Connecting: connecting*count/b.herd + 1,
			Tokens: b.crowd.tokens, CSRs: b.crowd.csrs[keyP256], Patience: herdPatience})
		if err != nil {
			return nil, err
		}
		crews = append(crews, c)
	}
	for _, c := range crews {
		if err := c.out.Decode(&agentsReport{}); err != nil {
			return nil, fmt.Errorf("making agents: %w", err)
		}
	}
	if run.rss[0], err = s.memory("VmRSS"); err != nil {
		return nil, err
	}
	before, err := s.counters(ctx)
	if err != nil {
		return nil, err
	}
	cpuBefore, err := s.cpu()
	if err != nil {
		return nil, err
	}
	began := time.Now().Add(time.Second)
	for _, c := range crews {
		if err := json.NewEncoder(c.in).Encode(began.UnixNano()); err != nil {
			return nil, fmt.Errorf("telling agents when to begin: %w", err)
		}
	}
	watched, files := make(chan struct{}), make(chan int)
	go func() { files <- s.mostFiles(watched) }()
	for _, c := range crews {
		var report agentsReport
		if decodeErr := c.out.Decode(&report); decodeErr != nil {
			err = errors.Join(err, fmt.Errorf("playing agents: %w", decodeErr))
			continue
		}
		run.add(report)
	}
	close(watched)
	run.files = <-files
	if err != nil {
		return nil, err
	}
	cpuAfter, err := s.cpu()
	if err != nil {
		return nil, err
	}
	if run.rss[1], err = s.memory("VmHWM"); err != nil {
		return nil, err
	}
	if run.counted, err = s.counters(ctx); err != nil {
		return nil, err
	}
	for name, value := range before {
		run.counted[name] -= value
	}
	run.cpu = micros(cpuAfter-cpuBefore) / float64(max(1, len(run.served.values)))
	run.busy = (cpuAfter - cpuBefore).Seconds() / run.served.max()
	return run, nil
}

func (r *herdRun) add(report agentsReport) {
	for _, took := range report.Served {
		r.served.add(took.Seconds())
	}
	r.reports.CPU += report.CPU
	r.reports.Dials += report.Dials
	r.reports.Handshakes += report.Handshakes
	for code, n := range report.Answers {
		r.reports.Answers[code] += n
	}
	if report.Failure != "" {
		r.reports.Failure = report.Failure
	}
}

// agentsProcess plays some of the agents.
type agentsProcess struct {
	command *exec.Cmd
	in      io.WriteCloser
	out     *json.Decoder
}

// playAgents starts it, on the generator's core. It is killed when ctx ends, and reports nothing more.
func (b *bench) playAgents(ctx context.Context, order agentsOrder) (*agentsProcess, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &agentsProcess{command: exec.CommandContext(ctx, program, agentsVerb)}
	p.command.Stderr = os.Stderr
	if p.in, err = p.command.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = json.NewDecoder(out)
	if err := b.cores.start(b.cores.generator, p.command); err != nil {
		return nil, err
	}
	if err := json.NewEncoder(p.in).Encode(order); err != nil {
		p.end()
		return nil, fmt.Errorf("telling agents what to play: %w", err)
	}
	return p, nil
}

// end ends the process, which closes the agents' connections.
func (p *agentsProcess) end() {
	_ = p.command.Process.Kill() // it may have ended
	_ = p.command.Wait()         // which closes the pipes
}

// leaf is the certificate with which a server proves itself, verified.
func (s *server) leaf(ctx context.Context) ([]byte, error) {
	dialer := tls.Dialer{Config: &tls.Config{RootCAs: s.roots, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}}
	conn, err := dialer.DialContext(ctx, "tcp", s.address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Raw, nil
}

// memory is a line of /proc/PID/status, in MB.
func (s *server) memory(name string) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.command.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			kB, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 64)
			return kB / 1000, err
		}
	}
	return 0, fmt.Errorf("/proc/PID/status has no %s", name)
}

// mostFiles is how many descriptors the server has at most, until ended is closed.
func (s *server) mostFiles(ended <-chan struct{}) (most int) {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	folder := fmt.Sprintf("/proc/%d/fd", s.command.Process.Pid)
	for last := false; !last; {
		select {
		case <-tick.C:
		case <-ended:
			last = true
		}
		if info, err := os.Stat(folder); err == nil {
			most = max(most, int(info.Size())) // since Linux 6.2 that is how many there are
		}
	}
	return most
}

// counters are the samples of /metrics, by name with labels. A server without metrics has none.
func (s *server) counters(ctx context.Context) (map[string]float64, error) {
	all := map[string]float64{}
	if s.operations == "" {
		return all, nil
	}
	body, err := s.scrape(ctx)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), " ")
		if !ok || strings.HasPrefix(name, "#") {
			continue
		}
		if all[name], err = strconv.ParseFloat(value, 64); err != nil {
			return nil, fmt.Errorf("/metrics: %q: %w", lines.Text(), err)
		}
	}
	return all, lines.Err()
}

// labelled adds up the samples of a metric, by the value of its one label.
func labelled(counted map[string]float64, metric string) map[string]float64 {
	sums := map[string]float64{}
	for name, value := range counted {
		if rest, ok := strings.CutPrefix(name, metric+"{"); ok {
			_, label, _ := strings.Cut(strings.TrimSuffix(rest, `"}`), `="`)
			sums[label] += value
		}
	}
	return sums
}

// pace is how many certificates came in a second, in each tenth of the herd.
func (r *herdRun) pace() string {
	slices.Sort(r.served.values)
	var paces []string
	n, from := len(r.served.values), 0.0
	for i := range tenths {
		first, last := n*i/tenths, n*(i+1)/tenths
		if last == first {
			continue
		}
		until := r.served.values[last-1]
		paces = append(paces, fmt.Sprintf("%.0f", float64(last-first)/(until-from)))
		from = until
	}
	return strings.Join(paces, " · ")
}

func herdTables(runs []*herdRun) string {
	t := newTable("A herd: agents that come at the same instant, each with a connection of its own", "server | agents | not served | median wait, s | p99, s | longest, s | "+
		"certificates a second | the server's core busy | the generator's core busy | CPU a certificate, µs | by itself, with a new connection, µs | ratio | MB before | MB at most | descriptors at most")
	paces := newTable("The herd's pace", "server | certificates a second, in each tenth of the herd")
	tries := newTable("The herd's tries", "server | connections begun, an agent | handshakes done | calls answered, an agent, by code | the server's handshakes, an agent | the server's calls, an agent | "+
		"refused by the gate, in all")
	for _, r := range runs {
		per := func(n float64) string { return fmt.Sprintf("%.3f", n/float64(r.agents)) }
		each := func(counts map[string]float64, write func(float64) string) string {
			var all []string
			for name, n := range counts {
				if n != 0 {
					all = append(all, name+" "+write(n))
				}
			}
			slices.Sort(all)
			if len(all) == 0 {
				return "–"
			}
			return strings.Join(all, ", ")
		}
		whole := func(n float64) string { return fmt.Sprintf("%.0f", n) }
		answers := map[string]float64{}
		for code, n := range r.reports.Answers {
			answers[code] = float64(n)
		}
		n := len(r.served.values)
		t.row("%s | %d | %d | %.1f | %.1f | %.1f | %.0f | %.0f %% | %.0f %% | %.0f | %.0f | %.0f %% | %.0f | %.0f | %d", r.server, r.agents, r.agents-n, r.served.quantile(0.5), r.served.quantile(0.99),
			r.served.max(), float64(n)/r.served.max(), 100*r.busy, 100*r.reports.CPU.Seconds()/r.served.max(), r.cpu, r.connect, 100*r.cpu/r.connect, r.rss[0], r.rss[1], r.files)
		paces.row("%s | %s", r.server, r.pace())
		tries.row("%s | %s | %s | %s | %s | %s | %s", r.server, per(float64(r.reports.Dials)), per(float64(r.reports.Handshakes)), each(answers, per),
			each(labelled(r.counted, "kedge_handshakes_total"), per), each(labelled(r.counted, "kedge_csr_requests_total"), per),
			each(labelled(r.counted, "kedge_refused_total"), whole))
	}
	return t.String() + "\n" + paces.String() + "\n" + tries.String()
}
