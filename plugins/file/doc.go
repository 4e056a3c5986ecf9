// Package file keeps a CA's root and signing keys in files.
//
// OpenRoot gives the ca.Root that a CA without any other root has: a key and a self-signed certificate, made on first start
// in a folder of their own, or put there by an admin. OpenKeyStore gives the ca.KeyStore that goes with it: one file a key.
//
// Keys are PKCS#8 in PEM, 0600, in a folder of 0700. With a passphrase file they are encrypted as openssl does it (PBES2 of
// RFC 8018: PBKDF2 with HMAC-SHA-256, AES-256-CBC), so that openssl reads what Kedge wrote, and Kedge what openssl wrote.
// That protects backups and stolen disks. It does not protect from someone who can read the passphrase file as well: give
// that file from elsewhere (a mounted secret, a systemd credential), or keep the keys in an HSM.
//
// A folder belongs to one process at a time; the caller sees to that (kedge locks its data folder). Every file is written
// under another name, flushed, renamed, and its folder flushed: a crash at any moment leaves the old state or the new one.
package file
