package sds

import (
	"cmp"
	"slices"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
)

// request is what a client says, in either protocol.
type request struct {
	nonce   string // of the response that it answers; "": none
	refused bool   // it does not take that response
	reason  string
	version string            // state of the world: that it has
	names   []string          // state of the world: all that it wants
	more    []string          // delta: what it wants besides
	less    []string          // delta: what it wants no longer
	has     map[string]string // delta: id by name, of what it has from an earlier stream
}

// receive reads the next request of a stream.
func receive(stream grpc.ServerStream, delta bool) (request, error) {
	if !delta {
		var message discovery.DiscoveryRequest
		if err := stream.RecvMsg(&message); err != nil {
			return request{}, errGone
		}
		return readState(&message)
	}
	var message discovery.DeltaDiscoveryRequest
	if err := stream.RecvMsg(&message); err != nil {
		return request{}, errGone
	}
	if err := checkType(message.TypeUrl); err != nil {
		return request{}, err
	}
	r := request{nonce: message.ResponseNonce, more: message.ResourceNamesSubscribe, less: message.ResourceNamesUnsubscribe, has: message.InitialResourceVersions}
	r.refused, r.reason = message.ErrorDetail != nil, message.ErrorDetail.GetMessage()
	return r, cmp.Or(checkNames(r.more), checkNames(r.less))
}

func readState(message *discovery.DiscoveryRequest) (request, error) {
	if err := checkType(message.TypeUrl); err != nil {
		return request{}, err
	}
	r := request{nonce: message.ResponseNonce, version: message.VersionInfo, names: message.ResourceNames}
	r.refused, r.reason = message.ErrorDetail != nil, message.ErrorDetail.GetMessage()
	return r, checkNames(r.names)
}

// checkType refuses another type. None at all is this service's.
func checkType(url string) error {
	if url != "" && url != secretType {
		return invalid("the type %.100q is not served here: %s is", url, secretType)
	}
	return nil
}

func checkNames(names []string) error {
	if len(names) > maxNames {
		return invalid("%d names are asked for, and at most %d are answered on a stream", len(names), maxNames)
	}
	if slices.ContainsFunc(names, func(name string) bool { return len(name) > maxName }) {
		return invalid("a name has more than %d octets", maxName)
	}
	octets := 0
	for _, name := range names {
		octets += len(name)
	}
	if octets > maxOctets {
		return invalid("the names that are asked for have %d octets, and on a stream at most %d are looked at", octets, maxOctets)
	}
	return nil
}
