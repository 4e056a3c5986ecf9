// Package envoys plays very many Envoys, each of which holds one SDS stream for ROOTCA over a TLS connection of its own and acknowledges what it gets.
//
// A server under measurement that is to have more of them than there are descriptors has them in its own process: Serve gives its listener connections
// in memory besides. Their frames are written by hand, so that what is measured is the server.
package envoys
