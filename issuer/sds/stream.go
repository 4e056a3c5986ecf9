package sds

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"strings"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// StreamSecrets serves a stream of the state-of-the-world protocol.
func (s *Server) StreamSecrets(wire secret.SecretDiscoveryService_StreamSecretsServer) error {
	return s.serve(wire, false)
}

// DeltaSecrets serves a stream of the incremental protocol.
func (s *Server) DeltaSecrets(wire secret.SecretDiscoveryService_DeltaSecretsServer) error {
	return s.serve(wire, true)
}

// stream is a client's subscription. It is one goroutine's.
type stream struct {
	server  *Server
	source  Source
	ctx     context.Context
	delta   bool
	begun   bool // the first request was looked at
	subs    []*sub
	wants   Wants
	floor   Number // of the own trust domain's bundle: nothing older is sent
	nonce   string // of the last response
	open    *response
	holding Holding // that was acknowledged last
}

// sub is a name that the client wants.
type sub struct {
	name    string
	held    string  // id of what the client has; "": nothing, as far as is known
	told    bool    // the source knows that it has it
	took    *Bundle // of the own trust domain, that it took on this stream, or has from an earlier one; nil: none
	refused string  // id of what it did not take
}

// response is one that the client has not answered.
type response struct {
	version string // state of the world
	items   []item
	slot    bool      // it takes part in the pacing
	sent    time.Time //
}

// item is a secret in a response.
type item struct {
	sub *sub
	resource
}

