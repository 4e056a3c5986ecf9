package sds

import (
	"context"
	"slices"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// FetchSecrets answers once with what the names stand for, and waits a while for what is still being made; what is not there then is left out. It proves nothing of what the client holds.
func (s *Server) FetchSecrets(ctx context.Context, message *discovery.DiscoveryRequest) (response *discovery.DiscoveryResponse, err error) {
	defer s.guard(&err)
	r, err := readState(message)
	if err != nil {
		return nil, s.end(ctx, nil, err)
	}
	source, err := s.opener.Open(ctx)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	st := &stream{server: s, source: source, ctx: ctx}
	if err := st.take(request{names: r.names}); err != nil {
		return nil, s.end(ctx, source, err)
	}
	limit := time.After(fetchWait)
	for {
		materials, changed := source.Materials()
		due := st.due(materials)
		missing := slices.ContainsFunc(st.subs, func(one *sub) bool {
			return (asksForSVID(one.name, materials) && materials.SVID == nil) || (asksForBundle(one.name) && len(materials.Bundles) == 0)
		})
		if !missing {
			return st.fetched(materials, due)
		}
		select {
		case <-changed:
		case <-source.Ended():
			return nil, source.Err()
		case <-s.ending:
			return nil, errStopping
		case <-limit:
			if len(due) > 0 {
				return st.fetched(materials, due)
			}
			return nil, status.Errorf(codes.Unavailable, "nothing of what is asked for is there, after %s: try again", fetchWait)
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}

func (st *stream) fetched(materials *Materials, due []item) (*discovery.DiscoveryResponse, error) {
	st.open = &response{items: due}
	all := &discovery.DiscoveryResponse{TypeUrl: secretType, VersionInfo: st.version(materials).String()}
	for _, one := range due {
		part, err := one.render(false)
		if err == nil {
			err = proto.UnmarshalOptions{Merge: true}.Unmarshal(part, all)
		}
		if err != nil {
			st.server.log.ErrorContext(st.ctx, "a secret cannot be sent", "name", one.sub.name, "error", err)
			return nil, status.Error(codes.Internal, "internal error; the server's log says which")
		}
		st.server.metrics.SDSPushed(Resource(one.sub.name))
	}
	return all, nil
}
