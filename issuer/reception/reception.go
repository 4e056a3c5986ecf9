// Package reception is what every gRPC door of the CA does with a caller before it does anything for it: the caller waits for its turn at the gate, it is found
// out who that is, and what is refused is told to the caller in few words, and to the log in all.
package reception

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"kedge/ca"
	"kedge/ca/ledger"
	"kedge/issuer/authn"
	"kedge/issuer/gate"
	"kedge/issuer/metrics"
)

// RequestIDHeader carries the request id back, in the header of every answer.
const RequestIDHeader = "x-request-id"

// Desk is where callers are received. Its methods may be called at once from several goroutines.
type Desk struct {
	Callers *authn.Authenticator
	Metrics *metrics.Metrics
	Log     *slog.Logger
	Gate    *gate.Gate    // at which callers take turns
	Waiting time.Duration // how long a call may wait for its turn, which costs next to nothing
}

// Admit waits for the turn of the call with that request id, and says what it brought to prove who is asking. The place is the call's to leave.
func (d *Desk) Admit(ctx context.Context, id string) (authn.Credentials, *gate.Place, error) {
	credentials, address := callerOf(ctx)
	credentials.RequestID = id
	place, err := d.Enter(ctx, address)
	credentials.Aside = func() (back func(context.Context) error) {
		place.Leave()
		return place.Again
	}
	return credentials, place, err
}

// Enter waits for a turn.
func (d *Desk) Enter(ctx context.Context, address net.Addr) (place *gate.Place, err error) {
	waiting, cancel := context.WithTimeout(ctx, d.Waiting)
	defer cancel()
	began := time.Now()
	place, err = d.Gate.Enter(waiting, address)
	d.Metrics.Waited(time.Since(began))
	if err != nil && ctx.Err() == nil {
		err = ca.Unavailable(err)
	}
	return place, err
}

// maxClusterID bounds the caller's own word that goes into the ledger.
const maxClusterID = 128

// callerOf takes from a call what may prove who is asking, and its address.
func callerOf(ctx context.Context) (c authn.Credentials, address net.Addr) {
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		c.Tokens = md.Get("authorization")
		if ids := md.Get("clusterid"); len(ids) > 0 {
			c.ClusterID = ids[0][:min(len(ids[0]), maxClusterID)]
		}
	}
	if p, ok := peer.FromContext(ctx); ok {
		address, c.Peer = p.Addr, p.Addr.String()
		if info, ok := p.AuthInfo.(gate.Info); ok {
			c.Certificates = info.State.PeerCertificates
		}
	}
	return c, address
}

// Refuse turns an error into what the caller gets to see. Only a wrong request is explained: for everything else the request id leads an admin to the log.
func Refuse(id string, err error) (result string, answer error) {
	switch {
	case errors.Is(err, ca.ErrCSR):
		return metrics.ResultBadCSR, status.Errorf(codes.InvalidArgument, "%s (request id %s)", err, id)
	case errors.Is(err, ca.ErrInvalid):
		return metrics.ResultInvalid, status.Errorf(codes.InvalidArgument, "%s (request id %s)", err, id)
	case errors.Is(err, ca.ErrUnauthenticated):
		return metrics.ResultUnauthenticated, status.Errorf(codes.Unauthenticated, "not authenticated; the CA's log says why (request id %s)", id)
	case errors.Is(err, ca.ErrDenied):
		return metrics.ResultDenied, status.Errorf(codes.PermissionDenied, "permission denied; the CA's log says why (request id %s)", id)
	case errors.Is(err, context.Canceled):
		return metrics.ResultCanceled, status.Errorf(codes.Canceled, "the caller went away (request id %s)", id)
	case errors.Is(err, ca.ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
		// Istio's retry interceptor never repeats DeadlineExceeded, whatever its list says; Unavailable it does.
		return metrics.ResultUnavailable, status.Errorf(codes.Unavailable, "temporarily unavailable, try again; the CA's log says why (request id %s)", id)
	}
	return metrics.ResultInternal, status.Errorf(codes.Internal, "internal error; the CA's log says which (request id %s)", id)
}

// LogRefusal logs why a caller was refused. what says what it wanted.
func (d *Desk) LogRefusal(ctx context.Context, what, id, result string, caller ca.Caller, err error) {
	level := slog.LevelWarn
	switch result {
	case metrics.ResultInternal, metrics.ResultUnavailable:
		level = slog.LevelError
	case metrics.ResultCanceled:
		level = slog.LevelInfo
	}
	if errors.Is(err, ledger.ErrSuperseded) { // a join token is in two hands
		level = slog.LevelError
	}
	attrs := []slog.Attr{slog.String("request_id", id), slog.String("result", result), slog.String("reason", err.Error()), slog.String("peer", caller.Peer)}
	if !caller.ID.IsZero() {
		attrs = append(attrs, slog.String("spiffe_id", caller.ID.String()))
	}
	d.Log.LogAttrs(ctx, level, what, attrs...)
}

// NewRequestID makes an id by which a caller's refusal is found in the log.
func NewRequestID() string {
	var octets [8]byte
	rand.Read(octets[:]) // never fails since Go 1.24
	return hex.EncodeToString(octets[:])
}
