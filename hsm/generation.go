package hsm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// generation is one child with its module, its login, its sessions and its key handles. Once anything is wrong with it, all of it ends.
type generation struct {
	number  uint64
	process *exec.Cmd
	conn    *net.UnixConn
	writer  frameWriter
	info    Info
	began   time.Time
	served  atomic.Uint64
	turns   chan struct{} // holds one element for each signature that the child was asked for and has not answered

	mu      sync.Mutex
	err     error // why it ended; nil while it goes on
	pending map[uint64]chan frame
	next    uint64
	found   map[string]*foundReference // by Signer.name

	ended  chan struct{} // closed once err is set
	exited chan struct{} // closed once the process is gone
}

// foundReference is a key of this generation, once done is closed.
type foundReference struct {
	done  chan struct{}
	reply findReply
	err   error
}

// startChild starts the program as its own child, and shakes hands. /proc/self/exe is this very program, also after an upgrade has put another one in its place.
func startChild(number uint64, sessions int, pin []byte, hidden []string, log *slog.Logger) (*generation, error) {
	if IsChild(os.Args) { // else each would start the next, for ever
		return nil, errors.New("this process was started as a child and does what the program does otherwise: main, or TestMain, has to begin with ChildMain if IsChild")
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "child"), os.NewFile(uintptr(pair[1]), "parent")
	defer ours.Close()
	defer theirs.Close()
	connection, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	conn := connection.(*net.UnixConn)
	g := &generation{number: number, conn: conn, writer: frameWriter{conn: conn}, began: time.Now(), pending: map[uint64]chan frame{}, found: map[string]*foundReference{},
		turns: make(chan struct{}, max(2*sessions, fewest)), ended: make(chan struct{}), exited: make(chan struct{})}
	g.process = exec.Command("/proc/self/exe", childVerb)
	g.process.ExtraFiles = []*os.File{theirs}
	g.process.Env = without(os.Environ(), hidden)
	if pin != nil {
		reading, writing, err := os.Pipe()
		if err != nil {
			conn.Close()
			return nil, err
		}
		defer reading.Close()
		g.process.ExtraFiles = append(g.process.ExtraFiles, reading)
		if _, err := writing.Write(pin); err != nil { // far less than a pipe holds
			conn.Close()
			return nil, errors.Join(err, writing.Close())
		}
		writing.Close()
	}
	_ = unix.CloseRange(socketDescriptor, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC) // what this process was started with and does not know: kernels before 5.11 cannot
	said := &lineLog{log: log, generation: number}
	g.process.Stderr = said
	g.process.WaitDelay = exitLimit // a module may start programs that keep the child's standard error open for good
	if err := g.process.Start(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("starting the child that the module lives in: %w", err)
	}
	go func() {
		_ = g.process.Wait() // how it ended is in its state
		g.fail(fmt.Errorf("%w (%s)", errDied, g.process.ProcessState))
		conn.Close()
		close(g.exited)
	}()
	go g.read()
	return g, nil
}

// without is the environment without some of its variables: the child gets the PIN through a pipe, and no other secret.
func without(environment, hidden []string) []string {
	return slices.DeleteFunc(environment, func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		return slices.Contains(hidden, name)
	})
}

// read takes the answers until the socket ends.
func (g *generation) read() {
	r := bufio.NewReaderSize(g.conn, 64<<10)
	for {
		f, err := readFrame(r)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("%w: it closed its socket", errDied)
			}
			g.fail(err)
			return
		}
		g.mu.Lock()
		answer := g.pending[f.id]
		delete(g.pending, f.id)
		g.mu.Unlock()
		if f.generation != g.number {
			g.fail(fmt.Errorf("the child answered for generation %d, and is %d", f.generation, g.number))
			return
		}
		if answer != nil { // else whoever asked has given up
			answer <- f
		}
	}
}

// fail ends the generation for the first reason that is given. Whoever waits for an answer gets that.
func (g *generation) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return
	}
	g.err = err
	close(g.ended)
}

func (g *generation) failure() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// fewest is how many signatures the child may be asked for ahead, also when the token makes one at a time: several of them go over the socket together.
const fewest = 8

// enter waits until the child may be asked for another signature: of as many as are made at once, and as many again, so that its sessions never wait. Who waits here is no sign that the
// module hangs, however many wait.
func (g *generation) enter(ctx context.Context) (leave func(), err error) {
	select {
	case g.turns <- struct{}{}:
		return func() { <-g.turns }, nil
	case <-g.ended:
		return nil, g.failure()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// asked says whether somebody waits for an answer, which has a limit of its own: a key takes some tokens minutes to make.
func (g *generation) asked() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.pending) > 0
}

