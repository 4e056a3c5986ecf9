package envoy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"kedge/test/process"
)

// Program is what stands behind an Envoy: it answers every request. It ends with the test.
func Program(t testing.TB) (port int) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, answer) }), ReadHeaderTimeout: process.Patience}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.Serve(listener) // it ends when it is closed
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-ended
	})
	return listener.Addr().(*net.TCPAddr).Port
}

const answer = "here you are"

// pause is how long after a request, at the earliest, its sender sends the next: a machine with two cores has others to run.
const pause = 2 * time.Millisecond

// Traffic are requests that are sent without a pause.
type Traffic struct {
	mu       sync.Mutex
	good     int
	failures []string

	stop func()
}

// Send sends requests to a port until Stop: some on connections that stay, and some each on one of its own.
func Send(t testing.TB, port int) *Traffic {
	t.Helper()
	traffic := &Traffic{}
	ctx, cancel := context.WithCancel(context.Background())
	var senders sync.WaitGroup
	for _, anew := range []bool{false, true} {
		transport := &http.Transport{DisableKeepAlives: anew}
		client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
		senders.Go(func() {
			defer transport.CloseIdleConnections()
			pace := time.NewTicker(pause)
			defer pace.Stop()
			for ctx.Err() == nil {
				traffic.count(send(client, port))
				<-pace.C
			}
		})
	}
	traffic.stop = sync.OnceFunc(func() {
		cancel()
		senders.Wait()
	})
	t.Cleanup(traffic.stop)
	return traffic
}

// Ask sends one request to a port, on a connection of its own. The error says how it failed.
func Ask(port int) error {
	return send(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: process.Patience}, port)
}

func send(client *http.Client, port int) error {
	began := time.Now()
	response, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && (response.StatusCode != http.StatusOK || string(body) != answer) {
		err = fmt.Errorf("%s %s (at %s, after %s)", response.Status, body, time.Now().Format(time.TimeOnly), time.Since(began))
	}
	return err
}

func (s *Traffic) count(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.good++
	} else {
		s.failures = append(s.failures, err.Error())
	}
}

// Counts are the requests so far.
func (s *Traffic) Counts() (good, failed int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.good, len(s.failures)
}

// Goes waits until more were answered. None may have failed so far, after what is said.
func (s *Traffic) Goes(t testing.TB, after string) {
	t.Helper()
	before, _ := s.Counts()
	process.Eventually(t, "requests to be answered after "+after, func() error {
		good, failed := s.Counts()
		if failed > 0 {
			t.Fatalf("after %s %d requests have failed, the first by: %s", after, failed, s.first())
		}
		if good < before+100 {
			return fmt.Errorf("%d were", good-before)
		}
		return nil
	})
}

func (s *Traffic) first() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failures[0]
}

// Stop ends the requests. None may have failed.
func (s *Traffic) Stop(t testing.TB) {
	t.Helper()
	s.stop()
	good, failed := s.Counts()
	t.Logf("%d requests were answered, %d failed", good, failed)
	for i, failure := range s.failures {
		if i == 5 {
			break
		}
		t.Errorf("a request failed: %s", failure)
	}
	if good == 0 || failed > 0 {
		t.Errorf("%d requests were answered, %d failed", good, failed)
	}
}
