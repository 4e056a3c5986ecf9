// Package vault has a Vault, or an OpenBao, certify and keep the keys of issuing CAs.
//
// OpenClient logs in, and stays logged in. On it stand two things that combine freely with any others:
//
//   - OpenRoot gives a ca.Root over an issuer of the PKI engine. Kedge keeps its issuing key; Vault signs its certificate.
//   - OpenKeyStore gives a ca.KeyStore over the Transit engine. The issuing key is made in Vault, signs in Vault, and never leaves it.
//
// Nothing that Vault answers is taken on trust: a certificate is checked field by field against what was asked for, and every signature is verified.
// None of the three needs Vault to be reachable when it is opened: a CA starts while Vault is sealed, serves what it can, and everything goes on by itself once Vault
// answers. Problem says what is wrong until then. Check asks Vault at once, for whoever sets it up.
//
// The environment variables of Vault's own tools (VAULT_ADDR, VAULT_TOKEN, VAULT_NAMESPACE, VAULT_SKIP_VERIFY …) change nothing here: the options say everything.
// A token and a secret id never reach a log or an error.
package vault
