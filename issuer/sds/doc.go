// Package sds is the door for Envoys: envoy.service.secret.v3.SecretDiscoveryService, with Istio's names of secrets and SPIFFE's.
//
// A Server speaks the protocol: streams, versions, what was acknowledged. What it hands out comes from a Source, one for each stream: at the CA that is a
// caller's, at 'kedge agent' the workload's beside it.
package sds
