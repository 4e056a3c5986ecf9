package sds

import (
	"strconv"
	"strings"
)

// SecretType is the type URL of what the service is about.
const SecretType = secretType

// Number is the place of a trust bundle among those of its trust domain, as the versions of secrets have it. Zero: none is named.
type Number struct {
	Incarnation string // digest of Bundle.Incarnation: numbers of two incarnations cannot be compared
	Sequence    uint64
}

// NumberOf is the number of a bundle.
func NumberOf(b *Bundle) Number { return Number{digest(b.Incarnation), b.Sequence} }

// below says whether n is older than floor.
func (n Number) below(floor Number) bool {
	return n.Incarnation == floor.Incarnation && n.Sequence < floor.Sequence
}

// String is INCARNATION-SEQUENCE, or nothing.
func (n Number) String() string {
	if n.Incarnation == "" {
		return ""
	}
	return n.Incarnation + "-" + strconv.FormatUint(n.Sequence, 10)
}

func parseNumber(text string) Number {
	incarnation, number, ok := strings.Cut(text, "-")
	sequence, err := strconv.ParseUint(number, 10, 64)
	if !ok || err != nil || len(incarnation) != len(digest("")) {
		return Number{}
	}
	return Number{incarnation, sequence}
}

// NumberIn reads the number of the own trust domain's bundle out of the id of a content, which is the version of a secret in the incremental protocol. Zero: it is not of a server of this kind.
func NumberIn(id string) Number {
	text, ok := strings.CutPrefix(id, "b-")
	if !ok {
		return Number{}
	}
	if parts := strings.Split(text, "-"); len(parts) > 2 {
		text = parts[0] + "-" + parts[1]
	}
	return parseNumber(text)
}
