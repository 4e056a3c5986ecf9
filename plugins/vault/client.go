package vault

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	defaultTimeout = 10 * time.Second
	firstRetry     = time.Second // wait after a failed login or renewal, doubled up to …
	lastRetry      = 30 * time.Second
	// A call that is denied with a token of less than this age, which Vault takes, wants more than Kedge's role has. With an older one it may be that
	// the role has got it since: a new login shows.
	roleAge = time.Minute
	look    = time.Minute // how often it is seen whether a renewal is due, since the clock may be set
)

// ClientOptions say which Vault it is, and how Kedge logs in.
type ClientOptions struct {
	Address    string        // https://HOST or https://HOST:PORT; http only to this machine, for an agent or a proxy of Vault's
	Namespace  string        // of Vault Enterprise or OpenBao; empty: the root namespace
	CAFile     string        // PEM; under what the server's certificate must be. Empty: the system's roots. Read anew for each login
	ServerName string        // the name in the server's certificate; empty: the address's host
	Timeout    time.Duration // of a call, from the connection to the last octet of the answer; default 10 s
	Login      Login         // how Kedge proves itself
	Logger     *slog.Logger  // default: nothing is logged
}

// Client is a login to a Vault, or to an OpenBao, that lasts. The token is renewed when two thirds of its time are over; when that does not
// lengthen it, and when Vault no longer takes it, Kedge logs in anew. Its methods may be called at once from several goroutines.
type Client struct {
	o    ClientOptions
	log  *slog.Logger
	stop context.CancelFunc
	done chan struct{}

	turn chan struct{} // holds one element while somebody logs in or renews

	mu       sync.Mutex
	session  *session // nil before the first login
	failures int      // in a row
	retry    time.Time
	problem  error

	refused      [sha256.Size]byte // version of the secret id that Vault did not take
	refusedUntil time.Time         // when it may be tried again
}

// session is what one login, or one renewal, gave. It is never changed.
type session struct {
	*connection
	grant
	granted time.Duration // the ttl at the login
	since   time.Time     // the login
	checked time.Time     // when it was last seen that Vault takes the token
	renew   time.Time     // when it is renewed; zero: never
	anew    bool          // the login came because Vault did not take the token before
}

// OpenClient checks the options and the files that they name. It logs in beside the caller, and goes on trying: a Vault that is sealed or away is no error,
// but a Problem. Close ends that.
func OpenClient(o ClientOptions) (*Client, error) {
	c, err := newClient(o)
	if err != nil {
		return nil, err
	}
	if ignored := ignoredVariables(); len(ignored) > 0 {
		c.log.Info("environment variables of Vault's tools are set and not used: the configuration says everything", "variables", ignored)
	}
	ctx, stop := context.WithCancel(context.Background())
	c.stop, c.done = stop, make(chan struct{})
	go func() {
		defer close(c.done)
		c.keep(ctx)
	}()
	return c, nil
}

// newClient makes a client that logs in when the first call wants it, and that nobody keeps logged in.
func newClient(o ClientOptions) (*Client, error) {
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if o.Timeout < 0 {
		return nil, fmt.Errorf("the time limit %s of calls to Vault is negative", o.Timeout)
	}
	if err := checkAddress(o.Address); err != nil {
		return nil, err
	}
	o.Address = strings.TrimSuffix(o.Address, "/")
	o.Namespace = strings.Trim(o.Namespace, "/")
	var err error
	if o.Login, err = o.Login.complete(); err != nil {
		return nil, err
	}
	probe, err := o.connect("")
	if err != nil {
		return nil, err
	}
	probe.close()
	c := &Client{o: o, log: o.Logger, turn: make(chan struct{}, 1)}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// ignoredVariables are those of Vault's and OpenBao's tools, without their values.
func ignoredVariables() []string {
	var names []string
	for _, pair := range os.Environ() {
		name, _, _ := strings.Cut(pair, "=")
		if strings.HasPrefix(name, "VAULT_") || strings.HasPrefix(name, "BAO_") {
			names = append(names, name)
		}
	}
	return names
}

// Close ends the login's upkeep. The token is left to its end: another process may have the same.
func (c *Client) Close() error {
	c.stop()
	<-c.done
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != nil {
		c.session.close()
	}
	return nil
}

// Problem says why Kedge is not logged in, or cannot renew its token, and what to do; nil when all is well.
func (c *Client) Problem() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.problem
}

// read, write and remove make one call each. into is a pointer to what the whole answer is decoded into, or nil.
func (c *Client) read(ctx context.Context, path string, into any) error {
	return c.call(ctx, c.o.Timeout, http.MethodGet, path, nil, into)
}

