// Package pkcs11 is a root, and a key store, whose keys are in a token (HSM). What keeps them alive is kedge/hsm; what is here says which keys are good enough, and how they are named.
package pkcs11
