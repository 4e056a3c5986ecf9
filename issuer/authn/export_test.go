package authn

// ParseJWKS is parseJWKS, for fuzzing.
var ParseJWKS = parseJWKS

// ReadJWS is readJWS, for fuzzing.
func ReadJWS(text string) (algorithm, keyID string, payload []byte, signedWith func(key any) bool, err error) {
	j, err := readJWS(text)
	return j.algorithm, j.keyID, j.payload, func(key any) bool { return j.signedWith(key) }, err
}

// Algorithms are those that count.
var Algorithms = algorithms
