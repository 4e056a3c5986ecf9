package vault

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

const defaultPoll = time.Minute

// watch looks at something now and then until it is closed.
type watch struct {
	changed chan struct{} // holds one element: that of a change that nobody has received yet
	cancel  context.CancelFunc
	done    chan struct{}

	mu  sync.Mutex
	err error // of the latest look
}

// startWatch has look called at once, and then about every interval; after an error sooner, so that what is well again shows. look says whether something changed.
func startWatch(interval time.Duration, look func(context.Context) (changed bool, err error)) (*watch, error) {
	if interval == 0 {
		interval = defaultPoll
	}
	if interval < 0 {
		return nil, fmt.Errorf("the interval %s at which Vault is asked is negative", interval)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w := &watch{changed: make(chan struct{}, 1), cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for {
			changed, err := look(ctx)
			if ctx.Err() != nil {
				return
			}
			w.mu.Lock()
			w.err = err
			w.mu.Unlock()
			if changed {
				select {
				case w.changed <- struct{}{}:
				default: // one is waiting, and will find this change too
				}
			}
			wait := interval - interval/10 + rand.N(interval/5+1)
			if err != nil {
				wait = min(wait, lastRetry/2)
			}
			timer := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-timer.C:
			}
		}
	}()
	return w, nil
}

func (w *watch) problem() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func (w *watch) close() error {
	w.cancel()
	<-w.done
	return nil
}
