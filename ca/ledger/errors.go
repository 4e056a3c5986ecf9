package ledger

import "errors"

// What callers branch on, with errors.Is. The error itself says more: what was refused, and what to do.
var (
	ErrNotActive    = errors.New("the authority is not active")                  // an Issue under an authority that may not sign
	ErrBelowFloor   = errors.New("the trust bundle is below the floor")          // an Issue that hands out a bundle that is too old
	ErrTokenSpent   = errors.New("the join token is spent")                      //
	ErrTokenUnknown = errors.New("the join token is not known")                  // to this ledger, or not for this identity
	ErrTokenExpired = errors.New("the join token has expired")                   //
	ErrRevoked      = errors.New("the certificate is revoked")                   // an Issue that follows on it
	ErrSuperseded   = errors.New("the certificate is superseded")                // a Confirm of one whose join token was redeemed again since
	ErrAlready      = errors.New("it is recorded already")                       // a Confirm, Token, Revoke or taint for the second time
	ErrConflict     = errors.New("the state is not the expected one")            // compare-and-swap of an authority or bundle: read again, decide again
	ErrNotFound     = errors.New("it is not in the ledger")                      //
	ErrPruned       = errors.New("it was pruned")                                // a read from a number on that is no longer kept
	ErrBusy         = errors.New("too many appends are waiting already")         // nothing was taken; try again soon
	ErrUnavailable  = errors.New("the ledger cannot be written")                 // the store is at fault; wraps the cause, and heals by itself when that goes away
	ErrClosed       = errors.New("the ledger is closed")                         //
	ErrLocked       = errors.New("the data folder is in use")                    // by another process
	ErrPutBack      = errors.New("the ledger is not the one that was here last") // an older copy of it, or another one: see Ledger.CheckMark
)

// damaged is an error about stored bytes that cannot be what this package wrote.
type damaged struct{ err error }

func (d damaged) Error() string { return d.err.Error() }
func (d damaged) Unwrap() error { return d.err }

func isDamaged(err error) bool {
	var broken damaged
	return errors.As(err, &broken)
}

// undurable is an error of a file that can be read, and of which it is open what is on the disk.
type undurable struct{ err error }

func (u undurable) Error() string { return u.err.Error() }
func (u undurable) Unwrap() error { return u.err }

// storeError is an error of the file below, as opposed to a draft that was refused: it makes the ledger faulted.
type storeError struct{ err error }

func (s storeError) Error() string { return s.err.Error() }
func (s storeError) Unwrap() error { return s.err }
