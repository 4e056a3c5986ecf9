package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/ca/pemfile"
	"kedge/issuer/istio"
	"kedge/issuer/sds"
)

const (
	// holdBack is how long a trust bundle that came from the CA is not answered while consumers do not have it yet. Then the stream is opened anew, since the CA gives up
	// a client that does not answer, after a minute by default, and sends nothing newer until it does.
	holdBack = 30 * time.Second
	// maxRoots is how many certificates a trust bundle may have.
	maxRoots = 256
)

// acknowledged is the trust bundle that the CA knows all consumers to have.
type acknowledged struct {
	version string // as the CA calls it
	order   uint64
}

// errReplaced: the stream's SVID has a successor, with which it is opened anew; errHeldBack: see holdBack.
var errReplaced, errHeldBack = errors.New("the SVID was replaced"), errors.New("consumers do not have the trust bundle yet")

// report keeps a stream to the CA's SDS for as long as there is an SVID to open it with. That it is opened with an SVID shows the CA that the SVID has arrived, so that the one before
// it counts no more: it is opened with the new one once every consumer has that. New trust bundles come by it; and one is acknowledged on it once every consumer has it. A CA without SDS is asked again with the next SVID: until then bundles come with the SVIDs alone.
func (i *identity) report(ctx context.Context) {
	var wait backoff
	var has acknowledged
	var client *istio.Client // nil: there is no connection
	hangUp := func() {
		if client != nil {
			_ = client.Close() // whatever was on it has ended
			client = nil
		}
	}
	defer hangUp()
	var svid *sds.SVID // of the latest stream
	for ctx.Err() == nil {
		var again <-chan time.Time
		if svid, _, _, _ = i.presentable(svid); svid != nil {
			var lasted bool
			var err error
			if client == nil {
				client, err = i.connect(svid)
			}
			if err == nil {
				lasted, err = i.stream(ctx, client, svid, &has, holdBack*3/4+rand.N(holdBack/4))
			}
			if lasted {
				wait.reset()
			}
			if !errors.Is(err, errHeldBack) { // the next connection is made with the roots and the SVID of then
				hangUp()
			}
			switch {
			case ctx.Err() != nil:
				return
			case errors.Is(err, errReplaced), errors.Is(err, errHeldBack):
				continue
			case status.Code(err) == codes.Unimplemented:
				if i.note("stream to the CA", nil); !i.alone.Swap(true) {
					i.log.Info("the CA has no SDS: new trust bundles come with new SVIDs, and the CA is not told which of them workloads have", "server", i.o.Server)
				}
			default:
				pause := wait.failed(firstRetry, longestRetry)
				again = time.After(pause)
				if !lasted { // else it is the way of streams to end, when the CA restarts or the connection is old
					i.note("stream to the CA", fmt.Errorf("new trust bundles come with new SVIDs only, and the CA is not told which of them workloads have: %w", err))
					i.log.Warn("there is no stream to the CA for trust bundles", "error", err, "server", i.o.Server, "again_in", pause.Round(time.Millisecond).String())
				}
			}
		}
		i.awaitOther(ctx, svid, again)
	}
}

// presentable is the SVID to open the next stream with, when the latest was opened with the SVID before, or none was; nil: there is none. It may be another when one of
// the channels is closed, or after again, unless that is 0.
func (i *identity) presentable(before *sds.SVID) (svid *sds.SVID, changed, moved <-chan struct{}, again time.Duration) {
	now, changed := i.materials()
	if now.SVID == nil || now.SVID == before {
		return now.SVID, changed, nil, 0
	}
	i.mu.Lock()
	first := before == nil && (i.recalled != now.SVID || i.svid.arrived) // none before it counts no more
	i.mu.Unlock()
	wall := i.wall()
	if first || before != nil && !wall.Before(before.NotAfter) {
		return now.SVID, changed, nil, 0
	}
	order := i.orderOfSVID(now.SVID)
	oldest, moved, again := i.holders.oldest(order)
	if order > 0 && oldest >= order {
		return now.SVID, changed, nil, 0
	}
	if before != nil {
		if left := before.NotAfter.Sub(wall); again == 0 || left < again {
			again = left
		}
	}
	return before, changed, moved, again
}

