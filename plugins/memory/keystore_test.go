package memory

import (
	"testing"

	"kedge/ca"
	"kedge/ca/contracttest"
)

func TestContract(t *testing.T) {
	contracttest.KeyStore(t, func(*testing.T) ca.KeyStore { return &KeyStore{} }, nil, nil, contracttest.AllKeySpecs...)
}
