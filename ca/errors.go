package ca

import (
	"errors"
	"fmt"
)

// The kinds of refusal that a front door tells apart. Every error that Issue and its steps return wraps exactly one of them;
// an error that wraps none is a defect of the CA itself.
var (
	// ErrInvalid: the request is wrong and stays wrong. Its text is made for the caller and may be shown to it.
	ErrInvalid = errors.New("invalid request")
	// ErrCSR is the ErrInvalid of a CSR that cannot be read, proves nothing, or has a key that the profile does not allow.
	ErrCSR = fmt.Errorf("%w: CSR", ErrInvalid)
	// ErrUnauthenticated: the caller did not prove who it is. The text is for the log only.
	ErrUnauthenticated = errors.New("not authenticated")
	// ErrDenied: the caller is known and may not have this. The text is for the log only.
	ErrDenied = errors.New("permission denied")
	// ErrUnavailable: this CA cannot do it now; trying again later may work. The text is for the log only.
	ErrUnavailable = errors.New("unavailable")
)

// kinded joins a kind to the error that says more, without repeating the kind in its text.
type kinded struct {
	kind error
	err  error
}

func (k kinded) Error() string   { return k.err.Error() }
func (k kinded) Unwrap() []error { return []error{k.kind, k.err} }

// Invalid marks err as ErrInvalid.
func Invalid(err error) error { return kinded{ErrInvalid, err} }

func badCSR(err error) error { return kinded{ErrCSR, err} }

// Unauthenticated marks err as ErrUnauthenticated.
func Unauthenticated(err error) error { return kinded{ErrUnauthenticated, err} }

// Denied marks err as ErrDenied.
func Denied(err error) error { return kinded{ErrDenied, err} }

// Unavailable marks err as ErrUnavailable.
func Unavailable(err error) error { return kinded{ErrUnavailable, err} }
