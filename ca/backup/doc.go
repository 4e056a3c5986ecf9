// Package backup makes the one file that a CA can be brought back from, while the CA runs (Take), and makes a data folder of it again (Restore).
//
// The file is a tar archive. Its first entry, manifest.json, says what the CA was and what the others are, each with its SHA-256: the
// ledger, the format of the data folder, the guarded clock, and the files of the root and of the key store, where those are
// files. Keys are in it as they are on disk. What lets callers in is not: neither the key of join tokens, which would let one
// in again that was spent after the backup, nor the keys of token issuers, which are fetched anew.
package backup
