// Package ledger is the CA's memory: an append-only, hash-chained log of typed events in one bbolt file, and the small
// tables that follow from it (authorities, bundles and their floor, holdings, join tokens, revocations).
//
// Everything that changes is appended as an event; the tables are changed by the same commit that stores the event, and
// by nothing else. So the rules of the log are guards that hold in that commit: an Issue is refused unless its authority
// is active, its bundle is not below the floor and its join token may still be redeemed.
//
// A ledger that comes back from a backup (Snapshot) begins a new log within the same file (Restore), and says from when on it knows
// everything again. That one was put back without a word is noticed by a Mark outside the file.
//
// Start with Open, then Append. A successful Append is durable (I1: recorded before released).
package ledger
