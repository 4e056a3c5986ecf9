package agent

import (
	"context"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/issuer/peercred"
	"kedge/issuer/sds"
	"kedge/issuer/workload"
)

// source is what one stream of a workload gets: the same as every other of the same identity.
type source struct {
	i    *identity
	peer peercred.Peer

	mu       sync.Mutex
	consumer *consumer // nil: the stream wants no trust bundle
	holder   *consumer // nil: the stream wants no SVID
	closed   bool
}

// Open implements sds.Opener: whoever may connect to the socket is the workload.
func (i *identity) Open(ctx context.Context) (sds.Source, error) { return i.open(ctx), nil }

// OpenWorkload implements workload.Opener.
func (i *identity) OpenWorkload(ctx context.Context) (workload.Source, error) {
	return i.open(ctx), nil
}

func (i *identity) open(ctx context.Context) *source {
	return &source{i: i, peer: peerOf(ctx)}
}

// String names the stream in logs.
func (s *source) String() string { return s.i.w.Name + ", " + s.peer.String() }

func (s *source) Materials() (*sds.Materials, <-chan struct{}) { return s.i.materials() }

func (s *source) Want(wants sds.Wants) {
	m, _ := s.i.materials()
	own := wants.Own || wants.Bundle && m.ID.IsZero() // which trust domain is the own one is not known yet
	s.mu.Lock()
	defer s.mu.Unlock()
	if own && s.consumer == nil && !s.closed {
		s.consumer = s.i.consumers.enter()
	}
	if wants.SVID && s.holder == nil && !s.closed {
		s.holder = s.i.holders.enter()
	}
}

// Answered notes which trust bundle the client has, and which SVID. One that it refuses is not held, so that the CA hears nothing of it.
func (s *source) Answered(a sds.Answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.Reason == "" && a.Bundle != nil && s.consumer != nil {
		s.consumer.holds(s.i.orderOf(a.Bundle))
	}
	if a.Reason == "" && a.SVID != nil && s.holder != nil {
		s.holder.holds(s.i.orderOfSVID(a.SVID))
	}
}

// Ended is never closed: a stream ends with its connection, or with the agent.
func (s *source) Ended() <-chan struct{} { return nil }

// Err is not asked for.
func (s *source) Err() error { return nil }

func (s *source) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.consumer != nil {
		s.consumer.leave()
	}
	if s.holder != nil {
		s.holder.leave()
	}
}

// Missing implements workload.Source. The reason is for the agent's log.
func (s *source) Missing() error {
	s.i.mu.Lock()
	defer s.i.mu.Unlock()
	if s.i.denied && s.i.svid == nil {
		return status.Error(codes.PermissionDenied, "the CA issues no SVID for this workload; the agent's log says why")
	}
	return status.Error(codes.Unavailable, "there is no SVID now; the agent's log says why, and goes on trying")
}