// serve answers a stream until it ends.
func (s *Server) serve(wire grpc.ServerStream, delta bool) (err error) {
	defer s.guard(&err)
	ctx := wire.Context()
	requests := make(chan received)
	go func() { // until the stream ends, which it does once this method returns
		for {
			r, err := receive(wire, delta)
			select {
			case requests <- received{r, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	var first received
	select {
	case first = <-requests:
	case <-s.ending:
		return errStopping
	case <-ctx.Done(): // the other goroutine may have seen that, too, and says nothing then
		return status.FromContextError(ctx.Err()).Err()
	}
	if errors.Is(first.err, errGone) {
		return status.Error(codes.Canceled, "the client ended the stream before it asked for anything") // for the gate, which counts what is in vain
	}
	if first.err == nil { // who it is costs something to find out, and is of no use for a request that is wrong
		return s.follow(wire, delta, first.request, requests)
	}
	return s.end(ctx, nil, first.err)
}

// received is a request, or why there is none.
type received struct {
	request
	err error
}

// follow serves a stream from its first request on.
func (s *Server) follow(wire grpc.ServerStream, delta bool, first request, requests <-chan received) error {
	ctx := wire.Context()
	source, err := s.open(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	kind := kindState
	if delta {
		kind = kindDelta
	}
	st := &stream{server: s, source: source, ctx: ctx, delta: delta}
	s.metrics.SDSStream(kind, 1)
	s.holds(nil, &st.holding)
	defer func() {
		st.release()
		s.holds(&st.holding, nil)
		s.metrics.SDSStream(kind, -1)
	}()
	pace := bucket{left: burst, filled: time.Now()}
	if err := st.take(first); err != nil {
		return s.end(ctx, source, err)
	}
	for {
		materials, changed := source.Materials()
		due := st.due(materials)
		send := s.slots
		if len(due) == 0 {
			send = nil
		} else if isNew(due) { // who asks takes no turn behind those who are told
			if err := st.send(wire, materials, due, false); err != nil {
				return s.end(ctx, source, err)
			}
			continue
		}
		in, rested := requests, pace.rest()
		if rested != nil {
			in = nil
		}
		select {
		case send <- struct{}{}:
			err = st.send(wire, materials, due, true)
		case r := <-in:
			pace.take()
			if err = r.err; err == nil {
				err = st.take(r.request)
			}
		case <-changed:
		case <-rested:
		case <-st.late():
			err = st.waited()
		case <-source.Ended():
			return source.Err()
		case <-s.ending:
			return errStopping
		case <-ctx.Done():
			return nil
		}
		if err != nil {
			return s.end(ctx, source, err)
		}
	}
}

// open asks the opener in a goroutine that ends: to find out who a caller is takes a deep stack, which this one would keep for as long as the stream lives.
func (s *Server) open(ctx context.Context) (source Source, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer s.guard(&err)
		source, err = s.opener.Open(ctx)
	}()
	<-done
	return source, err
}

// end is how a stream ends over what its client does.
func (s *Server) end(ctx context.Context, source Source, err error) error {
	if errors.Is(err, errGone) {
		return nil
	}
	s.tell(ctx, source, "an SDS stream is ended over what its client does", "reason", err.Error())
	return err
}

// take looks at what the client says.
func (st *stream) take(r request) error {
	first := !st.begun
	st.begun = true
	current := first || r.nonce == st.nonce // some clients begin with the nonce of an earlier stream
	if current && st.open != nil {
		st.answered(r)
	}
	materials, _ := st.source.Materials()
	holds := st.wants.Holds
	switch {
	case st.delta:
		st.remove(r.less)
		if err := st.add(r.more); err != nil {
			return err
		}
		if first {
			holds = st.recall(r.has)
		}
	case !current:
		return nil // it is about an older response, and the one after it will be answered, too
	default:
		st.set(r.names)
		if first {
			holds = st.resume(r, materials)
		}
	}
	st.want(materials, holds)
	return nil
}

// set replaces what the client wants. What it wants since before it is not sent again.
func (st *stream) set(names []string) {
	var subs []*sub
	for _, name := range names {
		if name == "" || find(subs, name) != nil {
			continue
		}
		one := find(st.subs, name)
		if one == nil {
			one = &sub{name: name}
		}
		subs = append(subs, one)
	}
	st.subs = subs
}

// add adds to what the client wants. What it asks for again it gets again.
func (st *stream) add(names []string) error {
	st.remove(names)
	for _, name := range names {
		if name != "" && find(st.subs, name) == nil {
			st.subs = append(st.subs, &sub{name: name})
		}
	}
	all := make([]string, len(st.subs))
	for i, one := range st.subs {
		all[i] = one.name
	}
	return checkNames(all)
}

func (st *stream) remove(names []string) {
	if len(names) > 0 {
		st.subs = slices.DeleteFunc(st.subs, func(one *sub) bool { return slices.Contains(names, one.name) })
	}
}

func find(subs []*sub, name string) *sub {
	if i := slices.IndexFunc(subs, func(one *sub) bool { return one.name == name }); i >= 0 {
		return subs[i]
	}
	return nil
}

// resume notes what the client has from an earlier stream, as it says by the version that it names. It returns the serial number of its SVID.
func (st *stream) resume(r request, materials *Materials) (holds string) {
	named, ok := parseVersion(r.version)
	if !ok {
		return ""
	}
	st.floor = named.own
	known := st.server.bundlesOf(materials)
	var names []string
	for _, one := range st.subs {
		if _, ok := known.byName[one.name]; ok || asksForSVID(one.name, materials) {
			names = append(names, one.name)
		}
	}
	if digest(sorted(names)...) != named.names {
		return "" // it asks for others now, and which of them it has is not known
	}
	for _, one := range st.subs {
		of := known.byName[one.name]
		switch {
		case asksForSVID(one.name, materials):
			one.held = "s-" + named.serial
			holds = named.serial
		case of.id != "" && (named.bundles == known.digest || of.id == "b-"+named.own.String()):
			one.held = of.id
		}
	}
	return holds
}

// recall is resume for the incremental protocol, in which each secret has a version.
func (st *stream) recall(has map[string]string) (holds string) {
	for _, one := range st.subs {
		id := has[one.name]
		if len(id) > maxVersion {
			continue
		}
		one.held = id
		if named := NumberIn(id); named.Incarnation != "" && (st.floor.Incarnation == "" || st.floor.below(named)) {
			st.floor = named
		}
		if serial, ok := strings.CutPrefix(id, "s-"); ok {
			holds = serial
		}
	}
	return holds
}

// want tells the source what is asked for, if that has grown.
func (st *stream) want(materials *Materials, holds string) {
	wants := st.wants
	wants.Holds = holds
	for _, one := range st.subs {
		wants.SVID = wants.SVID || asksForSVID(one.name, materials)
		wants.Bundle = wants.Bundle || asksForBundle(one.name)
		wants.Own = wants.Own || asksForOwn(one.name, materials.ID.TrustDomain())
	}
	if wants != st.wants {
		st.wants = wants
		st.source.Want(wants)
	}
}

// due is what the client is to be sent now. While it has not answered the last response that is nothing: there is one at a time.
func (st *stream) due(materials *Materials) (due []item) {
	if st.open != nil {
		return nil
	}
	var has []item
	for _, one := range st.subs {
		r := st.server.find(one.name, materials)
		switch {
		case r.id == "", r.id == one.refused:
		case r.id == one.held:
			if !one.told {
				has = append(has, item{one, r})
			}
		case r.bundle != nil && r.number.below(st.floor):
		default:
			due = append(due, item{one, r})
		}
	}
	if len(has) > 0 {
		st.took(has)
	}
	return due
}

// isNew says whether the client has had none of these yet on this stream.
func isNew(due []item) bool {
	return !slices.ContainsFunc(due, func(i item) bool { return i.sub.held != "" || i.sub.refused != "" })
}

// send sends a response. It does not wait: there is no other that the client has not read.
func (st *stream) send(wire grpc.ServerStream, materials *Materials, due []item, slot bool) error {
	st.nonce = rand.Text()
	st.open = &response{items: due, slot: slot, sent: time.Now()}
	var body message
	for i := 0; i < len(st.open.items); {
		one := st.open.items[i]
		part, err := one.render(st.delta)
		if err != nil {
			st.server.log.ErrorContext(st.ctx, "a secret cannot be sent", "name", one.sub.name, "error", err)
			one.sub.refused = one.id // until there is another
			st.open.items = slices.Delete(st.open.items, i, i+1)
			continue
		}
		body = append(body, part)
		if one.bundle != nil {
			st.floor = one.number
		}
		i++
	}
	if len(body) == 0 {
		st.release()
		return nil
	}
	var tail proto.Message = &discovery.DeltaDiscoveryResponse{TypeUrl: secretType, Nonce: st.nonce}
	if !st.delta {
		st.open.version = st.version(materials).String()
		tail = &discovery.DiscoveryResponse{VersionInfo: st.open.version, TypeUrl: secretType, Nonce: st.nonce}
	}
	last, err := proto.Marshal(tail)
	if err != nil {
		return status.Errorf(codes.Internal, "marshalling a response: %v", err)
	}
	if err := wire.SendMsg(append(body, last)); err != nil {
		return errGone
	}
	for _, one := range st.open.items {
		st.server.metrics.SDSPushed(Resource(one.sub.name))
	}
	return nil
}

// version names what the client has once it has taken the open response.
func (st *stream) version(materials *Materials) version {
	v, known := version{own: st.floor}, st.server.bundlesOf(materials)
	var names []string
	for _, one := range st.subs {
		r := st.server.find(one.name, materials)
		if i := slices.IndexFunc(st.open.items, func(i item) bool { return i.sub == one }); i >= 0 {
			r = st.open.items[i].resource
		} else if r.id == "" || r.id != one.held {
			continue
		}
		names = append(names, one.name)
		if r.svid != nil {
			v.serial = serialOf(r.svid)
		} else {
			v.bundles = known.digest
		}
	}
	v.names = digest(sorted(names)...)
	return v
}

func sorted(names []string) []string {
	slices.Sort(names)
	return names
}

// answered looks at what the client says of the open response.
func (st *stream) answered(r request) {
	items := st.open.items
	if !st.delta && !r.refused && r.version != st.open.version {
		r.refused, r.reason = true, "the client names another version, and says nothing of an error"
	}
	st.release()
	if !r.refused {
		for _, one := range items {
			one.sub.held, one.sub.refused = one.id, ""
			st.server.metrics.SDSAnswered(Resource(one.sub.name), true)
		}
		st.took(items)
		return
	}
	reason := strings.ToValidUTF8(r.reason[:min(len(r.reason), maxReason)], "\ufffd")
	answer := answerOf(items)
	answer.Reason = cmp.Or(reason, "the client says nothing of why")
	for _, one := range items {
		one.sub.refused = one.id
		st.server.metrics.SDSAnswered(Resource(one.sub.name), false)
	}
	st.server.tell(st.ctx, st.source, "a client did not take its secrets: it goes on with those that it has, and is sent the next ones", "names", answer.Names, "reason", answer.Reason)
	st.source.Answered(answer)
}

// took tells the source that the client has these.
func (st *stream) took(items []item) {
	for _, one := range items {
		one.sub.told = true
		if one.bundle != nil {
			one.sub.took = one.bundle
			after := Holding{one.bundle.Incarnation, one.bundle.Sequence}
			st.server.holds(&st.holding, &after)
			st.holding = after
		}
	}
	answer := answerOf(items)
	if answer.Bundle != nil {
		answer.Bundle = st.oldest(answer.Bundle)
	}
	st.source.Answered(answer)
}

// oldest is the oldest bundle of the own trust domain that the client has by any name: it goes on verifying with that when it took newest by another one. nil: by one of the names
// it is not known to have any.
func (st *stream) oldest(newest *Bundle) *Bundle {
	oldest := newest
	for _, one := range st.subs {
		switch {
		case !asksForOwn(one.name, newest.TrustDomain):
		case one.took == nil:
			return nil
		case one.took.Incarnation != newest.Incarnation || one.took.Sequence < oldest.Sequence:
			oldest = one.took
		}
	}
	return oldest
}

func answerOf(items []item) (a Answer) {
	for _, one := range items {
		a.Names = append(a.Names, one.sub.name)
		if one.svid != nil {
			a.SVID = one.svid
		}
		if one.bundle != nil {
			a.Bundle = one.bundle
		}
	}
	return a
}

// late is when the open response has taken too long: for its slot first, and then altogether. nil: there is none.
func (st *stream) late() <-chan time.Time {
	switch {
	case st.open == nil:
		return nil
	case st.open.slot:
		return time.After(time.Until(st.open.sent.Add(turn)))
	}
	return time.After(time.Until(st.open.sent.Add(st.server.patience)))
}

// waited gives the slot of a response that was not answered back, and ends the stream when it was not answered for much longer.
func (st *stream) waited() error {
	if st.open.slot {
		st.open.slot = false
		<-st.server.slots
		return nil
	}
	return status.Errorf(codes.DeadlineExceeded, "a response was not answered in %s", st.server.patience)
}

// release is for a response that is answered, or will not be.
func (st *stream) release() {
	if st.open != nil && st.open.slot {
		<-st.server.slots
	}
	st.open = nil
}

// bucket slows down a client that says too much.
type bucket struct {
	left   float64
	filled time.Time
}

func (b *bucket) take() { b.left-- }

// rest is when the next request is looked at; nil: now.
func (b *bucket) rest() <-chan time.Time {
	now := time.Now()
	b.left = min(burst, b.left+rate*now.Sub(b.filled).Seconds())
	b.filled = now
	if b.left >= 1 {
		return nil
	}
	return time.After(time.Duration((1 - b.left) / rate * float64(time.Second)))
}
