package istio

import (
	"fmt"
	"strconv"
	"strings"

	"google.golang.org/grpc/metadata"
)

// bundleHeader tells, in the header of an answer, which trust bundle is in it. Istio's agents do not look at it; Kedge's has bundles by another way, too, and has
// to know which is the newer one.
const bundleHeader = "x-kedge-bundle"

// BundleNumber is the place of a trust bundle among those of a CA; zero: the CA did not say.
type BundleNumber struct {
	Incarnation string // of the store that numbered it: numbers of two incarnations cannot be compared
	Sequence    uint64 // grows with every change
}

func (n BundleNumber) String() string { return fmt.Sprintf("%s %d", n.Incarnation, n.Sequence) }

func numberIn(header metadata.MD) (n BundleNumber) {
	values := header.Get(bundleHeader)
	if len(values) != 1 {
		return BundleNumber{}
	}
	incarnation, sequence, _ := strings.Cut(values[0], " ")
	number, err := strconv.ParseUint(sequence, 10, 64)
	if err != nil || incarnation == "" || len(incarnation) > 64 {
		return BundleNumber{}
	}
	return BundleNumber{incarnation, number}
}
