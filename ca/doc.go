// Package ca decides what is signed and what is trusted. It knows no transport and no vendor.
//
// Open a CA over a ledger, a Root and a KeyStore; Run keeps its authorities fresh; Issue turns a Caller (who a front door
// found to be asking) and a CSR into a recorded SVID.
//
// The order of the signing path is fixed by types, each of which only comes out of the step before:
//
//	Caller → Grant → Granted ┐
//	CSR → ReadCSR → KeyRequest ┴ Prepare → Prepared → Sign → Signed → Record → Issued
//
// Only Issued gives its certificate away: nothing that is not durably in the ledger can leave (I1).
package ca
