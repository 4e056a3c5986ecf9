package agent

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/ca/atomicfile"
	"kedge/issuer/istio"
	"kedge/issuer/sds"
)

func TestAnSVIDIsRenewedAtHalfOfItsLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.start(t)
		pass(10 * time.Hour)
		calls := b.ca.asked()
		if len(calls) < 18 || len(calls) > 23 {
			t.Errorf("in ten hours an SVID of one hour was issued %d times", len(calls))
		}
		different := map[time.Duration]bool{}
		for n := 1; n < len(calls); n++ {
			gap := calls[n].at.Sub(calls[n-1].at)
			different[gap] = true
			if gap < 27*time.Minute-time.Second || gap > 33*time.Minute { // certificates have whole seconds
				t.Errorf("renewal %d came after %s", n, gap)
			}
		}
		if len(different) < 3 {
			t.Error("the renewals have no jitter")
		}
	})
}

// TestAClockThatJumpsCausesNoLoop, wherever it jumps to: the CA is asked for what is due, and that is all.
func TestAClockThatJumpsCausesNoLoop(t *testing.T) {
	for name, c := range map[string]struct {
		jump      time.Duration
		soon, day int // calls within ten minutes, and within a day: at most
		handed    bool
	}{
		"some minutes ahead":         {10 * time.Minute, 1, 4, true},
		"beyond half of the life":    {13 * time.Hour, 2, 8, true},
		"to shortly before the end":  {24*time.Hour - 10*time.Minute, 8, 500, true},
		"beyond the end":             {30 * time.Hour, 10, 600, false},
		"years ahead":                {5 * 365 * 24 * time.Hour, 10, 600, false},
		"some minutes back":          {-10 * time.Minute, 1, 4, true},
		"to before the SVID's begin": {-30 * time.Hour, 1, 4, true},
		"years back":                 {-20 * 365 * 24 * time.Hour, 1, 4, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, 24*time.Hour)
				b.start(t)
				pass(time.Minute)
				b.jump(c.jump)
				pass(10 * time.Minute)
				if n := len(b.ca.asked()); n > c.soon {
					t.Errorf("within ten minutes after the jump the CA was asked %d times", n)
				}
				if handed := b.handed() != nil; handed != c.handed {
					t.Errorf("an SVID is handed out: %t", handed)
				}
				pass(24 * time.Hour)
				if n := len(b.ca.asked()); n < 2 || n > c.day {
					t.Errorf("within a day after the jump the CA was asked %d times", n)
				}
				// Once the clock is right again, so is everything else.
				b.jump(-c.jump)
				pass(6 * time.Minute)
				if svid := b.handed(); svid == nil || time.Until(svid.NotAfter) < 10*time.Hour {
					t.Errorf("the clock is right again, and what is handed out is %+v", svid)
				}
				before := len(b.ca.asked())
				pass(10 * time.Minute)
				if n := len(b.ca.asked()) - before; n > 1 {
					t.Errorf("the clock is right again, and the CA was asked %d times within ten minutes", n)
				}
			})
		})
	}
}

// TestAJumpIsNoticedSoon: half of an SVID's life is over by the wall clock when a machine wakes up.
func TestAJumpIsNoticedSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 24*time.Hour)
		b.start(t)
		pass(time.Minute)
		b.jump(14 * time.Hour) // within one look; half of the life, give or take a tenth of that, has passed
		if n := len(b.ca.asked()); n != 2 {
			t.Errorf("the CA was asked %d times", n)
		}
	})
}

