package hsm

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync"
	"time"
)

// Options says which token, and how it is spoken to.
type Options struct {
	URI        URI           // of the token: its label or serial number, the module, and where the PIN is
	Parameters string        // the reserved argument of C_Initialize, for modules that want one; "": none
	Sessions   int           // signatures that the token makes at once; default 16
	Deadline   time.Duration // of a call of the module, then its process is replaced; default 5 s
	Hide       []string      // variables of the environment that the child does not get: where other secrets are
	StateDir   string        // where it is remembered that a PIN was refused; "": only while the program runs
	Logger     *slog.Logger  // default: nothing is logged
}

const (
	defaultSessions = 16
	defaultDeadline = 5 * time.Second
	startLimit      = 30 * time.Second // of loading a module and logging in
	generateLimit   = 3 * time.Minute  // of making a key: a TPM takes its time for RSA
	findLimit       = 30 * time.Second // of looking for keys, of which a token may have many
	firstPause      = 200 * time.Millisecond
	longestPause    = 10 * time.Second
	watchEvery      = 5 * time.Second
	soundAfter      = time.Minute // a generation that lasted so long was a good one: the next begins at once
)

// Token is a token that is used through a module in a child process. Its methods may be called at once from several goroutines.
type Token struct {
	o   Options
	log *slog.Logger

	mu       sync.Mutex
	current  *generation
	last     *generation // that was lost, and may not be gone yet
	starting *start      // while one is under way
	number   uint64
	pause    time.Duration // before the next start
	due      time.Time     // when it may be
	problem  error         // why there is no generation; nil: there is one, or none was asked for yet
	since    time.Time     // of the problem
	latch    latch         // of the goroutine that starts
	closed   bool
	stopping context.Context // ends with Close
	stop     context.CancelFunc
	running  sync.WaitGroup
}

// start is a generation that is on its way, for all who wait for it.
type start struct {
	done chan struct{}
	gen  *generation
	err  error
}

// Open checks the options. The token is first spoken to when something is asked of it, or some seconds later, so that one that is away keeps nobody from starting. From then on it
// is known within a minute that it is away, whether anybody needs it or not (Problem). Close ends the child.
func Open(o Options) (*Token, error) {
	if err := Supported(); err != nil {
		return nil, err
	}
	switch {
	case o.URI.ModulePath == "":
		return nil, errors.New("PKCS#11 URI: module-path is missing: name the module's file, as in pkcs11:token=roots?module-path=/usr/lib/softhsm/libsofthsm2.so")
	case o.URI.Token == "" && o.URI.Serial == "":
		return nil, errors.New("PKCS#11 URI: it names no token: write token=LABEL or serial=NUMBER")
	case o.Sessions < 0 || o.Sessions > 1024 || o.Deadline < 0:
		return nil, fmt.Errorf("%d sessions with a deadline of %s make no sense", o.Sessions, o.Deadline)
	}
	o.Sessions, o.Deadline = cmp.Or(o.Sessions, defaultSessions), cmp.Or(o.Deadline, defaultDeadline)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if err := KeepOutOfDumps(); err != nil {
		return nil, fmt.Errorf("keeping the PIN out of core dumps: %w", err)
	}
	t := &Token{o: o, log: o.Logger, latch: latch{dir: o.StateDir}}
	t.stopping, t.stop = context.WithCancel(context.Background())
	t.running.Go(t.watch)
	return t, nil
}

// watch asks a token that nobody asks for anything whether it is there: that it is away is said before somebody needs it.
func (t *Token) watch() {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			t.look()
		case <-t.stopping.Done():
			return
		}
	}
}

func (t *Token) look() {
	_ = t.do(t.stopping, func(g *generation) error { // what is wrong is a problem from now on
		if g.asked() {
			return nil
		}
		_, err := g.ask(t.stopping, kindPing, nil, nil, t.o.Deadline)
		return err
	})
}

// Close ends the child, in good order if that goes quickly. Nothing works after it.
func (t *Token) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	t.stop()
	current, last := t.current, t.last
	t.current, t.last = nil, nil
	t.mu.Unlock()
	for _, g := range []*generation{current, last} {
		if g != nil {
			g.end()
		}
	}
	t.running.Wait()
	return nil
}

// Problem says why the token cannot be used now, since when, and what to do; nil when it can, or was not asked yet.
func (t *Token) Problem() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.problem == nil {
		return nil
	}
	return fmt.Errorf("the token %s cannot be used since %s: %w", t.name(), t.since.UTC().Format(time.RFC3339), t.problem)
}

// Restarts is how many times a child was started.
func (t *Token) Restarts() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.number
}

