package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca"
	"kedge/ca/backup"
	"kedge/ca/ledger"
	"kedge/issuer/authn"
	"kedge/issuer/peercred"
)

const maxBody = 16 << 10 // octets of a request

// Server answers admins.
type Server struct {
	CA      *ca.CA
	Join    *authn.JoinTokens // nil: join tokens are off
	Level   *slog.LevelVar
	Log     *slog.Logger
	Status  func() Status // of the whole process
	Version string        // of this program, for backups
}

// peerKey is where a connection's peer credentials stand in the context of its requests.
type peerKey struct{}

// CheckPath says whether a socket can have this path.
func CheckPath(path string) error {
	const longest = 107 // octets: sockaddr_un of Linux, unix(7)
	if len(path) > longest {
		return fmt.Errorf("the admin socket's path %s has %d octets, and a unix socket's has at most %d: choose a shorter dataDir", path, len(path), longest)
	}
	return nil
}

// Listen makes the socket: mode 0600, in a folder that is already 0700. A socket that a killed process left behind is replaced; the
// data folder's lock is held by then, so nobody else's is.
func Listen(path string) (net.Listener, error) {
	if err := CheckPath(path); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing the admin socket of an earlier run: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("making the admin socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("protecting the admin socket: %w", err), l.Close())
	}
	return l, nil
}

// HTTP makes the HTTP server of the socket.
func (s *Server) HTTP() *http.Server {
	mux := http.NewServeMux()
	handle := func(pattern string, answer func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			body, err := answer(r)
			if err != nil {
				reply(w, statusOf(err), Failure{Error: err.Error()})
				return
			}
			reply(w, http.StatusOK, body)
		})
	}
	handle("GET /v1/status", func(*http.Request) (any, error) { return s.Status(), nil })
	handle("GET /v1/authorities", func(*http.Request) (any, error) { return s.CA.Authorities() })
	handle("GET /v1/bundle", func(*http.Request) (any, error) { return s.bundle() })
	handle("GET /v1/ledger/count", s.count)
	handle("GET /v1/ledger/verify", func(r *http.Request) (any, error) { return s.CA.Ledger().Verify(r.Context()) })
	mux.HandleFunc("GET /v1/ledger/events", s.events)
	mux.HandleFunc("POST /v1/backup", s.backup)
	handle("POST /v1/tokens", s.createToken)
	handle("POST /v1/revocations", s.revoke)
	handle("POST /v1/clock/confirm", s.confirmClock)
	handle("POST /v1/authorities/taint", s.taint)
	handle("PUT /v1/log-level", s.setLevel)
	return &http.Server{
		Handler: s.onlyOwner(mux), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			peer, err := peercred.Of(conn)
			if err != nil {
				s.Log.Error("reading an admin's peer credentials", "error", err)
				return ctx
			}
			return context.WithValue(ctx, peerKey{}, peer)
		},
	}
}

// onlyOwner lets in this process's own user and root, whatever the mode of the socket has become.
func (s *Server) onlyOwner(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		peer, ok := r.Context().Value(peerKey{}).(peercred.Peer)
		if !ok || (peer.UID != 0 && int(peer.UID) != os.Geteuid()) {
			s.Log.Warn("an admin call was refused", "peer", peer.String(), "path", r.URL.Path)
			reply(w, http.StatusForbidden, Failure{Error: "only the CA's own user and root may do this"})
			return
		}
		level := slog.LevelDebug
		if r.Method != http.MethodGet {
			level = slog.LevelInfo
		}
		s.Log.Log(r.Context(), level, "admin call", "method", r.Method, "path", r.URL.Path, "peer", peer.String())
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		next.ServeHTTP(w, r)
	})
}

func peerName(r *http.Request) string {
	peer, _ := r.Context().Value(peerKey{}).(peercred.Peer) // onlyOwner let nobody in without
	return peer.String()
}

func reply(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the admin went away; nothing to be done
}

