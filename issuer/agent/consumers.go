package agent

import (
	"slices"
	"sync"
	"time"
)

// consumers knows which trust bundle, or which SVID, each consumer of an identity holds. They are told apart by the order in which the agent took them: 1 is the first, 0
// means that it is not known.
type consumers struct {
	grace time.Duration // for which one that went away counts as before

	mu    sync.Mutex
	begun time.Time
	live  map[*consumer]bool
	gone  []departed
	moved chan struct{} // closed when somebody holds another one, or comes, or goes
}

// consumer verifies with the trust bundle that it was given, or shows the SVID.
type consumer struct {
	of   *consumers
	held uint64
}

type departed struct {
	held  uint64
	until time.Time
}

// newConsumers begins when the agent does: those who held a bundle before may not be back yet.
func newConsumers(grace time.Duration) *consumers {
	return &consumers{grace: grace, begun: time.Now(), live: map[*consumer]bool{}, moved: make(chan struct{})}
}

// enter adds a consumer, of which it is not known yet what it holds.
func (c *consumers) enter() *consumer {
	c.mu.Lock()
	defer c.mu.Unlock()
	member := &consumer{of: c}
	c.live[member] = true
	c.notify()
	return member
}

// holds notes what the consumer holds.
func (m *consumer) holds(order uint64) {
	m.of.mu.Lock()
	defer m.of.mu.Unlock()
	if m.held != order {
		m.held = order
		m.of.notify()
	}
}

// leave notes that the consumer went away. It may be back soon.
func (m *consumer) leave() {
	c := m.of
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.live[m] {
		return
	}
	delete(c.live, m)
	c.forget()
	if i := slices.IndexFunc(c.gone, func(d departed) bool { return d.held == m.held }); i >= 0 { // those that held the same are one: however many come and go
		c.gone = slices.Delete(c.gone, i, i+1)
	}
	c.gone = append(c.gone, departed{m.held, time.Now().Add(c.grace)})
	c.notify()
}

// oldest is the oldest that any consumer holds; latest if there are none. It may be another when moved is closed, or after again, unless that is 0.
func (c *consumers) oldest(latest uint64) (order uint64, moved <-chan struct{}, again time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forget()
	order = latest
	for member := range c.live {
		order = min(order, member.held)
	}
	counts := func(held uint64, until time.Time) {
		order = min(order, held)
		if left := time.Until(until); again == 0 || left < again {
			again = max(left, 1)
		}
	}
	for _, d := range c.gone {
		counts(d.held, d.until)
	}
	if until := c.begun.Add(c.grace); time.Now().Before(until) {
		counts(0, until)
	}
	return order, c.moved, again
}

// count is how many consumers there are.
func (c *consumers) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.live)
}

func (c *consumers) forget() {
	now := time.Now()
	c.gone = slices.DeleteFunc(c.gone, func(d departed) bool { return !now.Before(d.until) })
}

func (c *consumers) notify() {
	close(c.moved)
	c.moved = make(chan struct{})
}
