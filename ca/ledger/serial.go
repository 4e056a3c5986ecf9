package ledger

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// maxSerial is the longest serial number that is kept, in octets. RFC 5280 4.1.2.2 allows 20; some foreign CAs exceed it.
const maxSerial = 64

// ParseSerial reads the hex digits of a serial number in the forms that people paste: 01ab, 01:AB, 0x01ab, with or without leading zeros.
func ParseSerial(text string) (Serial, error) {
	digits := strings.TrimPrefix(strings.TrimPrefix(text, "0x"), "0X")
	if len(digits) > 3*maxSerial+8 {
		return nil, fmt.Errorf("a serial number has at most %d octets; this one is written with %d characters", maxSerial, len(text))
	}
	if strings.Contains(digits, ":") {
		for _, octet := range strings.Split(digits, ":") {
			if len(octet) != 2 {
				return nil, fmt.Errorf("serial number %q: between colons there are two hex digits each", text)
			}
		}
		digits = strings.ReplaceAll(digits, ":", "")
	}
	if len(digits)%2 == 1 {
		digits = "0" + digits
	}
	octets, err := hex.DecodeString(digits)
	if err != nil {
		return nil, fmt.Errorf("serial number %q: write it in hex digits, with or without colons: %w", text, err)
	}
	for len(octets) > 0 && octets[0] == 0 {
		octets = octets[1:]
	}
	if err := Serial(octets).check(); err != nil {
		return nil, fmt.Errorf("serial number %q: %w", text, err)
	}
	return octets, nil
}

// check holds a serial to its one form: a positive integer (RFC 5280 4.1.2.2) without leading zeros.
func (s Serial) check() error {
	switch {
	case len(s) == 0:
		return errors.New("it is zero or empty; a serial number is a positive integer (RFC 5280 4.1.2.2)")
	case len(s) > maxSerial:
		return fmt.Errorf("it has %d octets, more than %d", len(s), maxSerial)
	case s[0] == 0:
		return errors.New("it has leading zeros")
	}
	return nil
}
