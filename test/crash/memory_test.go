package crash

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/test/process"
)

// TestAFloodOfLargeRequestsTakesBoundedMemory: requests as large as they may be, and larger ones, a thousand at once, again and again. Each is refused, other
// callers are served, and the process takes what so many have octets, and gives it back.
func TestAFloodOfLargeRequestsTakesBoundedMemory(t *testing.T) {
	t.Parallel()
	const (
		connections, streams = 64, 16
		size                 = 250 << 10                            // octets; the most is 256 KiB
		bound                = 128<<20 + 2*connections*streams*size // what the garbage collector has not seen yet comes on top
	)
	cluster := process.NewCluster(t)
	k := newCA(t, cluster, "log: {level: error}\n")
	k.Start(t)
	l := newLoad(t, cluster)
	stop := l.start(t, k)
	l.await(t, 50)
	before := k.Metrics(t)["go_memstats_heap_inuse_bytes"]

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var refused, odd atomic.Int64
	var flooding sync.WaitGroup
	large, larger := strings.Repeat("A", size), strings.Repeat("A", 4*size)
	for range connections {
		caller := k.Dial(t, nil)
		for i := range streams {
			flooding.Go(func() {
				csr := large
				if i%10 == 0 {
					csr = larger
				}
				for ctx.Err() == nil {
					_, err := caller.Issue(ctx, csr, l.tokens[0], 0)
					switch status.Code(err) {
					case codes.InvalidArgument, codes.ResourceExhausted, codes.Unavailable: // the last when it takes too long to arrive
						refused.Add(1)
					default:
						if ctx.Err() == nil {
							odd.Add(1)
						}
					}
				}
			})
		}
	}
	var most float64
	process.Eventually(t, "the flood to have been refused a few times over", func() error {
		most = max(most, k.Metrics(t)["process_resident_memory_bytes"])
		if n := refused.Load(); n < 2*connections*streams {
			return fmt.Errorf("%d were refused", n)
		}
		return nil
	})
	l.await(t, 50)
	cancel()
	flooding.Wait()
	if most > bound || odd.Load() > 0 {
		t.Errorf("the process had up to %d MiB in memory, where %d are expected at most; %d calls of the flood got an odd answer", int(most)>>20, bound>>20, odd.Load())
	}
	process.Eventually(t, "the memory to be given back", func() error {
		if now := k.Metrics(t)["go_memstats_heap_inuse_bytes"]; now > before+64<<20 {
			return fmt.Errorf("the heap has %d MiB, and had %d", int(now)>>20, int(before)>>20)
		}
		return nil
	})
	stop()
	l.check(t, k)
}