// TestAnExpiredSVIDIsNotHandedOut, and the next one is as soon as the CA is back.
func TestAnExpiredSVIDIsNotHandedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		away := status.Error(codes.Unavailable, "away")
		b.ca.refusing(func(shown) error { return away })
		b.start(t)
		pass(time.Hour)
		if n := len(b.ca.asked()); n < 100 || n > 400 {
			t.Errorf("a CA that was away for an hour was asked %d times", n)
		}
		source, _ := b.OpenWorkload(t.Context())
		if code := status.Code(source.Missing()); code != codes.Unavailable {
			t.Errorf("while the CA is away a workload is told %s", code)
		}
		b.ca.refusing(nil)
		pass(longestRetry)
		if b.handed() == nil {
			t.Fatal("the CA is back, and there is no SVID")
		}
		b.ca.refusing(func(shown) error { return away })
		pass(59 * time.Minute)
		if b.handed() == nil {
			t.Error("the SVID is not handed out any more, though it is valid")
		}
		if len(b.problems()) != 1 {
			t.Errorf("the renewals fail, and the problems are %v", b.problems())
		}
		pass(2 * time.Minute)
		if b.handed() != nil || b.missing() == nil {
			t.Error("an SVID that has expired is handed out")
		}
		if code := status.Code(source.Missing()); code != codes.Unavailable {
			t.Errorf("a workload is told %s", code)
		}
		if n := b.said("has expired, and is not handed out any more"); n != 1 {
			t.Errorf("that is said %d times", n)
		}
		b.ca.refusing(nil)
		pass(longestRetry)
		if b.handed() == nil || b.missing() != nil || len(b.problems()) != 0 {
			t.Errorf("the CA is back: %v %v", b.missing(), b.problems())
		}
	})
}

// TestARefusalIsRepeatedSlowlyUntilSomethingElseIsGiven: each refusal is a line in the CA's log and in the agent's.
func TestARefusalIsRepeatedSlowlyUntilSomethingElseIsGiven(t *testing.T) {
	for _, code := range []codes.Code{codes.Unauthenticated, codes.PermissionDenied} {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t, time.Hour)
			b.ca.refusing(func(with shown) error {
				if with.token != "good" {
					return status.Error(code, "no")
				}
				return nil
			})
			b.start(t)
			pass(24 * time.Hour)
			n := len(b.ca.asked())
			if n < 24*12 || n > 24*24+10 {
				t.Errorf("in a day the CA was asked %d times", n)
			}
			if lines := b.said("there is no good new SVID"); lines > n {
				t.Errorf("%d calls made %d lines", n, lines)
			}
			if code == codes.Unauthenticated && b.said("put a new one of 'kedge token create' into "+b.token) == 0 {
				t.Error("nothing says what to do")
			}
			source, _ := b.OpenWorkload(t.Context())
			if code := status.Code(source.Missing()); code != codes.PermissionDenied {
				t.Errorf("a workload is told %s", code)
			}
			write(t, b.token, "good")
			pass(look)
			if b.handed() == nil {
				t.Error("there is a good token, and no SVID")
			}
		})
	}
}

// TestAnAnswerThatIsNoGoodIsNotAskedForInALoop: the CA issues a certificate each time.
func TestAnAnswerThatIsNoGoodIsNotAskedForInALoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.ca.refusing(func(shown) error { return fmt.Errorf("what the CA sent is not used: %w", istio.ErrUnverified) })
		b.start(t)
		pass(time.Hour)
		if n := len(b.ca.asked()); n < 12 || n > 35 {
			t.Errorf("in an hour the CA was asked %d times", n)
		}
	})
}

// TestATokenIsShownOnceAndTheSVIDProvesItsHolderAfterThat: a join token serves once. One that has been replaced, as the kubelet does, is shown together with the SVID.
func TestATokenIsShownOnceAndTheSVIDProvesItsHolderAfterThat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.start(t)
		pass(40 * time.Minute)
		write(t, b.token, "second")
		pass(40 * time.Minute)
		b.ca.refusing(func(with shown) error {
			if with.token == "" {
				return status.Error(codes.Unauthenticated, "no")
			}
			return nil
		})
		pass(30 * time.Minute)
		calls := b.ca.asked()
		if len(calls) < 5 {
			t.Fatalf("the CA was asked %d times", len(calls))
		}
		for n, want := range []struct {
			token string
			svid  bool
		}{{"first", false}, {"", true}, {"second", true}, {"", true}, {"second", false}} {
			if got := calls[n].with; got.token != want.token || (got.certificate != nil) != want.svid {
				t.Errorf("call %d showed the token %q, and an SVID: %t; it should have been %+v", n+1, got.token, got.certificate != nil, want)
			}
		}
	})
}

