// Package crash holds the tests that are unkind to the real program: it is killed, stopped and starved of disk while clients are at work, its
// fsync fails, what it depends on goes away. After each of them the same must hold: what a client received is in the ledger, and the CA
// goes on by itself.
//
// KEDGE_KILLS sets how often TestKillNineUnderLoad kills it, KEDGE_CUTS how many power cuts each of the tests of those plays: 'make crash' plays a
// thousand of both. KEDGE_SOAK sets how long TestSoak lasts: an hour by 'make soak', and some seconds, enough for a few rotations and restarts, in
// 'make test', since it needs nothing but the program.
package crash
