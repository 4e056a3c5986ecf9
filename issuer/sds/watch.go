package sds

import (
	"context"
	"maps"
	"slices"
	"time"

	"kedge/ca/ledger"
	"kedge/issuer/gate"
)

const (
	// checkEvery is about how often it is looked whether a client certificate still authenticates.
	checkEvery = 10 * time.Second
	// How often the streams are looked at, and how much of the time: of 200,000 one is always due, and each look at all of them takes 30 ms.
	leastPass, mostPass = 20 * time.Millisecond, time.Second
	partOfTime          = 20
	// retiredFor is how long no stream begins on a connection that ends.
	retiredFor = 30 * time.Second
)

// Run renews SVIDs, tells the streams of a new bundle, and ends those whose time has come, until ctx ends. It is called once.
func (c *Callers) Run(ctx context.Context) error {
	var before <-chan struct{}
	for {
		changed := c.ca.Changed() // asked for before looking, so that no change is lost
		if changed != before && c.learnTaints() {
			before = changed
		}
		wait := c.look()
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			c.acks.stop()
			return nil
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// learnTaints learns which authorities are tainted, if that can be known now.
func (c *Callers) learnTaints() bool {
	tainted, err := c.ca.Tainted()
	if err != nil {
		if passedOver, tell := c.lines.Tell(time.Now()); tell {
			c.Log.Error("it is not known which authorities are tainted, which is tried again: until then SVIDs under them are replaced at half of their life", "error", err, "passed_over", passedOver)
		}
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tainted = tainted
	return true
}

// look looks at everything once, and says when to do so again.
func (c *Callers) look() time.Duration {
	began := time.Now()
	before := c.trusted.Load()
	if now := c.bundles(before.bundles); now[0] != before.bundles[0] {
		c.trusted.Store(&trusted{bundles: now, changed: make(chan struct{})})
		close(before.changed)
	}
	c.acks.retry()
	all := c.passOver()
	now := c.ca.Now()
	next := now.Add(mostPass)
	for _, s := range all {
		if due := s.look(now); due.Before(next) {
			next = due
		}
	}
	return rest(next.Sub(now), time.Since(began))
}

// rest is the time until the next look, when something is due after due and the last look took so long.
func rest(due, took time.Duration) time.Duration {
	return min(max(due, leastPass, partOfTime*took), mostPass)
}

// passOver drops what is too old, and returns the sessions.
func (c *Callers) passOver() []*session {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, valid := time.Now(), c.ca.Now()
	for serial, p := range c.parked {
		if now.After(p.until) || !valid.Before(p.svid.NotAfter) {
			delete(c.parked, serial)
		}
	}
	c.forget()
	for connection, since := range c.retired {
		if now.Sub(since) > retiredFor {
			delete(c.retired, connection)
		}
	}
	all := make([]*session, 0, len(c.sessions))
	for s := range c.sessions {
		all = append(all, s)
	}
	return all
}

// isTainted says whether an authority is.
func (c *Callers) isTainted(authority ledger.Hash) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tainted[authority]
}

// retire ends a connection, and first its streams, so that each learns why: a client that opened them again on the same one would come with the same certificate.
func (c *Callers) retire(connection gate.Connection, why error) {
	c.mu.Lock()
	_, already := c.retired[connection]
	c.retired[connection] = time.Now()
	var on []*session
	for _, one := range c.connections[connection] { // and not all sessions: when an issuing CA is tainted, everybody's connection ends
		on = slices.AppendSeq(on, maps.Keys(one.sessions))
	}
	c.mu.Unlock()
	for _, s := range on {
		s.end(why)
	}
	if !already && connection != (gate.Connection{}) {
		connection.Retire()
	}
}
