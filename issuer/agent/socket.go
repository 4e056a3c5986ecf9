package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"

	"kedge/ca/atomicfile"
	"kedge/issuer/peercred"
	"kedge/issuer/sds"
	"kedge/issuer/sparing"
	"kedge/issuer/workload"
)

// What one who may connect can cost the agent.
const (
	maxStreams = 64        // of one connection: Envoy has one a secret
	maxMessage = 256 << 10 // octets of a request
	maxHeaders = 16 << 10  // octets
	// longestPath is what the kernel takes (sockaddr_un, unix(7)).
	longestPath = 107
	// stopLimit is how long the sockets wait for answers that are under way when the agent stops; streams are ended.
	stopLimit = 2 * time.Second
)

// door is the sockets of one identity.
type door struct {
	server    *grpc.Server
	listeners []*listener
	end       context.CancelFunc // of the streams
}

// openDoor opens an identity's sockets. Nobody is served yet.
func openDoor(i *identity, sockets []Socket) (*door, error) {
	streams, end := context.WithCancel(context.Background())
	options := append([]grpc.ServerOption{
		grpc.Creds(localCredentials{}),
		sds.ServerOption(),
		grpc.MaxConcurrentStreams(maxStreams), grpc.MaxRecvMsgSize(maxMessage), grpc.MaxHeaderListSize(maxHeaders),
		grpc.ReadBufferSize(4 << 10), grpc.WriteBufferSize(4 << 10), // connections are mostly idle
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.ChainStreamInterceptor(func(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			ctx, cancel := context.WithCancel(stream.Context())
			defer cancel()
			defer context.AfterFunc(streams, cancel)()
			err := handle(server, endingStream{stream, ctx})
			if streams.Err() != nil { // go-spiffe never comes back after Canceled
				return status.Error(codes.Unavailable, "the agent is stopping: come back")
			}
			return err
		}),
	}, workload.Options()...)
	d := &door{server: grpc.NewServer(options...), end: end}
	sds.New(sds.Options{Opener: i, Ending: streams, Logger: i.log}).Register(d.server)
	workloadpb.RegisterSpiffeWorkloadAPIServer(d.server, &workload.Server{Opener: i})
	reflection.Register(d.server) // SPIFFE Workload Endpoint 7
	for _, s := range sockets {
		l, err := listen(s, i.log)
		if err != nil {
			d.close()
			return nil, err
		}
		d.listeners = append(d.listeners, l)
	}
	return d, nil
}

// endingStream ends with the agent.
type endingStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s endingStream) Context() context.Context { return s.ctx }

// servers serve a socket each, until the door is closed.
func (d *door) servers() (all []func() error) {
	for _, l := range d.listeners {
		all = append(all, func() error { return d.server.Serve(l) })
	}
	return all
}

// watch notices sockets that somebody removes, until ctx ends.
func (d *door) watch(ctx context.Context, i *identity) {
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			d.look(i)
		case <-ctx.Done():
			return
		}
	}
}

// look notes of each socket whether it is still where it was made. Who cleans up a folder for temporary files may remove it, and the kernel tells the agent nothing.
func (d *door) look(i *identity) {
	for _, l := range d.listeners {
		var gone error
		if now, err := os.Lstat(l.path); err != nil || !os.SameFile(now, l.made) {
			gone = fmt.Errorf("the socket %s was removed, so that nobody can connect any more: find out who does that, and start the agent again", l.path)
		}
		if i.note("socket "+l.path, gone) && gone != nil {
			i.log.Error("a socket is gone", "error", gone)
		}
	}
}

func (d *door) close() {
	d.end()
	timer := time.AfterFunc(stopLimit, d.server.Stop)
	defer timer.Stop()
	d.server.GracefulStop()
	for _, l := range d.listeners {
		_ = l.Close() // a second time, if it was served
	}
}

// CheckSocketPath says whether a socket can have this path.
func CheckSocketPath(path string) error {
	if len(path) > longestPath {
		return fmt.Errorf("the socket's path %s has %d octets, and a unix socket's has at most %d: choose a shorter one", path, len(path), longestPath)
	}
	return nil
}

// listen makes a socket. What an agent left that was killed is replaced; the socket of one that runs is not.
func listen(s Socket, log *slog.Logger) (*listener, error) {
	if err := CheckSocketPath(s.Path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(s.Path)
	if err := makeSocketFolder(dir, s.Access); err != nil {
		return nil, err
	}
	folder, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("opening the folder of the socket %s: %w", s.Path, err)
	}
	defer folder.Close()                                               // ends the lock
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX); err != nil { // of two agents that start at once one sees the other
		return nil, fmt.Errorf("waiting for others who make sockets in %s: flock: %w", dir, err)
	}
	if info, err := folder.Stat(); err == nil && info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0 {
		log.Warn("everybody may replace the socket, since everybody may write to its folder: put it into a folder that only the agent's user may write to", "socket", s.Path)
	}
	if err := removeStale(s.Path); err != nil {
		return nil, err
	}
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error { // nobody gets in before it has its mode
		var failed error
		return errors.Join(raw.Control(func(fd uintptr) { failed = unix.Fchmod(int(fd), 0o600) }), failed)
	}}
	l, err := config.Listen(context.Background(), "unix", s.Path)
	if err != nil {
		return nil, fmt.Errorf("making the socket %s: %w", s.Path, err)
	}
	if err := grantSocket(s.Path, s.Access); err != nil {
		return nil, errors.Join(fmt.Errorf("giving the socket %s its mode and group: %w", s.Path, err), l.Close())
	}
	made, err := os.Lstat(s.Path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("looking at the socket %s: %w", s.Path, err), l.Close())
	}
	warnOfBlocked(log, s.Access, dir, "the socket")
	log.Info("serving SDS and the SPIFFE Workload API", "socket", s.Path, "mode", fmt.Sprintf("%#o", s.Access.Mode.Perm()))
	return &listener{Listener: l, path: s.Path, made: made, log: log, limit: s.MaxConnections}, nil
}