// awaitOther waits until a stream would be opened with another SVID, or none, which it says, or until something else happens.
func (i *identity) awaitOther(ctx context.Context, svid *sds.SVID, or <-chan time.Time) bool {
	for {
		next, changed, moved, again := i.presentable(svid)
		if next != svid {
			return true
		}
		var later <-chan time.Time
		if again > 0 {
			later = time.After(again)
		}
		select {
		case <-changed:
		case <-moved:
		case <-later:
		case <-or:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// hasArrived notes that the CA knows of an SVID.
func (i *identity) hasArrived(svid *sds.SVID) {
	i.mu.Lock()
	news := i.svid.handed == svid && !i.svid.arrived
	if news {
		i.svid.arrived = true
	}
	i.mu.Unlock()
	if news {
		i.remember()
	}
}

// connect prepares a connection to the CA that is made with the SVID.
func (i *identity) connect(svid *sds.SVID) (*istio.Client, error) {
	roots, err := i.serverRoots()
	if err != nil {
		return nil, err
	}
	return istio.Dial(i.o.Server, roots, certificateOf(svid))
}

// lasting is how long a stream has been there that the CA takes: it may have nothing to say, or take its time to refuse.
const lasting = 10 * time.Second

// stream is one stream, until it ends. lasted says whether it was there for long: the next one need not be put off.
func (i *identity) stream(ctx context.Context, client *istio.Client, svid *sds.SVID, has *acknowledged, holdBack time.Duration) (lasted bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		if i.awaitOther(ctx, svid, nil) {
			cancel(errReplaced)
		}
	}()
	failed := func(err error) error {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return client.Reason(err)
	}
	stream, err := secret.NewSecretDiscoveryServiceClient(client.Conn()).DeltaSecrets(ctx)
	if err != nil {
		return false, failed(err)
	}
	first := &discovery.DeltaDiscoveryRequest{TypeUrl: sds.SecretType, ResourceNamesSubscribe: []string{sds.NameBundle}}
	if oldest, _, _ := i.consumers.oldest(has.order); has.order > 0 && oldest >= has.order {
		first.InitialResourceVersions = map[string]string{sds.NameBundle: has.version}
	}
	if err := stream.Send(first); err != nil {
		_, err = stream.Recv() // it says why
		return false, failed(err)
	}
	responses, ended := make(chan *discovery.DeltaDiscoveryResponse), make(chan error, 1)
	go func() {
		for {
			response, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case responses <- response:
			case <-ctx.Done():
				return
			}
		}
	}()
	var open *discovery.DeltaDiscoveryResponse // not answered yet
	var brought acknowledged                   // what it brought
	var since time.Time
	lasts := time.NewTimer(lasting)
	defer lasts.Stop()
	for {
		var moved <-chan struct{}
		var again <-chan time.Time
		if open != nil {
			var oldest uint64
			var left time.Duration
			oldest, moved, left = i.consumers.oldest(brought.order)
			if oldest >= brought.order {
				if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: sds.SecretType, ResponseNonce: open.Nonce}); err == nil { // else Recv says why
					*has = brought
					i.acknowledged(brought)
				}
				open = nil
				continue
			}
			back := holdBack - time.Since(since)
			if left > 0 {
				back = min(back, left)
			}
			again = time.After(max(back, time.Millisecond))
		}
		select {
		case response := <-responses:
			i.note("stream to the CA", nil)
			i.hasArrived(svid)
			news, err := i.hear(response)
			if err != nil {
				i.log.Error("a trust bundle from the CA is not taken", "error", err)
				refusal := status.New(codes.InvalidArgument, err.Error()).Proto()
				if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: sds.SecretType, ResponseNonce: response.Nonce, ErrorDetail: refusal}); err != nil {
					continue // Recv says why
				}
				continue
			}
			open, brought, since = response, news, time.Now()
		case <-lasts.C:
			lasted = true
			i.note("stream to the CA", nil)
			i.hasArrived(svid)
		case <-moved:
		case <-again:
			if time.Since(since) >= holdBack {
				return true, errHeldBack
			}
		case err := <-ended:
			return lasted, failed(err)
		case <-ctx.Done():
			return lasted, failed(ctx.Err())
		}
	}
}

// hear takes the trust bundle of a response. The connection was verified, so that it is the CA's.
func (i *identity) hear(response *discovery.DeltaDiscoveryResponse) (acknowledged, error) {
	for _, resource := range response.Resources {
		if resource.GetName() != sds.NameBundle {
			continue
		}
		var message tls.Secret
		if err := resource.GetResource().UnmarshalTo(&message); err != nil {
			return acknowledged{}, fmt.Errorf("it is no secret: %w", err)
		}
		text := message.GetValidationContext().GetTrustedCa().GetInlineBytes()
		roots, err := pemfile.Certificates(text)
		if err != nil {
			return acknowledged{}, err
		}
		if len(roots) == 0 || len(roots) > maxRoots {
			return acknowledged{}, fmt.Errorf("it has %d certificates, where 1 to %d may be", len(roots), maxRoots)
		}
		i.mu.Lock()
		taken := i.takeLocked(i.svid.ID.TrustDomain(), roots, string(text), sds.NumberIn(resource.Version), time.Now())
		current := i.bundle
		if taken && !verifies(i.svid.SVID, roots) {
			i.log.Error("the SVID does not verify under the new trust bundle: another is asked for", "bundle", current.Sequence)
			i.svid.RenewAt = i.wall()
		}
		i.mu.Unlock()
		if taken {
			i.log.Info("the CA has a new trust bundle", "bundle", current.Sequence, "roots", len(roots))
			i.publish()
			i.remember()
		}
		return acknowledged{resource.Version, current.order}, nil
	}
	return acknowledged{}, errors.New("it has no trust bundle")
}

// acknowledged notes what the CA was told.
func (i *identity) acknowledged(has acknowledged) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for b, order := range i.known {
		if order == has.order {
			i.told = b.Sequence
			i.log.Info("every consumer has the trust bundle, which the CA is told", "bundle", b.Sequence)
		}
	}
}
