package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"google.golang.org/grpc/codes"
)

const (
	// steadyRate is that of a large mesh: 500 calls a second renew 21 million certificates of 24 h at half of their lives.
	steadyRate = 500
	// mostOfPeak is the other rate at which latency is measured.
	mostOfPeak = 0.8
	// peakInFlight is how many calls are under way when the peak is looked for.
	peakInFlight = 256
	// herd is how many connections there are under overload.
	herd = 1000
	// flooding is how much more is asked for under overload than can be served.
	flooding = 2
	// settling is the part at the beginning of overload that does not count.
	settling = 0.1
)

// peak is how many certificates a second Kedge issues at most: with tokens, for P-256 keys.
func (b *bench) peak(ctx context.Context, s *server, callers []*caller, next func() request, calls int) (float64, error) {
	requests := make([]request, calls)
	for i := range requests {
		requests[i] = next()
	}
	began := time.Now()
	err := closed(ctx, peakInFlight, calls, func(ctx context.Context, _, i int) error {
		_, err := callers[i%len(callers)].ask(ctx, requests[i])
		return err
	})
	return float64(calls) / time.Since(began).Seconds(), err
}

// latencyRow is latency at one rate, over all rounds. Times are in ms.
type latencyRow struct {
	name                string
	rate                sample
	p50, p99, max, lag  sample
	commit50, commit99  sample
	perCommit, failures sample
}

// latencies measures how long calls take that come at random moments.
func (b *bench) latencies(ctx context.Context) (string, error) {
	dir := filepath.Join(b.dir, "latency")
	if _, err := fill(ctx, dataFolder(dir), smallLedger, 0); err != nil {
		return "", err
	}
	rows := []*latencyRow{{name: fmt.Sprintf("%d/s", steadyRate)}, {name: fmt.Sprintf("%.0f %% of the peak", 100*mostOfPeak)}}
	for round := range (b.rounds + 1) / 2 {
		b.progress("latency: round %d of %d", round+1, (b.rounds+1)/2)
		if err := b.latencyRound(ctx, dir, rows); err != nil {
			return "", err
		}
	}
	return latencyTable(rows), nil
}

func (b *bench) latencyRound(ctx context.Context, dir string, rows []*latencyRow) (err error) {
	s, err := b.startKedge(ctx, b.kedge, dir)
	if err != nil {
		return err
	}
	defer stopped(s, &err)
	callers, release, err := s.crew(ctx, inFlight, nil)
	if err != nil {
		return err
	}
	defer release()
	next := b.crowd.cycle()
	if _, err := b.peak(ctx, s, callers, next, b.calls/4); err != nil { // warms up
		return err
	}
	peak, err := b.peak(ctx, s, callers, next, b.calls)
	if err != nil {
		return err
	}
	for i, rate := range []float64{steadyRate, mostOfPeak * peak} {
		before, err := s.commits(ctx)
		if err != nil {
			return err
		}
		o := open(ctx, callers, rate, b.settings.open, patience, next)
		after, err := s.commits(ctx)
		if err != nil {
			return err
		}
		commits := after.since(before)
		var took, lag sample
		for _, answer := range o.answered {
			took.add(answer.took.Seconds() * 1000)
		}
		for _, late := range o.lag {
			lag.add(late.Seconds() * 1000)
		}
		row := rows[i]
		row.rate.add(float64(o.offered) / b.settings.open.Seconds())
		row.p50.add(took.quantile(0.5))
		row.p99.add(took.quantile(0.99))
		row.max.add(took.max())
		row.lag.add(lag.quantile(0.99))
		row.commit50.add(1000 * commits.seconds.quantile(0.5))
		row.commit99.add(1000 * commits.seconds.quantile(0.99))
		row.perCommit.add(commits.events.mean())
		row.failures.add(float64(o.offered - len(o.answered)))
	}
	return nil
}

// overloadRound is what one round under overload showed.
type overloadRound struct {
	peak, offered, goodput, refused, unanswered float64 // a second, but the last: calls
	share                                       float64 // of the peak
	p50, p99                                    float64 // s, of what was answered
	lag                                         float64 // ms, the 99th percentile
}

// overload offers Kedge twice what it can serve, to see how much of it it still does.
func (b *bench) overload(ctx context.Context) (string, error) {
	dir := filepath.Join(b.dir, "overload")
	if _, err := fill(ctx, dataFolder(dir), smallLedger, 0); err != nil {
		return "", err
	}
	var rounds []overloadRound
	for round := range (b.rounds + 1) / 2 {
		b.progress("overload: round %d of %d", round+1, (b.rounds+1)/2)
		r, err := b.overloadRound(ctx, dir)
		if err != nil {
			return "", err
		}
		rounds = append(rounds, r)
	}
	return overloadTable(rounds), nil
}

func (b *bench) overloadRound(ctx context.Context, dir string) (r overloadRound, err error) {
	s, err := b.startKedge(ctx, b.kedge, dir)
	if err != nil {
		return r, err
	}
	defer stopped(s, &err)
	callers, release, err := s.crew(ctx, herd, nil)
	if err != nil {
		return r, err
	}
	defer release()
	next := b.crowd.cycle()
	if _, err := b.peak(ctx, s, callers, next, b.calls/4); err != nil { // warms up
		return r, err
	}
	// The peak of before and after, since a shared machine changes its pace.
	before, err := b.peak(ctx, s, callers, next, 2*b.calls)
	if err != nil {
		return r, err
	}
	o := open(ctx, callers, flooding*before, b.flood, patience, next)
	after, err := b.peak(ctx, s, callers, next, 2*b.calls)
	if err != nil {
		return r, err
	}
	r.peak = (before + after) / 2
	from := time.Duration(settling * float64(b.flood))
	var took, lag sample
	inTime := 0
	for _, answer := range o.answered {
		took.add(answer.took.Seconds())
		if answer.at >= from && answer.at < b.flood {
			inTime++
		}
	}
	for _, late := range o.lag {
		lag.add(late.Seconds() * 1000)
	}
	r.offered = float64(o.offered) / b.flood.Seconds()
	r.goodput = float64(inTime) / (b.flood - from).Seconds()
	r.share = r.goodput / r.peak
	for code, n := range o.refused {
		if code == codes.DeadlineExceeded || code == codes.Canceled {
			r.unanswered += float64(n)
		} else {
			r.refused += float64(n) / b.flood.Seconds()
		}
	}
	r.p50, r.p99, r.lag = took.quantile(0.5), took.quantile(0.99), lag.quantile(0.99)
	return r, nil
}
