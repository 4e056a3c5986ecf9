package hsm_test

import (
	"context"
	"crypto"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/hsm"
	"kedge/test/hsmparts"
)

// measured is how long each rate is measured.
const measured = 2 * time.Second

// BenchmarkToken measures a token's P-256 signatures with one session and with several: how many a second its module makes in this process, with and without a verification of each, and how many come
// through this package, with their p99; and how long it takes from the child's death to the next signature. Run it with -benchtime 1x: each number takes two seconds. The part hsm of test/bench does.
func BenchmarkToken(b *testing.B) {
	for _, name := range []string{"SoftHSM", "NSS", "TPM"} {
		for _, sessions := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s/%d", name, sessions), func(b *testing.B) {
				p := hsmparts.All()[name](b)
				o := p.Options()
				o.Sessions = sessions
				token, err := hsm.Open(o)
				if err != nil {
					b.Fatal(err)
				}
				defer token.Close()
				signer, _, err := token.Generate(b.Context(), p.Specs[0], "bench", []byte("bench"))
				if err != nil {
					b.Fatal(err)
				}
				for range b.N {
					// The two ways take turns, so that a machine that others use does not favour one of them.
					var raw, verified, through [2]float64
					var times []time.Duration
					for i := range raw {
						raw[i] = rate(b, o, false)
						through[i] = loadFor(b, signer, max(2*sessions, 8), &times)
						verified[i] = rate(b, o, true)
					}
					slices.Sort(times)
					b.ReportMetric((raw[0]+raw[1])/2, "raw/s")
					b.ReportMetric((verified[0]+verified[1])/2, "raw+verify/s")
					b.ReportMetric((through[0]+through[1])/2, "through/s")
					b.ReportMetric(float64(times[len(times)*99/100].Microseconds())/1000, "p99-ms")
					began := time.Now()
					if err := syscall.Kill(token.ChildPID(), syscall.SIGKILL); err != nil {
						b.Fatal(err)
					}
					digest := sha256.Sum256(nil)
					if _, err := signer.SignContext(b.Context(), digest[:], crypto.SHA256); err != nil {
						b.Fatal(err)
					}
					b.ReportMetric(float64(time.Since(began).Milliseconds()), "recovery-ms")
				}
			})
		}
	}
}

func rate(b *testing.B, o hsm.Options, verify bool) float64 {
	b.Helper()
	perSecond, err := hsm.Raw(o, "bench", measured, verify)
	if err != nil {
		b.Fatal(err)
	}
	return perSecond
}

// loadFor signs with so many at once, and tells how many a second and how long each took.
func loadFor(b *testing.B, s *hsm.Signer, atOnce int, times *[]time.Duration) float64 {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), measured)
	defer cancel()
	var mu sync.Mutex
	var running sync.WaitGroup
	began, before := time.Now(), len(*times)
	for i := range atOnce {
		running.Go(func() {
			var own []time.Duration
			for n := 0; ctx.Err() == nil; n++ {
				digest := sha256.Sum256(fmt.Append(nil, i, n))
				start := time.Now()
				if _, err := s.SignContext(b.Context(), digest[:], crypto.SHA256); err != nil {
					b.Error(err)
					return
				}
				own = append(own, time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			*times = append(*times, own...)
		})
	}
	running.Wait()
	return float64(len(*times)-before) / time.Since(began).Seconds()
}
