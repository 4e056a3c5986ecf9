package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	// keptRate is how many calls a second a good caller makes on the connections that it keeps, which are so many.
	keptRate, keptConnections = 10, 4
	// newRate is how many it makes each on a new connection.
	newRate = 5
	// ramp is the part of a measurement that a neighbour has before it, to come up to speed.
	ramp = 0.25
)

// neighbourRow is how a good caller fares beside a neighbour.
type neighbourRow struct {
	name      string
	did       string
	kept, new sample // ms
	failures  int
	calls     int
	lag       sample // ms
	busy      float64
}

// neighbours measures how long the calls of a good caller take beside hostile ones, who have other addresses.
func (b *bench) neighbours(ctx context.Context) (text string, err error) {
	dir := filepath.Join(b.dir, "neighbours")
	if _, err := fill(ctx, dataFolder(dir), smallLedger, 0); err != nil {
		return "", err
	}
	s, err := b.startKedge(ctx, b.kedge, dir)
	if err != nil {
		return "", err
	}
	defer stopped(s, &err)
	kept, release, err := s.crew(ctx, keptConnections, nil)
	if err != nil {
		return "", err
	}
	defer release()
	if _, err := b.peak(ctx, s, kept, b.crowd.cycle(), b.calls/4); err != nil { // warms up
		return "", err
	}
	var rows []*neighbourRow
	quiet := func(name string) error {
		b.progress("neighbours: %s", name)
		row, err := b.goodCalls(ctx, s, kept)
		if err == nil {
			row.name, row.did = name, "–"
			rows = append(rows, row)
		}
		return err
	}
	if err := quiet("none"); err != nil {
		return "", err
	}
	for _, a := range attacks {
		for _, addresses := range []int{1, manyAddresses} {
			if addresses > 1 && !a.many || !strings.Contains(a.name, b.attacks) {
				continue
			}
			row, err := b.beside(ctx, s, kept, a, addresses)
			if err != nil {
				return "", fmt.Errorf("%s: %w", a.name, err)
			}
			rows = append(rows, row)
		}
	}
	if err := quiet("none, after all of them"); err != nil {
		return "", err
	}
	return neighbourTable(rows), nil
}

// goodCalls is how a good caller fares now.
func (b *bench) goodCalls(ctx context.Context, s *server, kept []*caller) (*neighbourRow, error) {
	row := &neighbourRow{}
	newcomers := make([]*caller, 1+int(2*newRate*b.neighbour.Seconds()))
	for i := range newcomers {
		c, err := s.dial(nil)
		if err != nil {
			return nil, err
		}
		defer c.conn.Close()
		newcomers[i] = c
	}
	cpu, err := s.cpu()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	outcomes := make([]outcome, 2)
	var running sync.WaitGroup
	running.Go(func() { outcomes[0] = open(ctx, kept, keptRate, b.neighbour, patience, b.crowd.cycle()) })
	running.Go(func() { outcomes[1] = open(ctx, newcomers, newRate, b.neighbour, patience, b.crowd.cycle()) })
	running.Wait()
	took := time.Since(began)
	after, err := s.cpu()
	if err != nil {
		return nil, err
	}
	row.busy = (after - cpu).Seconds() / took.Seconds()
	for i, times := range []*sample{&row.kept, &row.new} {
		for _, answer := range outcomes[i].answered {
			times.add(answer.took.Seconds() * 1000)
		}
		for _, late := range outcomes[i].lag {
			row.lag.add(late.Seconds() * 1000)
		}
		row.calls += outcomes[i].offered
		row.failures += outcomes[i].offered - len(outcomes[i].answered)
	}
	return row, ctx.Err()
}

