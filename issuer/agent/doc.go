// Package agent runs beside workloads and keeps them in SVIDs: it makes the keys on this machine, has the SVIDs issued by a CA's CSR API, and hands them out on unix
// sockets, by SDS and by the SPIFFE Workload API, and in PEM files.
//
// New makes an Agent of Options, Run runs it until its context ends. Each workload has an identity of its own, with sockets and files of its own:
//
//	identity.go   gets the SVID, renews it at half of its life, and takes new trust bundles
//	proof.go      what shows the CA who is asking
//	report.go     the stream to the CA: new trust bundles come by it, and by what is acknowledged on it the CA knows what the workload holds
//	consumers.go  who holds which trust bundle
//	source.go     what the doors issuer/sds and issuer/workload hand out
//	socket.go     the sockets
//	files.go      the files
//	state.go      what is kept over a restart, in memory
//
// Nothing here trusts the wall clock alone: an SVID is due by the wall clock or by the time that has passed, whichever comes first, and how often the CA is asked is
// bounded by the time that has passed.
package agent
