// Package sds is the door for Envoys: envoy.service.secret.v3.SecretDiscoveryService, with Istio's names of secrets and SPIFFE's.
//
// A Server speaks the protocol: streams, versions, what was acknowledged. What it hands out comes from a Source, one for each stream: at the CA that is a
// caller's, at 'kedge agent' the workload's beside it. A gRPC server that a Server is registered with is made with ServerOption.
//
// The server of go-control-plane is not used: its cache has one snapshot a node, named by what the client says of itself, and renders each response for each stream,
// while here a stream's secrets depend on who opened it, and 20,000 streams get one rendering of a new root.
//
// A stream is two goroutines, one of which only receives: a gRPC handler that itself waits for the client could not end its stream. It has at most one response
// that is not answered, so that sending never waits for the client, and nothing queues up. Pushes to streams that are up to date but for a change take turns in a
// bounded number of slots over all streams.
package sds
