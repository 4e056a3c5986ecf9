package ca_test

import (
	"errors"
	"fmt"
	"testing"

	"kedge/ca"
)

func TestTheFilesInAnErrorAreFoundHoweverItWasWrappedAndJoined(t *testing.T) {
	one := &ca.FileError{File: "one", Reason: ca.Expired, Err: errors.New("one expired")}
	two := &ca.FileError{File: "two", Reason: ca.Exposed, Err: fmt.Errorf("two is open: %w", one)} // what is within belongs to it
	other := errors.New("no file")
	for name, test := range map[string]struct {
		err  error
		want []*ca.FileError
	}{
		"nothing":         {nil, nil},
		"no file":         {fmt.Errorf("a: %w", other), nil},
		"wrapped":         {ca.Problem{About: "root", Err: fmt.Errorf("a: %w", one)}, []*ca.FileError{one}},
		"joined":          {errors.Join(other, fmt.Errorf("%w and %w", one, two), errors.Join(other)), []*ca.FileError{one, two}},
		"one in another":  {two, []*ca.FileError{two}},
		"a problem of it": {ca.Problem{About: "root", Err: other}, nil},
	} {
		if got := ca.FileErrors(test.err); fmt.Sprint(got) != fmt.Sprint(test.want) {
			t.Errorf("%s: %v", name, got)
		}
	}
}