func (t *Token) name() string {
	if t.o.URI.Token != "" {
		return fmt.Sprintf("%q", t.o.URI.Token)
	}
	return "with the serial number " + t.o.URI.Serial
}

// generation returns the one that works, and waits for one that is started, no longer than ctx.
func (t *Token) generation(ctx context.Context) (*generation, error) {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil, ErrClosed
	}
	if g := t.current; g != nil {
		err := g.failure()
		if err == nil {
			t.mu.Unlock()
			return g, nil
		}
		t.current = nil
		t.lost(g, err)
	}
	s := t.starting
	if s == nil {
		s = &start{done: make(chan struct{})}
		t.starting = s
		t.running.Go(func() { t.begin(s) })
	}
	problem := t.problem
	t.mu.Unlock()
	select {
	case <-s.done:
		return s.gen, s.err
	case <-ctx.Done():
		if problem != nil {
			return nil, fmt.Errorf("%w: %w: %w", ErrUnavailable, problem, ctx.Err())
		}
		return nil, fmt.Errorf("%w: it is being started: %w", ErrUnavailable, ctx.Err())
	}
}

// lost notes that a generation has ended, and how long to wait until the next. t is locked.
func (t *Token) lost(g *generation, err error) {
	lasted := time.Since(g.began)
	t.log.Warn("a generation of the PKCS#11 module has ended and is replaced", "token", t.o.URI.Token, "generation", g.number, "lasted", lasted.Round(time.Millisecond).String(),
		"answers", g.served.Load(), "error", err)
	if lasted >= soundAfter {
		t.pause = 0
	}
	t.due = time.Now().Add(t.pause)
	t.longer()
	t.last = g
}

// longer doubles the pause, with a tenth more or less, so that many CAs with one token do not come at the same time. t is locked.
func (t *Token) longer() {
	t.pause = min(max(2*t.pause, firstPause), longestPause)
	t.pause += time.Duration((rand.Float64() - 0.5) / 5 * float64(t.pause))
}

