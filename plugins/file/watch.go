package file

import (
	"log/slog"
	"sync"
	"time"
)

// pollInterval is how often files are looked at that somebody else writes. Reading a few KiB works on every file system and over every kind of exchange; inotify does not see
// what happens on a network file system, and loses its watch when a folder is exchanged.
const pollInterval = 3 * time.Second

// watch looks at something again and again, and keeps what is wrong with it.
type watch struct {
	look    func() (changed bool, err error) // of one goroutine
	what    string                           // for the log
	log     *slog.Logger
	changed chan struct{} // holds one element after look found a change

	mu      sync.Mutex
	problem error

	stop chan struct{}
	done chan struct{}
}

// newWatch looks for the first time before it returns.
func newWatch(what string, look func() (bool, error), interval time.Duration, log *slog.Logger) *watch {
	if interval == 0 {
		interval = pollInterval
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	w := &watch{look: look, what: what, log: log, changed: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	w.again() // nobody knows of anything else yet, so that nothing has changed
	go w.run(interval)
	return w
}

func (w *watch) run(interval time.Duration) {
	defer close(w.done)
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-w.stop:
			return
		case <-ticker.C:
			if !w.again() {
				continue
			}
			w.log.Info("files were exchanged, and are taken up", "what", w.what)
			select {
			case w.changed <- struct{}{}:
			default:
			}
		}
	}
}

// again looks, and says once what is wrong, and that it is right again.
func (w *watch) again() (changed bool) {
	changed, err := w.look()
	w.mu.Lock()
	before := w.problem
	w.problem = err
	w.mu.Unlock()
	switch {
	case err != nil && (before == nil || before.Error() != err.Error()):
		w.log.Error("files are not taken up", "what", w.what, "error", err)
	case err == nil && before != nil:
		w.log.Info("files are good again", "what", w.what)
	}
	return changed
}

func (w *watch) current() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.problem
}

// Close ends the looking.
func (w *watch) close() error {
	close(w.stop)
	<-w.done
	return nil
}