// errDied says that the child ended though it was not told to.
var errDied = errors.New("the child that the module lives in ended")

// errHangs says that the child did not answer in time.
var errHangs = errors.New("it does not answer")

// ask asks for something and waits for the answer, no longer than limit. No answer in time ends the generation: a call of a module cannot be cancelled. An end of ctx does not.
func (g *generation) ask(ctx context.Context, kind kind, digest, payload []byte, limit time.Duration) ([]byte, error) {
	answer := make(chan frame, 1)
	g.mu.Lock()
	if g.err != nil {
		g.mu.Unlock()
		return nil, g.err
	}
	g.next++
	id := g.next
	g.pending[id] = answer
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		delete(g.pending, id)
		g.mu.Unlock()
	}()
	if err := g.writer.write(frame{kind: kind, id: id, generation: g.number, digest: digest, payload: payload}); err != nil {
		g.fail(fmt.Errorf("writing to the child: %w", err))
		return nil, g.failure()
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case f := <-answer:
		return g.judge(kind, digest, f)
	case <-g.ended:
		return nil, g.failure()
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-timer.C:
		g.fail(fmt.Errorf("a call of the module has taken more than %s: %w", limit, errHangs))
		return nil, g.failure()
	}
}

func (g *generation) judge(asked kind, digest []byte, f frame) ([]byte, error) {
	g.served.Add(1)
	switch {
	case !bytes.Equal(f.digest, digest):
		g.fail(errors.New("the child answered about another digest"))
		return nil, g.failure()
	case f.kind == kindDone, f.kind == kindHello && asked == kindHello:
		return f.payload, nil
	case f.kind != kindFailed:
		g.fail(fmt.Errorf("the child answered with a frame of the kind %d", f.kind))
		return nil, g.failure()
	}
	var said failure
	if err := json.Unmarshal(f.payload, &said); err != nil {
		g.fail(fmt.Errorf("the child answered what cannot be read: %w", err))
		return nil, g.failure()
	}
	return nil, &Error{Function: said.Function, Code: said.Code, text: said.Text, reason: said.Reason, source: said.Source}
}

// askFor asks with a message and reads the answer as one.
func askFor[R any](ctx context.Context, g *generation, kind kind, request any, limit time.Duration) (reply R, err error) {
	payload, err := json.Marshal(request)
	if err != nil {
		return reply, fmt.Errorf("encoding what is asked: %w", err)
	}
	answer, err := g.ask(ctx, kind, nil, payload, limit)
	if err != nil {
		return reply, err
	}
	if err := json.Unmarshal(answer, &reply); err != nil {
		g.fail(fmt.Errorf("the child answered what cannot be read: %w", err))
		return reply, g.failure()
	}
	return reply, nil
}

// exitLimit is how long a child may take to end in good order. It is more than it waits for its module.
const exitLimit = 4 * time.Second

// end lets the child end in good order, so that the token keeps nothing of it, and kills it when it does not. A child that hangs is killed at once.
func (g *generation) end() {
	g.fail(ErrClosed)
	if !errors.Is(g.failure(), errHangs) {
		_ = g.conn.CloseWrite() // it may be closed
		select {
		case <-g.exited:
			return
		case <-time.After(exitLimit):
		}
	}
	_ = g.process.Process.Kill() // it may have ended
	<-g.exited
}

// lineLog logs what a module writes to its standard error, a bounded part of it.
type lineLog struct {
	log        *slog.Logger
	generation uint64
	rest       []byte
	lines      int
}

const (
	maxLines = 50 // of a generation
	maxLine  = 300
)

func (l *lineLog) Write(text []byte) (int, error) {
	l.rest = append(l.rest, text...)
	for {
		line, rest, ok := bytes.Cut(l.rest, []byte("\n"))
		if !ok {
			if len(l.rest) > maxLine {
				l.rest = l.rest[:0]
			}
			return len(text), nil
		}
		if l.lines++; l.lines <= maxLines {
			l.log.Debug("the PKCS#11 module writes", "generation", l.generation, "line", strings.ToValidUTF8(string(line[:min(len(line), maxLine)]), "?"))
		}
		l.rest = rest
	}
}
