// Package hsm is PKCS#11 as a crypto.Signer that outlives both its token and its module.
//
//	uri, err := hsm.ParseURI("pkcs11:token=kedge;object=issuing?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/kedge/pin")
//	token, err := hsm.Open(hsm.Options{URI: uri, StateDir: "/var/lib/kedge/hsm", Logger: logger})
//	defer token.Close()
//	signer, key, err := token.Find(ctx, certificate.PublicKey)
//	signature, err := signer.Sign(nil, digest, crypto.SHA256)
//
// A module is somebody else's C library. It crashes and hangs the process that loads it, none of its calls can be ended, and it holds the PIN. So it
// lives in a child process, the same program started again, which main hands over to ChildMain before it does anything else:
//
//	if hsm.IsChild(os.Args) {
//		os.Exit(hsm.ChildMain())
//	}
//
// A running child, logged in, with its sessions and key handles, is a generation. Whatever fails and is not the request's own fault ends the
// generation: error codes of modules do not tell what would heal them (docs/hsm.md). One goroutine starts the next one for all who wait; each finds its
// key again by the public key, and asks once more. Every signature is verified before it is returned.
//
// A token that nobody asks for anything is asked now and then whether it is there, so that Problem tells of one that is away before somebody needs it.
//
// A PIN that was refused is not tried again, not even after a restart, until its source changes: tokens lock themselves.
package hsm
