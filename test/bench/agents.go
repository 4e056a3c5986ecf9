package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	pb "istio.io/api/security/v1alpha1"
)

// agentsVerb is the argument that makes this program play istio-agents: it reads agentsOrder from its standard input, writes an empty agentsReport once
// they are ready, reads the moment at which they begin (UNIX time in ns), and writes agentsReport when all of them have their certificates.
const agentsVerb = "agents"

// agentsOrder is what one process plays.
type agentsOrder struct {
	Address      string
	Leaf         []byte        // the server's certificate, in DER
	First, Count int           // which of the agents; each has an address of its own in 127.0.0.0/8
	Connecting   int           // how many of them may be dialling or in a handshake: see connect
	Tokens, CSRs []string      // the agent i brings the i-th, over and over
	Patience     time.Duration // when it ends, whoever has no certificate until then
}

// agentsReport is how it went.
type agentsReport struct {
	Served     []time.Duration // since the beginning, of each agent that has its certificate
	Dials      int             // connections that were begun
	Handshakes int             // TLS handshakes that the client found complete
	Answers    map[string]int  // of the calls, by code; also of those that never left the client, since there was no connection
	Failure    string          // the text of an answer that was an error, as an example
	CPU        time.Duration   // of this process, since the beginning
}

// The timing of an istio-agent; see docs/benchmarks.md for where it comes from.
const (
	attempts      = 5
	attemptWait   = 100 * time.Millisecond
	attemptJitter = 0.1
	roundWait     = 500 * time.Millisecond
	roundFactor   = 1.5
	roundJitter   = 0.5
	roundMost     = time.Minute
)

// repeated are the codes on which the agent's interceptor tries again.
var repeated = []codes.Code{codes.Canceled, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Aborted, codes.Internal, codes.Unavailable}

// agent asks for one certificate as an istio-agent does, until it has it.
type agent struct {
	herd    *agents
	from    net.IP
	request []byte
	headers []hpack.HeaderField
	channel *channel
}

// agents are those of this process.
type agents struct {
	agentsOrder
	tls               *tls.Config
	dials, handshakes atomic.Int64
	connecting        chan struct{} // an element for each that is dialling or in its handshake

	mu     sync.Mutex
	report agentsReport
}

// connect dials, and makes the handshake. While as many are at it as the kernel lets wait for a server, it tries again when TCP would send the SYN again that the kernel drops
// (RFC 6298: after 1 s, and ever twice as long). Agents have a CPU each; these share one, which would have nothing left for those whose turn it is if
// all the others were to dial in vain.
func (h *agents) connect(ctx context.Context, from net.IP) (*tls.Conn, error) {
	for wait := time.Second; ; wait *= 2 {
		select {
		case h.connecting <- struct{}{}:
		default:
			if !pause(ctx, wait, 0) {
				return nil, ctx.Err()
			}
			continue
		}
		break
	}
	defer func() { <-h.connecting }()
	h.dials.Add(1)
	conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}).DialContext(ctx, "tcp", h.Address)
	if err != nil {
		return nil, err
	}
	secured := tls.Client(conn, h.tls)
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	h.handshakes.Add(1)
	return secured, nil
}