// warnOfBlocked says that those who may use what is in dir do not get there.
func warnOfBlocked(log *slog.Logger, access atomicfile.Access, dir, what string) {
	if blocked := access.Blocked(dir); blocked != "" {
		log.Warn(fmt.Sprintf("not all who may use %s may enter a folder on the way to it: let them pass, such as with 'chmod o+x %s'", what, blocked), "folder", dir)
	}
}

// grantSocket gives a socket its mode and group. The folder may be somebody else's, who may have put a link in its place: none leads out of the folder.
func grantSocket(path string, access atomicfile.Access) error {
	folder, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer folder.Close()
	if access.Group >= 0 {
		if err := folder.Lchown(filepath.Base(path), -1, access.Group); err != nil {
			return err
		}
	}
	return folder.Chmod(filepath.Base(path), access.Mode)
}

// makeSocketFolder makes the folder of a socket, unless it is there: then it is as somebody has made it.
func makeSocketFolder(dir string, access atomicfile.Access) error {
	_, err := os.Stat(dir)
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("looking at the folder %s of a socket: %w", dir, err)
	}
	if err := atomicfile.MakeFolderToPass(dir); err != nil {
		return err
	}
	if err := grantFolder(dir, access); err != nil {
		return fmt.Errorf("giving the folder %s of a socket its mode and group: %w", dir, err)
	}
	return nil
}

// grantFolder lets those enter a folder that was just made who may use its socket.
func grantFolder(dir string, access atomicfile.Access) error {
	folder, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0) // and no link that was put in its place
	if err != nil {
		return err
	}
	defer folder.Close()
	mode := fs.FileMode(0o700)
	if access.Mode&0o060 != 0 {
		mode |= 0o050
	}
	if access.Mode&0o006 != 0 {
		mode |= 0o005
	}
	if access.Group >= 0 {
		if err := folder.Chown(-1, access.Group); err != nil {
			return err
		}
	}
	return folder.Chmod(mode)
}

// removeStale removes a socket at which nobody listens.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking at the socket %s: %w", path, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is there, and is no socket: remove it, or name another path", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = conn.Close() // that it could be made says all
	}
	if !errors.Is(err, syscall.ECONNREFUSED) { // a queue that is full (EAGAIN) is somebody's, too
		return fmt.Errorf("the socket %s is served by another process: stop that, or name another path", path)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("removing the socket %s that an agent left: %w", path, err)
	}
	return nil
}

// listener counts the connections of a socket, and says whose they are.
type listener struct {
	net.Listener
	path  string
	made  fs.FileInfo // what was at path then
	log   *slog.Logger
	limit int
	open  atomic.Int64

	lines   sparing.Lines
	refused atomic.Uint64
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				l.log.Error("connections wait, since they cannot be taken", "socket", l.path, "error", err)
			}
			return nil, err
		}
		who, err := peercred.Of(conn)
		switch {
		case err != nil:
			l.say(slog.LevelWarn, "a connection is refused, since the kernel does not say whose it is", who, "error", err)
		case l.open.Add(1) > int64(l.limit):
			l.open.Add(-1)
			l.refused.Add(1)
			l.say(slog.LevelWarn, "a connection is refused, since there are as many as there may be", who, "limit", l.limit)
		default:
			l.say(slog.LevelInfo, "a workload has connected", who)
			return &connection{Conn: conn, peer: who, of: l}, nil
		}
		_ = conn.Close() // the client sees its connection end
	}
}

// say logs what whoever may connect can cause as often as he likes.
func (l *listener) say(level slog.Level, text string, who peercred.Peer, attributes ...any) {
	passedOver, tell := l.lines.Tell(time.Now())
	if !tell {
		return
	}
	attributes = append(attributes, "socket", l.path, "peer", who.String(), "gid", who.GID)
	if passedOver > 0 {
		attributes = append(attributes, "passed_over", passedOver)
	}
	l.log.Log(context.Background(), level, text, attributes...)
}

type connection struct {
	net.Conn
	peer   peercred.Peer
	of     *listener
	closed sync.Once
}

func (c *connection) Close() error {
	c.closed.Do(func() { c.of.open.Add(-1) })
	return c.Conn.Close()
}

// localCredentials are those of a unix socket: whoever may open it is trusted, and the kernel says who that is.
type localCredentials struct{}

type localInfo struct{ peer peercred.Peer }

func (localInfo) AuthType() string { return "peercred" }

func (localCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := conn.(*connection)
	if !ok {
		return nil, nil, errors.New("the connection is of another listener")
	}
	return conn, localInfo{c.peer}, nil
}

func (localCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these are credentials of a server")
}
func (localCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (localCredentials) Clone() credentials.TransportCredentials { return localCredentials{} }
func (localCredentials) OverrideServerName(string) error         { return nil }

// peerOf is who opened the connection of a call.
func peerOf(ctx context.Context) peercred.Peer {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(localInfo); ok {
			return info.peer
		}
	}
	return peercred.Peer{}
}