func (c *Client) write(ctx context.Context, limit time.Duration, path string, body, into any) error {
	return c.call(ctx, limit, http.MethodPut, path, body, into)
}

func (c *Client) remove(ctx context.Context, path string) error {
	return c.call(ctx, c.o.Timeout, http.MethodDelete, path, nil, nil)
}

// call makes a call within the limit. One that is denied is made again after a new login, if the token was the reason.
func (c *Client) call(ctx context.Context, limit time.Duration, method, path string, body, into any) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if end, limited := ctx.Deadline(); limited {
		limit = min(limit, time.Until(end).Round(100*time.Millisecond))
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	s, err := c.signedIn(ctx, nil)
	if err != nil {
		return err
	}
	err = s.send(ctx, method, path, body, into)
	if isDenied(err) {
		next, loginErr := c.signedIn(ctx, &denial{s, time.Now()})
		if loginErr != nil {
			return fmt.Errorf("%w (and %w)", c.explain(err, limit, method, path), loginErr)
		}
		if next.token != s.token || next.since != s.since {
			s = next
			err = s.send(ctx, method, path, body, into)
		}
	}
	return c.explain(err, limit, method, path)
}

func (c *Client) current() *session {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.session
}

func (c *Client) use(s *session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if before := c.session; before != nil && before.connection != s.connection {
		before.close()
	}
	c.session = s
}

// take waits for the turn to log in or to renew.
func (c *Client) take(ctx context.Context) error {
	select {
	case c.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for the login to the Vault %s: %w", c.o.Address, ctx.Err())
	}
}

func (c *Client) release() { <-c.turn }

// denial is of a call.
type denial struct {
	session *session
	at      time.Time
}

// signedIn returns a session, and logs in if there is none, or if the one that a call was denied with is no longer good. It returns that one
// when it is: the call wants a permission that it does not have.
func (c *Client) signedIn(ctx context.Context, denied *denial) (*session, error) {
	if s := c.current(); s != nil && denied == nil {
		return s, nil
	}
	if err := c.take(ctx); err != nil {
		return nil, err
	}
	defer c.release()
	s := c.current()
	if s != nil && (denied == nil || s.since != denied.session.since) {
		return s, nil
	}
	if s == nil {
		return c.start(ctx, false)
	}
	good, err := c.stillGood(ctx, s, denied.at)
	if err != nil {
		return nil, err
	}
	if good {
		return c.current(), nil
	}
	return c.start(ctx, true)
}

// stillGood says whether Vault takes the token, with which a call was denied, and whether it is not so old that another might be allowed more. Whoever calls it has the turn.
func (c *Client) stillGood(ctx context.Context, s *session, denied time.Time) (bool, error) {
	now := time.Now()
	if s.checked.After(denied) { // many calls were denied at once
		return true, nil
	}
	if now.Sub(s.since) > roleAge {
		return false, nil
	}
	if _, err := c.lookUpOver(ctx, s.connection, s.token); err != nil && !isDenied(err) {
		return false, err
	} else if err != nil && !(s.anew && now.Sub(s.since) < firstRetry) { // a token whose policies do not let it look itself up is not replaced over and over
		return false, nil
	}
	next := *s
	next.checked = time.Now()
	c.use(&next)
	return true, nil
}

// start logs in. Whoever calls it has the turn. After a failure it returns that failure for a while, so that callers together log in no more often than one would.
func (c *Client) start(ctx context.Context, anew bool) (*session, error) {
	c.mu.Lock()
	problem, wait := c.problem, time.Until(c.retry)
	c.mu.Unlock()
	if problem != nil && wait > 0 {
		return nil, problem
	}
	version, latched := c.latched()
	if latched {
		return nil, problem
	}
	g, err := c.logIn(ctx)
	if isProofRefused(err) {
		c.latch(version)
	}
	var connection *connection
	if err == nil {
		connection, err = c.o.connect(g.token)
	}
	if err != nil {
		err = fmt.Errorf("logging in to Vault: %w", err)
		if !errors.Is(err, context.Canceled) {
			c.failed(err)
		}
		return nil, err
	}
	now, before := time.Now(), c.current()
	s := &session{connection: connection, grant: g, granted: g.ttl, since: now, checked: now, renew: renewal(now, g.ttl), anew: anew}
	if before != nil && before.token == s.token && !before.renew.IsZero() { // nobody has put another into the file
		s.granted = max(s.granted, before.granted)
		if now.Before(before.renew) {
			s.renew = before.renew
		} else if g.ttl <= s.granted/2 {
			s.renew = now
			c.use(s)
			c.failed(fmt.Errorf("the token of %s for the Vault %s ends at %s, and cannot be lengthened: put another there", c.o.Login.Token, c.o.Address,
				now.Add(g.ttl).UTC().Format(time.RFC3339)))
			return s, nil
		}
	}
	c.use(s)
	c.works()
	c.log.Info("logged in to Vault", "address", c.o.Address, "method", c.o.Login.String(), "ttl", g.ttl.String(), "renewable", g.renewable)
	return s, nil
}