// playAgents is what a process of agentsVerb does.
func playAgents() error {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	h := &agents{report: agentsReport{Answers: map[string]int{}}}
	if err := in.Decode(&h.agentsOrder); err != nil {
		return fmt.Errorf("reading what to play: %w", err)
	}
	h.connecting = make(chan struct{}, h.Connecting)
	debug.SetGCPercent(200) // the generator's core is for agents
	h.tls = &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}, InsecureSkipVerify: true, //nolint:gosec // the certificate is compared with the one that was verified before
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil },
		VerifyConnection: func(state tls.ConnectionState) error {
			if !bytes.Equal(state.PeerCertificates[0].Raw, h.Leaf) {
				return errors.New("the server shows another certificate than before")
			}
			return nil
		},
	}
	all := make([]*agent, h.Count)
	for i := range all {
		number := h.First + i
		request, err := proto.Marshal(&pb.IstioCertificateRequest{
			Csr: h.CSRs[number%len(h.CSRs)], ValidityDuration: validity,
			Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{"CertSigner": structpb.NewStringValue("")}},
		})
		if err != nil {
			return err
		}
		all[i] = &agent{herd: h, from: loopback(number), request: request, headers: []hpack.HeaderField{
			{Name: "user-agent", Value: "grpc-go/" + grpc.Version}, {Name: "authorization", Value: "Bearer " + h.Tokens[number%len(h.Tokens)]}, {Name: "clusterid", Value: "Kubernetes"}}}
		all[i].dial()
	}
	if err := out.Encode(agentsReport{}); err != nil {
		return err
	}
	var nanoseconds int64
	if err := in.Decode(&nanoseconds); err != nil {
		return fmt.Errorf("reading when to begin: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), h.Patience)
	defer cancel()
	began := time.Unix(0, nanoseconds)
	<-time.After(time.Until(began))
	cpu, err := cpuTime(os.Getpid())
	if err != nil {
		return err
	}
	var running sync.WaitGroup
	for _, a := range all {
		running.Go(func() {
			if a.run(ctx) {
				took := time.Since(began)
				h.mu.Lock()
				defer h.mu.Unlock()
				h.report.Served = append(h.report.Served, took)
			}
		})
	}
	running.Wait()
	if h.report.CPU, err = cpuTime(os.Getpid()); err != nil {
		return err
	}
	h.report.CPU -= cpu
	h.report.Dials, h.report.Handshakes = int(h.dials.Load()), int(h.handshakes.Load())
	return out.Encode(h.report) // the connections are open until the process ends
}

// loopback is an address of the i-th agent.
func loopback(i int) net.IP { return net.IPv4(127, byte(1+i>>16), byte(i>>8), byte(i)) }

// dial prepares a connection. It is made with the first call.
func (a *agent) dial() {
	a.channel = newChannel(pb.IstioCertificateService_CreateCertificate_FullMethodName, func(ctx context.Context) (*tls.Conn, error) { return a.herd.connect(ctx, a.from) })
}

// run asks until there is a certificate: that is whether there is one before ctx ends.
func (a *agent) run(ctx context.Context) bool {
	for wait := roundWait; ; wait = min(time.Duration(float64(wait)*roundFactor), roundMost) {
		if a.sign(ctx) == nil {
			return true
		}
		a.channel.close() // nothing is under way
		a.dial()
		a.channel.begin()
		if !pause(ctx, wait, roundJitter) {
			return false
		}
	}
}

// sign is a call with the agent's interceptor around it.
func (a *agent) sign(ctx context.Context) (err error) {
	for attempt := range attempts {
		if attempt > 0 && !pause(ctx, attemptWait<<(attempt-1), attemptJitter) {
			return ctx.Err()
		}
		var message []byte
		message, err = a.channel.call(ctx, a.headers, a.request)
		a.herd.answered(err)
		if err == nil {
			var answer pb.IstioCertificateResponse
			if err := proto.Unmarshal(message, &answer); err != nil || len(answer.GetCertChain()) < 2 {
				return fmt.Errorf("the answer has no chain (%w)", err)
			}
		}
		if err == nil || !slices.Contains(repeated, status.Code(err)) {
			return err
		}
	}
	return err
}

func (h *agents) answered(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.report.Answers[status.Code(err).String()]++
	if err != nil {
		h.report.Failure = err.Error()
	}
}

// pause waits, more or less by a share of the time. It is false when ctx ended before.
func pause(ctx context.Context, d time.Duration, jitter float64) bool {
	select {
	case <-time.After(time.Duration(float64(d) * (1 + jitter*(2*rand.Float64()-1)))):
		return true
	case <-ctx.Done():
		return false
	}
}
