package process

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
)

// ports that this test program has given out.
var ports sync.Map

// FreePort returns a loopback port that nothing listens on. It is below those that the kernel gives to outgoing connections (from 32768 on), so that none of them takes it while a
// program that had it is restarted.
func FreePort(t testing.TB) int {
	t.Helper()
	for range 1000 {
		port := 20000 + rand.IntN(12000)
		if _, given := ports.LoadOrStore(port, true); given {
			continue
		}
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		if err := listener.Close(); err != nil {
			t.Fatal(err)
		}
		return port
	}
	t.Fatal("no free port between 20000 and 32000")
	return 0
}
