package authn

// ParseJWKS is parseJWKS, for fuzzing.
var ParseJWKS = parseJWKS
