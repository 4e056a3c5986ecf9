// Package ceremony signs by hand what is signed rarely: the certificate of a root, that of an issuing CA from its CSR, a CRL. One reviewable file, the plan, is the whole
// input. Prepare makes of it exactly what will be signed, to the octet, and lints it; Sign has the key sign that, and verifies and lints what came back. Left finds what a run
// that was cut short has left, and Complete goes on from there. Nothing here knows where the key is.
package ceremony
