package ledger

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkAppend is 64 callers at once, each waiting until its event is durable.
func BenchmarkAppend(b *testing.B) {
	var commits atomic.Int64
	h := newHouse(b, func(o *Options) { o.OnCommit = func(Commit) { commits.Add(1) } })
	b.SetParallelism(64)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := h.Append(context.Background(), h.issue()); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/float64(commits.Load()), "events/commit")
}

// BenchmarkConfirm is a root change: thousands of holders acknowledge the new trust bundle at once, each for the certificate that it got by SDS.
func BenchmarkConfirm(b *testing.B) {
	var commits atomic.Int64
	h := newHouse(b, func(o *Options) { o.OnCommit = func(Commit) { commits.Add(1) } })
	var issues []*Confirm
	for len(issues) < b.N {
		var bodies []Body
		for range maxDraft {
			bodies = append(bodies, h.issue(func(i *Issue) { i.Delivery = DeliverySDS }))
		}
		first := h.must(bodies...)
		for i, body := range bodies {
			issues = append(issues, &Confirm{Number: first + uint64(i), Serial: body.(*Issue).Serial, How: "sds-ack", Bundle: 1})
		}
	}
	rand.Shuffle(len(issues), func(i, j int) { issues[i], issues[j] = issues[j], issues[i] })
	commits.Store(0)
	var next atomic.Int64
	b.SetParallelism(1024)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := h.Append(context.Background(), issues[next.Add(1)-1]); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/float64(commits.Load()), "events/commit")
}

// BenchmarkFindIssue looks for one certificate in a hundred thousand, knowing about when it was signed.
func BenchmarkFindIssue(b *testing.B) {
	h := newHouse(b)
	var bodies []Body
	for range maxDraft {
		bodies = append(bodies, h.issue())
	}
	for h.Head().Number < 50_000 {
		h.must(bodies...)
		h.clock.advance(time.Minute)
	}
	wanted, signed := h.issue(), h.clock.Now()
	h.must(wanted)
	for h.Head().Number < 100_000 {
		h.must(bodies...)
		h.clock.advance(time.Minute)
	}
	b.Run("known time", func(b *testing.B) {
		for b.Loop() {
			if _, err := h.FindIssue(context.Background(), wanted.Serial, signed); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("unknown serial", func(b *testing.B) {
		for b.Loop() {
			if _, err := h.FindIssue(context.Background(), serialOf(1<<50), signed); err == nil {
				b.Fatal("found")
			}
		}
	})
}
