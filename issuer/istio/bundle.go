package istio

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/grpc/metadata"

	"kedge/ca/ledger"
)

// What Kedge's own agent and CA say of trust bundles beside Istio's API. Others do not look at it.
const (
	// bundleHeader tells, in the header of an answer, which trust bundle is in it: the agent has bundles by another way, too, and has to know which is the newer one.
	bundleHeader = "x-kedge-bundle"
	// deliveryHeader with the value deliverySDS says, in the header of a request, that the caller hands its SVID to others, and acknowledges on its own SDS stream
	// which trust bundle these have. Until then the SVID counts under no newer one, whatever is in the answer. Who says so wrongly makes a new root wait for him.
	deliveryHeader = "x-kedge-delivery"
	deliverySDS    = "sds"
)

// BundleNumber is the place of a trust bundle among those of a CA; zero: the CA did not say.
type BundleNumber struct {
	Incarnation string // of the store that numbered it: numbers of two incarnations cannot be compared
	Sequence    uint64 // grows with every change
}

func (n BundleNumber) String() string { return fmt.Sprintf("%s %d", n.Incarnation, n.Sequence) }

// deliveryOf says how the trust bundle reaches those who use the SVID.
func deliveryOf(ctx context.Context) ledger.Delivery {
	if md, _ := metadata.FromIncomingContext(ctx); slices.Equal(md.Get(deliveryHeader), []string{deliverySDS}) {
		return ledger.DeliverySDS
	}
	return ledger.DeliveryResponse
}

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