// beside is how a good caller fares while an attack comes from so many addresses. At the end the server has nothing to do any more.
func (b *bench) beside(ctx context.Context, s *server, kept []*caller, a attack, addresses int) (row *neighbourRow, err error) {
	name := fmt.Sprintf("%s; %d at once, from %d address", a.name, a.atOnce, addresses)
	if addresses > 1 {
		name += "es"
	}
	b.progress("neighbours: %s", name)
	n, err := b.playHostile(ctx, hostileOrder{Attack: a.name, Address: s.address, Addresses: addresses, Tokens: b.crowd.tokens, CSRs: b.crowd.csrs[keyP256]})
	if err != nil {
		return nil, err
	}
	defer n.end()
	if _, err := n.done(); err != nil {
		return nil, err
	}
	pause(ctx, time.Duration(ramp*float64(b.neighbour)), 0)
	before, err := n.done()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if row, err = b.goodCalls(ctx, s, kept); err != nil {
		return nil, err
	}
	took := time.Since(began)
	after, err := n.done()
	if err != nil {
		return nil, err
	}
	n.end()
	row.name, row.did = name, fmt.Sprintf("%.0f %s", float64(after-before)/took.Seconds(), a.counts)
	return row, poll(ctx, func() error { return s.isQuiet(ctx) }, s.ended)
}

// isQuiet says what a server still has to do; only those are connected who stay.
func (s *server) isQuiet(ctx context.Context) error {
	counted, err := s.counters(ctx)
	if err != nil {
		return err
	}
	for what, n := range labelled(counted, "kedge_waiting") {
		if n > 0 {
			return fmt.Errorf("%.0f of the kind %s wait", n, what)
		}
	}
	connections := 0.0
	for _, n := range labelled(counted, "kedge_connections") {
		connections += n
	}
	if connections > keptConnections {
		return fmt.Errorf("there are %.0f connections", connections)
	}
	return nil
}

// neighbour is a process of somebody hostile.
type neighbour struct {
	command *exec.Cmd
	in      io.WriteCloser
	ask     *json.Encoder
	out     *json.Decoder
}

// playHostile starts it, on the generator's core.
func (b *bench) playHostile(ctx context.Context, order hostileOrder) (*neighbour, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	n := &neighbour{command: exec.CommandContext(ctx, program, hostileVerb)}
	n.command.Stderr = os.Stderr
	if n.in, err = n.command.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := n.command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	n.ask, n.out = json.NewEncoder(n.in), json.NewDecoder(out)
	if err := b.cores.start(b.cores.generator, n.command); err != nil {
		return nil, err
	}
	if err := n.ask.Encode(order); err != nil {
		n.end()
		return nil, fmt.Errorf("telling a hostile neighbour what to do: %w", err)
	}
	return n, nil
}

// done is how much it has done so far, which is something.
func (n *neighbour) done() (total int64, err error) {
	if err = n.ask.Encode(true); err == nil {
		err = n.out.Decode(&total)
	}
	if err != nil {
		return 0, fmt.Errorf("asking a hostile neighbour how much it has done: %w", err)
	}
	return total, nil
}

// end ends the process, and its connections.
func (n *neighbour) end() {
	_ = n.command.Process.Kill() // it may have ended
	_ = n.command.Wait()         // which closes the pipes
}

func neighbourTable(rows []*neighbourRow) string {
	t := newTable(fmt.Sprintf("Neighbours: a good caller, with %d calls a second on %d connections that it keeps and %d a second each on a new one", keptRate, keptConnections, newRate),
		"beside | which does in a second | kept: p50, ms | ratio to alone | p99, ms | ratio | longest, ms | new: p50, ms | ratio | p99, ms | ratio | longest, ms | failed | the server's core busy | the generator's lag, p99, ms")
	alone := rows[0]
	for _, r := range rows {
		times := func(now, alone *sample) string {
			return fmt.Sprintf("%.1f | %.1f | %.1f | %.1f | %.1f", now.quantile(0.5), now.quantile(0.5)/alone.quantile(0.5), now.quantile(0.99), now.quantile(0.99)/alone.quantile(0.99), now.quantile(1))
		}
		t.row("%s | %s | %s | %s | %d of %d | %.0f %% | %.1f", r.name, r.did, times(&r.kept, &alone.kept), times(&r.new, &alone.new), r.failures, r.calls, 100*r.busy, r.lag.quantile(0.99))
	}
	return t.String()
}