// TestARefusalThatEndsDoesNotCostTheSVIDItsWord: the CA, or whoever was in its place, refused for a while, the join token is spent, and the SVID is still good.
func TestARefusalThatEndsDoesNotCostTheSVIDItsWord(t *testing.T) {
	for _, refusal := range []error{fmt.Errorf("%w: for a while", istio.ErrUntrusted), status.Error(codes.Unimplemented, "no"), status.Error(codes.Unauthenticated, "no")} {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t, time.Hour)
			b.start(t)
			b.ca.refusing(func(shown) error { return refusal })
			pass(40 * time.Minute)
			b.ca.refusing(func(with shown) error {
				if with.certificate == nil {
					return status.Error(codes.Unauthenticated, "the join token is spent")
				}
				return nil
			})
			pass(10 * time.Minute)
			if svid := b.handed(); svid == nil || time.Until(svid.NotAfter) < 45*time.Minute {
				t.Errorf("it was refused for a while (%v), and afterwards there is %+v", refusal, svid)
			}
		})
	}
}

// TestATokenForAnotherIdentityIsShownAlone: beside an SVID it contradicts that, and the CA refuses both.
func TestATokenForAnotherIdentityIsShownAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.start(t)
		write(t, b.token, "of another")
		b.ca.refusing(func(with shown) error {
			if with.certificate != nil && with.token != "" {
				return status.Error(codes.PermissionDenied, "a call has one identity")
			}
			return nil
		})
		pass(35 * time.Minute)
		calls := b.ca.asked()
		if last := calls[len(calls)-1].with; len(calls) != 3 || last.token != "of another" || last.certificate != nil {
			t.Errorf("after %d calls the last one showed the token %q, and an SVID: %t", len(calls), last.token, last.certificate != nil)
		}
	})
}

// TestAClientCertificateThatIsRefusedKeepsNoSVIDFromBeingRenewed: what was put into the folder since may be no good.
func TestAClientCertificateThatIsRefusedKeepsNoSVIDFromBeingRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.start(t)
		dir := t.TempDir()
		b.w.TokenFile, b.w.ClientCertificate = "", dir
		other, err := newAuthority(t, time.Hour).ask(t.Context(), shown{})
		if err != nil {
			t.Fatal(err)
		}
		if err := atomicfile.WriteSet(dir, other.Files()); err != nil {
			t.Fatal(err)
		}
		b.ca.refusing(func(with shown) error {
			if with.certificate != nil && with.certificate.Leaf.Equal(other.Leaf()) {
				return status.Error(codes.Unauthenticated, "it is another CA's")
			}
			return nil
		})
		pass(35 * time.Minute)
		if calls := b.ca.asked(); len(calls) != 3 || calls[2].with.certificate == nil {
			t.Errorf("the CA was asked %d times", len(calls))
		}
	})
}

// TestATokenThatCannotBeReadKeepsNoSVIDFromBeingRenewed: it may just be replaced.
func TestATokenThatCannotBeReadKeepsNoSVIDFromBeingRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.start(t)
		write(t, b.token, "")
		pass(35 * time.Minute)
		if calls := b.ca.asked(); len(calls) != 2 || calls[1].with.certificate == nil {
			t.Errorf("the CA was asked %d times", len(calls))
		}
	})
}

// TestNoConsumerGetsAnOlderTrustBundle than the one that the agent has had.
func TestNoConsumerGetsAnOlderTrustBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Hour)
		b.start(t)
		take := func(number sds.Number, text string, asked time.Time) bool {
			pass(time.Second)
			b.mu.Lock()
			defer b.mu.Unlock()
			return b.takeLocked(b.svid.ID.TrustDomain(), b.svid.Roots, text, number, asked)
		}
		number := func(incarnation string, sequence uint64) sds.Number {
			return sds.Number{Incarnation: incarnation, Sequence: sequence}
		}
		for n, c := range []struct {
			number sds.Number
			text   string
			before bool // it was asked for before the one of now came
			taken  bool
		}{
			{number("a", 1), b.ca.bundle(), false, false}, // the one of now
			{number("a", 3), "three", true, true},         // numbers count, and not when they came
			{number("a", 2), "two", false, false},
			{number("b", 1), "restored", false, true}, // another store
			{number("a", 4), "of before the restore", false, true},
			{sds.Number{}, "of a CA that does not number", true, false},
			{sds.Number{}, "of a CA that does not number", false, true},
			{sds.Number{}, "of a CA that does not number", false, false},
			{sds.Number{}, "another", false, true},
		} {
			asked := time.Now()
			if c.before {
				asked = asked.Add(-time.Minute)
			}
			if taken := take(c.number, c.text, asked); taken != c.taken {
				t.Errorf("step %d: %+v was taken: %t", n, c, taken)
			}
		}
	})
}