// latched says whether Vault did not take the secret id that is there now, not long ago. If so, it is looked at again soon.
func (c *Client) latched() (version [sha256.Size]byte, latched bool) {
	if c.o.Login.AppRole == nil {
		return version, false
	}
	version = c.o.Login.AppRole.SecretID.version()
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	latched = c.problem != nil && version == c.refused && now.Before(c.refusedUntil)
	if latched {
		c.retry = now.Add(firstRetry)
	}
	return version, latched
}

// latch keeps a secret id from being tried again soon.
func (c *Client) latch(version [sha256.Size]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refused, c.refusedUntil = version, time.Now().Add(lockout)
}

// renewal is when two thirds of a token's time are over, or up to a tenth of it earlier, so that many do not come at once.
func renewal(now time.Time, ttl time.Duration) time.Time {
	if ttl <= 0 {
		return time.Time{}
	}
	return now.Add(2*ttl/3 - rand.N(ttl/10+1))
}

// failed notes why there is no session, or none that lasts.
func (c *Client) failed(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wait := min(firstRetry<<min(c.failures, 10), lastRetry)
	c.failures++
	c.retry = time.Now().Add(wait/2 + rand.N(wait/2))
	if c.problem == nil || c.problem.Error() != err.Error() {
		c.log.Error("the login to Vault does not work and is tried again", "error", err)
	}
	c.problem = err
}

func (c *Client) works() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.problem != nil {
		c.log.Info("the login to Vault works again", "address", c.o.Address)
	}
	c.problem, c.failures, c.retry = nil, 0, time.Time{}
}

// keep logs in and renews until ctx ends.
func (c *Client) keep(ctx context.Context) {
	for {
		c.tend(ctx)
		timer := time.NewTimer(c.untilNext())
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

func (c *Client) untilNext() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	next := time.Now().Add(look)
	if c.problem != nil {
		next = c.retry
	} else if c.session != nil && !c.session.renew.IsZero() && c.session.renew.Before(next) {
		next = c.session.renew
	}
	return max(time.Until(next), 10*time.Millisecond)
}

// tend does what is due now. What fails is a Problem.
func (c *Client) tend(ctx context.Context) {
	if err := c.take(ctx); err != nil {
		return
	}
	defer c.release()
	s := c.current()
	if s == nil {
		_, _ = c.start(ctx, false) // it notes its failure
		return
	}
	if c.Problem() == nil && (s.renew.IsZero() || time.Now().Before(s.renew)) {
		return
	}
	if s.renewable {
		again, err := c.renew(ctx, s)
		if err == nil && again {
			return
		}
		if r := refused(err); err != nil && (r == nil || r.isBusy()) { // else Vault does not renew it, as after a change of the client certificate
			if !errors.Is(err, context.Canceled) {
				c.failed(err)
			}
			return
		}
	}
	_, _ = c.start(ctx, false)
}

// renew lengthens the token's time, over a new connection, for which the certificates are read anew. again is false when little came of it: the token nears
// the end of what it may be lengthened to.
func (c *Client) renew(ctx context.Context, s *session) (again bool, err error) {
	const route = "auth/token/renew-self"
	connection, err := c.o.connect(s.token)
	if err != nil {
		return false, fmt.Errorf("renewing Kedge's token: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, c.o.Timeout)
	defer cancel()
	var answer authentication
	err = connection.send(limited, http.MethodPut, route, map[string]any{}, &answer)
	if err != nil {
		connection.close()
		return false, fmt.Errorf("renewing Kedge's token: %w", c.explain(err, c.o.Timeout, http.MethodPut, route))
	}
	if answer.Auth == nil {
		connection.close()
		return false, fmt.Errorf("renewing Kedge's token at the Vault %s: its answer is no renewal", c.o.Address)
	}
	now := time.Now()
	next := *s
	next.connection, next.checked = connection, now
	next.ttl, next.renewable = time.Duration(answer.Auth.LeaseDuration)*time.Second, answer.Auth.Renewable
	next.granted, next.renew = max(s.granted, next.ttl), renewal(now, next.ttl)
	if again = next.ttl > s.granted/2; !again {
		next.renew = now
	}
	c.use(&next)
	if again {
		c.works()
	}
	c.log.Debug("renewed the token for Vault", "address", c.o.Address, "ttl", next.ttl.String())
	return again, nil
}