// begin makes the next generation when it is due, for all who wait.
func (t *Token) begin(s *start) {
	t.mu.Lock()
	wait := time.Until(t.due)
	t.number++
	number, last := t.number, t.last
	t.last = nil
	t.mu.Unlock()
	if last != nil { // a token may have no room for two
		last.end()
	}
	if wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-t.stopping.Done():
		}
	}
	g, err := t.launch(number)
	t.mu.Lock()
	t.starting = nil
	if err == nil && t.closed {
		t.mu.Unlock()
		g.end()
		t.mu.Lock()
		g, err = nil, ErrClosed
	}
	switch {
	case err == nil:
		t.current = g
		if t.problem != nil {
			t.log.Info("the token works again", "token", t.o.URI.Token, "generation", number)
		}
		t.problem = nil
	case !errors.Is(err, ErrClosed):
		if t.problem == nil || t.problem.Error() != err.Error() {
			t.log.Error("the token cannot be used", "token", t.o.URI.Token, "generation", number, "error", err)
		}
		if t.problem == nil {
			t.since = time.Now()
		}
		t.problem = err
		t.due = time.Now().Add(t.pause)
		t.longer()
		if !errors.Is(err, ErrWrongPIN) {
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	s.gen, s.err = g, err
	t.mu.Unlock()
	close(s.done)
}

// launch starts a child, loads the module in it, and logs in: with a PIN that the token did not take before not until its source has changed.
func (t *Token) launch(number uint64) (*generation, error) {
	if t.stopping.Err() != nil {
		return nil, ErrClosed
	}
	login, pin, err := t.pin()
	if err != nil {
		return nil, err
	}
	g, err := startChild(number, t.o.Sessions, pin, append([]string{t.o.URI.PINSource.Variable}, t.o.Hide...), t.log)
	clear(pin)
	if err != nil {
		return nil, err
	}
	if err = t.begun(g); err == nil {
		err = t.login(g, login)
	}
	if err == nil {
		t.log.Info("logged in to a token", "token", g.info.Label, "serial", g.info.Serial, "model", g.info.Model, "module", g.info.Module, "library", g.info.Library, "generation", number)
		return g, nil
	}
	g.end()
	if t.stopping.Err() != nil {
		return nil, ErrClosed
	}
	var said *Error
	if errors.As(err, &said) && said.reason == reasonModule {
		err = fmt.Errorf("%w: see that the token is there and that its module reaches it; it is tried again by itself", err)
	}
	return nil, err
}

// pin says how the child gets the PIN; pin is nil unless that is through a pipe.
func (t *Token) pin() (login loginRequest, pin []byte, err error) {
	from := t.o.URI.PINSource
	if from == (PINSource{}) {
		return login, nil, nil
	}
	if login.PINSource, err = from.identity(); err != nil {
		return login, nil, fmt.Errorf("the PIN of the token %s: %w", t.name(), err)
	}
	if err := t.latch.closed(login.PINSource); err != nil {
		return login, nil, err
	}
	login.PINFile = from.File
	if from.Variable != "" {
		text, set := os.LookupEnv(from.Variable)
		if !set || text == "" {
			return login, nil, fmt.Errorf("the PIN of the token %s: the environment variable %s is not set", t.name(), from.Variable)
		}
		pin, login.PINPipe = []byte(text), true
	}
	return login, pin, nil
}

// begun makes sure that the child is this program, and has it load the module and find the token. The limits of the calls count, and the end of it all.
func (t *Token) begun(g *generation) error {
	said, err := g.ask(t.stopping, kindHello, nil, []byte(protocol), startLimit)
	if err == nil && string(said) != protocol {
		err = fmt.Errorf("the child speaks %.40q, and this program %q: they are not the same program", said, protocol)
	}
	if err != nil {
		return err
	}
	u := t.o.URI
	g.info, err = askFor[Info](t.stopping, g, kindStart, startRequest{Module: u.ModulePath, Parameters: t.o.Parameters, Token: u.Token, Serial: u.Serial, Manufacturer: u.Manufacturer,
		Model: u.Model, Sessions: t.o.Sessions}, startLimit)
	return err
}

// login has the child log in, and remembers how that ended. It is remembered before that it may end badly: a child that dies in the login may have left a wrong PIN with the token, unless the
// token has taken that PIN before.
func (t *Token) login(g *generation, r loginRequest) error {
	remember := func(err error) {
		if err != nil {
			t.log.Error("how a login ended cannot be remembered: the token may be tried with a wrong PIN again after a restart", "token", g.info.Label, "error", err)
		}
	}
	secret := r.PINSource != sourceIdentity{}
	known := false
	if secret {
		t.latch.of(g.info)
		if err := t.latch.closed(r.PINSource); err != nil {
			return err
		}
		if known = t.latch.taken(r.PINSource); !known {
			remember(t.latch.begin(r.PINSource))
		}
	}
	source, err := askFor[sourceIdentity](t.stopping, g, kindLogin, r, startLimit)
	var said *Error
	switch answered := errors.As(err, &said); {
	case !secret:
		return err
	case err == nil:
		remember(t.latch.keep(attempt{source, pinTaken}))
	case answered && said.reason == reasonPIN:
		remember(t.latch.keep(attempt{said.source, pinRefused}))
		err = fmt.Errorf("%w: %s", err, t.latch.mend(said.source))
	case answered && said.reason == reasonLocked:
		remember(t.latch.keep(attempt{said.source, pinLocked}))
		err = fmt.Errorf("%w, and then %s", err, t.latch.mend(said.source))
	case answered && !known:
		remember(t.latch.forget())
	}
	return err
}

// do asks a generation for something that may be asked twice: when the generation fails under it, once more of the next one.
func (t *Token) do(ctx context.Context, ask func(*generation) error) error {
	for attempt := 1; ; attempt++ {
		g, err := t.generation(ctx)
		if err != nil {
			return err
		}
		err = ask(g)
		var said *Error
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil && g.failure() == nil:
			return err
		case errors.As(err, &said) && said.ofRequest():
			return err
		}
		g.fail(err)
		if attempt == 2 || errors.Is(err, ErrClosed) {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
}

// Info says what the token and its module say about themselves.
func (t *Token) Info(ctx context.Context) (info Info, err error) {
	err = t.do(ctx, func(g *generation) error {
		info = g.info
		return nil
	})
	return info, err
}

// Keys lists the private keys that the URI's object and id name, or all.
func (t *Token) Keys(ctx context.Context) (keys []Key, err error) {
	var all []keyData
	err = t.do(ctx, func(g *generation) (err error) {
		all, err = askFor[[]keyData](ctx, g, kindList, listRequest{Label: t.o.URI.Object, ID: t.o.URI.ID}, findLimit)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listing the keys of the token %s: %w", t.name(), err)
	}
	for _, data := range all {
		key, err := data.key()
		if err != nil {
			return nil, err
		}
		keys = append(keys, key)
	}
	return keys, nil
}

func (d keyData) key() (Key, error) {
	key := d.Key
	if d.PublicDER == nil {
		return key, nil
	}
	pub, err := x509.ParsePKIXPublicKey(d.PublicDER)
	if err != nil {
		return key, fmt.Errorf("reading the public half of the %s: %w", key, err)
	}
	key.Public = pub
	return key, nil
}

// Find finds the private key that belongs to a public key, wherever on the token it is, and makes sure that it signs. The error wraps ErrNotFound, ErrAmbiguous, ErrRefused,
// ErrWrongPIN or ErrUnavailable.
func (t *Token) Find(ctx context.Context, public crypto.PublicKey) (*Signer, Key, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, Key{}, fmt.Errorf("encoding the public key: %w", err)
	}
	return t.find(ctx, findRequest{Public: der})
}

// FindObject finds the one private key that the URI's object and id name.
func (t *Token) FindObject(ctx context.Context) (*Signer, Key, error) {
	u := t.o.URI
	if u.Object == "" && len(u.ID) == 0 {
		return nil, Key{}, errors.New("PKCS#11 URI: it names no key: write object=LABEL or id=%01")
	}
	return t.find(ctx, findRequest{Label: u.Object, ID: u.ID})
}

// FindID finds the one private key of an id.
func (t *Token) FindID(ctx context.Context, id []byte) (*Signer, Key, error) {
	if len(id) == 0 {
		return nil, Key{}, errors.New("there is no id to find a key by")
	}
	return t.find(ctx, findRequest{ID: id})
}

func (t *Token) find(ctx context.Context, r findRequest) (*Signer, Key, error) {
	var reply findReply
	err := t.do(ctx, func(g *generation) (err error) {
		reply, err = askFor[findReply](ctx, g, kindFind, r, findLimit)
		return err
	})
	if err != nil {
		return nil, Key{}, fmt.Errorf("finding a key on the token %s: %w", t.name(), err)
	}
	key, err := reply.Key.key()
	if err != nil {
		return nil, Key{}, err
	}
	r.Public = reply.Key.PublicDER
	s := &Signer{token: t, public: key.Public, asked: r, name: fmt.Sprintf("%x %x %s", r.Public, r.ID, r.Label), key: key}
	if err := s.prove(ctx); err != nil {
		return nil, Key{}, fmt.Errorf("the %s on the token %s does not sign as its public half says: %w", key, t.name(), err)
	}
	return s, key, nil
}

// Generate makes a key that stays on the token (CKA_SENSITIVE, not CKA_EXTRACTABLE), and makes sure that it signs. The error wraps ErrExists when there is one with that label or id.
// When it cannot be known whether the key was made, the token is looked at before anything is said.
func (t *Token) Generate(ctx context.Context, spec Spec, label string, id []byte) (*Signer, Key, error) {
	if label == "" || len(id) == 0 {
		return nil, Key{}, errors.New("a key on a token has a label and an id")
	}
	for attempt := 1; ; attempt++ {
		g, err := t.generation(ctx)
		if err == nil {
			_, err = askFor[any](ctx, g, kindGenerate, generateRequest{Spec: spec, Label: label, ID: id}, generateLimit)
		}
		var said *Error
		made := attempt == 2 && errors.Is(err, ErrExists) // by the first attempt, whose answer did not come
		if err != nil && !made && (g == nil || ctx.Err() != nil || errors.As(err, &said) && said.ofRequest()) {
			return nil, Key{}, fmt.Errorf("making a %s key on the token %s: %w", spec, t.name(), err)
		}
		if err != nil && !made { // perhaps it was made: what happened is looked at before it is asked for again
			g.fail(err)
		}
		signer, key, findErr := t.find(ctx, findRequest{Label: label, ID: id})
		if findErr == nil {
			return signer, key, nil
		}
		if err = errors.Join(err, findErr); attempt == 2 || !errors.Is(findErr, ErrNotFound) {
			return nil, Key{}, fmt.Errorf("making a %s key on the token %s: %w", spec, t.name(), err)
		}
	}
}

// Delete destroys the private key of an id, and what the token has of its public half. One that is not there is no error.
func (t *Token) Delete(ctx context.Context, id []byte) error {
	if len(id) == 0 {
		return errors.New("there is no id of a key to delete")
	}
	err := t.do(ctx, func(g *generation) error { // a second time it finds nothing
		_, err := askFor[any](ctx, g, kindDelete, deleteRequest{ID: id}, findLimit)
		return err
	})
	if err != nil {
		return fmt.Errorf("deleting the key with the id %x on the token %s: %w", id, t.name(), err)
	}
	return nil
}

// specOf names the kind of a public key; "" for one that CAs do not have.
func specOf(pub crypto.PublicKey) Spec {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		switch pub.Curve {
		case elliptic.P256():
			return P256
		case elliptic.P384():
			return P384
		}
	case *rsa.PublicKey:
		switch pub.N.BitLen() {
		case 2048:
			return RSA2048
		case 3072:
			return RSA3072
		case 4096:
			return RSA4096
		}
	}
	return ""
}
