package sds

// What a client of an SDS server needs that is a client of Kedge's.

// SecretType is the type URL of what the service is about.
const SecretType = secretType

// Number is the place of a trust bundle among those of the own trust domain, as the versions of secrets have it. Zero: it is not known.
type Number struct {
	Incarnation string // stands for Bundle.Incarnation: numbers of two incarnations cannot be compared
	Sequence    uint64
}

// NumberOf is the number of a bundle.
func NumberOf(b *Bundle) Number {
	r := revisionOf(b)
	return Number{r.incarnation, r.sequence}
}

// NumberIn reads the number out of the version of a secret with trust bundles, as the incremental protocol has one for each secret. Zero: it is not of a server of this kind.
func NumberIn(version string) Number {
	r := revisionIn(version)
	return Number{r.incarnation, r.sequence}
}