func statusOf(err error) int {
	switch {
	case errors.Is(err, ca.ErrInvalid):
		return http.StatusBadRequest
	case errors.Is(err, ca.ErrDenied):
		return http.StatusForbidden
	case errors.Is(err, ledger.ErrNotFound):
		return http.StatusNotFound
	case errors.Is(err, ledger.ErrAlready):
		return http.StatusConflict
	case errors.Is(err, ledger.ErrPruned):
		return http.StatusGone
	case errors.Is(err, ledger.ErrUnavailable), errors.Is(err, ca.ErrUnavailable):
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// read decodes a request's body strictly.
func read(r *http.Request, into any) error {
	decoder := json.NewDecoder(r.Body)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return ca.Invalid(fmt.Errorf("reading the request: %w", err))
	}
	return nil
}

func (s *Server) bundle() (*Bundle, error) {
	b := s.CA.Bundle()
	document, err := b.SPIFFE(s.CA.TrustDomain())
	if err != nil {
		return nil, fmt.Errorf("rendering the bundle document: %w", err)
	}
	answer := &Bundle{TrustDomain: s.CA.TrustDomain().Name(), Sequence: b.Sequence, Incarnation: b.Incarnation(), SHA256: b.SHA256, Floor: s.CA.Floor(),
		Since: b.Record().Time.Time(), PEM: b.PEM, SPIFFE: string(document)}
	for _, root := range b.Roots {
		answer.Roots = append(answer.Roots, ca.AuthorityID(root))
	}
	return answer, nil
}

// events streams the ledger as JSON lines. When reading fails half-way the last line is a Failure.
func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	filter, err := parseFilter(r.URL.Query())
	if err != nil {
		reply(w, statusOf(err), Failure{Error: err.Error()})
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	encoder := json.NewEncoder(w)
	for event, err := range s.find(r.Context(), filter) {
		if err != nil {
			_ = encoder.Encode(Failure{Error: err.Error()}) // the client notices a missing end as well
			return
		}
		if encoder.Encode(event) != nil {
			return // the admin has seen enough
		}
	}
	_ = encoder.Encode(struct {
		End bool `json:"end"`
	}{true})
}

func (s *Server) find(ctx context.Context, f ledger.Filter) iter.Seq2[ledger.Event, error] {
	return s.CA.Ledger().Events(ctx, f)
}

func (s *Server) count(r *http.Request) (any, error) {
	filter, err := parseFilter(r.URL.Query())
	if err != nil {
		return nil, err
	}
	n, err := s.CA.Ledger().Count(r.Context(), filter)
	return map[string]uint64{"count": n}, err
}

// parseFilter reads a filter from the query that Filter.query wrote.
func parseFilter(q url.Values) (f ledger.Filter, err error) {
	fail := func(name string, err error) error { return ca.Invalid(fmt.Errorf("%s %q: %w", name, q.Get(name), err)) }
	for name := range q {
		if !strings.Contains(" from to type spiffe_id serial authority since until newest limit ", " "+name+" ") {
			return f, ca.Invalid(fmt.Errorf("there is no filter %q", name))
		}
	}
	number := func(name string, into *uint64) {
		if q.Has(name) && err == nil {
			if *into, err = strconv.ParseUint(q.Get(name), 10, 64); err != nil {
				err = fail(name, errors.New("not a number"))
			}
		}
	}
	text := func(name string, into interface{ UnmarshalText([]byte) error }) {
		if q.Has(name) && err == nil {
			if bad := into.UnmarshalText([]byte(q.Get(name))); bad != nil {
				err = fail(name, bad)
			}
		}
	}
	var limit uint64
	number("from", &f.From)
	number("to", &f.To)
	number("limit", &limit)
	text("serial", &f.Serial)
	text("authority", &f.Authority)
	text("since", &f.Since)
	text("until", &f.Until)
	f.Limit, f.SPIFFEID, f.Newest = int(min(limit, 1<<31-1)), q.Get("spiffe_id"), q.Get("newest") == "true"
	for _, name := range q["type"] {
		var t ledger.Type
		if bad := t.UnmarshalText([]byte(name)); bad != nil && err == nil {
			err = ca.Invalid(bad)
		}
		f.Types = append(f.Types, t)
	}
	return f, err
}

// backup makes a backup and streams it. One that breaks off is not whole, which its reader sees.
func (s *Server) backup(w http.ResponseWriter, r *http.Request) {
	b, err := backup.Take(r.Context(), s.CA, s.Version)
	if err != nil {
		s.Log.Error("a backup was not made", "by", peerName(r), "error", err)
		reply(w, statusOf(err), Failure{Error: err.Error()})
		return
	}
	defer b.Close() // nothing is lost when it fails: the copy has no name
	m := b.Manifest
	s.Log.Info("a backup is made", "by", peerName(r), "number", m.Ledger.Number, "octets", m.Files[0].Size, "clear_keys", m.ClearKeys())
	w.Header().Set("Content-Type", "application/x-tar")
	if err := b.Write(w); err != nil {
		s.Log.Error("a backup broke off", "by", peerName(r), "error", err)
		panic(http.ErrAbortHandler) // so that the connection breaks, too
	}
}

func (s *Server) createToken(r *http.Request) (any, error) {
	if s.Join == nil {
		return nil, ca.Denied(errors.New("join tokens are switched off: list identities under callers.joinTokens in the configuration"))
	}
	var request TokenRequest
	if err := read(r, &request); err != nil {
		return nil, err
	}
	id, err := s.parseIdentity(request.Identity)
	if err != nil {
		return nil, ca.Invalid(err)
	}
	token, record, err := s.Join.Create(id, time.Duration(request.TTL)*time.Second, request.Reusable)
	if err != nil {
		return nil, err
	}
	record.By = peerName(r)
	number, err := s.CA.Ledger().Append(r.Context(), &record)
	if err != nil {
		return nil, fmt.Errorf("recording the join token: %w", err)
	}
	s.Log.Info("join token created", "id", record.ID, "spiffe_id", record.SPIFFEID, "expires", record.Expires, "reusable", record.Reusable, "by", record.By, "number", number)
	return TokenResponse{Token: token, ID: record.ID, SPIFFEID: record.SPIFFEID, Expires: record.Expires, Reusable: record.Reusable, Number: number}, nil
}

// parseIdentity takes a whole SPIFFE ID, or its path with or without the leading slash.
func (s *Server) parseIdentity(text string) (spiffeid.ID, error) {
	if strings.HasPrefix(text, "spiffe://") {
		id, err := spiffeid.FromString(text)
		if err != nil {
			return id, fmt.Errorf("the identity %q is not a SPIFFE ID: %w", text, err)
		}
		return id, nil
	}
	id, err := spiffeid.FromPath(s.CA.TrustDomain(), "/"+strings.TrimPrefix(text, "/"))
	if err != nil {
		return id, fmt.Errorf("the identity %q is not the path of a SPIFFE ID such as ns/default/sa/web: %w", text, err)
	}
	return id, nil
}

func (s *Server) revoke(r *http.Request) (any, error) {
	var request RevokeRequest
	if err := read(r, &request); err != nil {
		return nil, err
	}
	serial, err := ledger.ParseSerial(request.Serial)
	if err != nil {
		return nil, ca.Invalid(err)
	}
	revoke := s.CA.Revoke
	if request.Lineage {
		revoke = s.CA.RevokeLineage
	}
	answer, err := revoke(r.Context(), serial, request.Reason, peerName(r))
	for _, revoked := range answer.Revoked { // also before an error
		s.Log.Warn("certificate revoked", "serial", revoked.Serial, "number", revoked.Number, "reason", request.Reason, "by", revoked.By)
	}
	return answer, err
}

func (s *Server) confirmClock(r *http.Request) (any, error) {
	number, waiver, err := s.CA.ConfirmClock(r.Context(), peerName(r))
	if err != nil {
		return nil, err
	}
	s.Log.Warn("an admin confirmed this machine's clock", "by", waiver.By, "borne_out_before", waiver.From, "now", waiver.To, "number", number)
	return Recorded{Number: number}, nil
}

func (s *Server) taint(r *http.Request) (any, error) {
	var request TaintRequest
	if err := read(r, &request); err != nil {
		return nil, err
	}
	if request.Reason == "" {
		return nil, ca.Invalid(errors.New("a taint needs a reason, for the ledger"))
	}
	if err := s.CA.Taint(r.Context(), request.ID, request.Reason, peerName(r)); err != nil {
		return nil, err
	}
	all, err := s.CA.Authorities()
	if err != nil {
		return nil, fmt.Errorf("the authority %s is tainted; how things stand now is not known: %w", request.ID, err)
	}
	answer := Tainted{ID: request.ID}
	for _, a := range all {
		if a.ID == request.ID {
			answer.Live, answer.LastExpiry = a.LiveSVIDs, a.LastExpiry
		}
	}
	if signing, ok := s.CA.Active(); ok {
		answer.Signing = &signing
	}
	return answer, nil
}

func (s *Server) setLevel(r *http.Request) (any, error) {
	var request struct {
		Level string `json:"level"`
	}
	if err := read(r, &request); err != nil {
		return nil, err
	}
	var level slog.Level // its own text form has more, such as "info+2"
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, request.Level) || level.UnmarshalText([]byte(request.Level)) != nil {
		return nil, ca.Invalid(fmt.Errorf("the log level %q is none of debug, info, warn, error", request.Level))
	}
	before := s.Level.Level()
	s.Level.Set(level)
	s.Log.Log(r.Context(), max(level, slog.LevelInfo), "log level changed", "from", before, "to", level, "by", peerName(r))
	return map[string]string{"level": level.String()}, nil
}
