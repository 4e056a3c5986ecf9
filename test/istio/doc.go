// Package istio runs Kedge against the real parts of Istio: an unmodified pilot-agent as a process, Istio's own citadel
// client and secret cache as libraries, and Istio's own CA server, from which agents move to Kedge.
//
// It is a module of its own, so that Istio's dependencies stay out of Kedge's go.mod, and imports nothing of Kedge: it meets
// the CA where its users do, over gRPC, HTTP, files and the command line. "make e2e" builds both programs and runs it, with
//
//	KEDGE_BIN        the kedge to test
//	PILOT_AGENT_BIN  the pilot-agent to test it with (build.sh prints where it put it)
//	ISTIO_CA_BIN     Istio's CA server, of test/bench/istio
//
// Each test has a CA and agents of its own, on free loopback ports and in folders that are removed; what they logged is shown
// when the test fails. Nothing waits for a fixed time: what should happen is polled for until a deadline that only a real
// failure reaches.
package istio
