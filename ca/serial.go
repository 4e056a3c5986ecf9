package ca

import (
	"crypto/rand"

	"kedge/ca/ledger"
)

// serialFormat is the first octet of every serial of this layout. 01–7f keeps the integer positive in 20 octets (RFC 5280 4.1.2.2).
const serialFormat = 0x01

// newSerial makes a serial number of 20 octets: the format, three octets of the log's id, so that replicas and restored
// folders never collide, and 16 random ones.
func newSerial(log ledger.LogID) ledger.Serial {
	octets := make(ledger.Serial, 20)
	octets[0] = serialFormat
	copy(octets[1:4], log[:3])
	rand.Read(octets[4:]) // never fails since Go 1.24
	return octets
}
