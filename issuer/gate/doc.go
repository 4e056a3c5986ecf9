// Package gate stands between the network and the doors. It makes a crowd drain at full speed, in turn, and keeps one caller from standing in
// the way of the others: connections, handshakes and calls wait in cheap queues, in which peers take turns, and refusing is the last resort.
//
// Wrap the port's listener with Listener and its credentials with Credentials; let the server's statistics handler be Stats and its interceptors
// UnaryInterceptor and StreamInterceptor, so that it is known which requests are arriving and which connections are idle; and let a door Enter before
// it does anything dear for a call.
//
// A peer is an IPv4 address, or the /64 of an IPv6 one. Shares are dynamic: of whatever is limited, a peer may have as much as is still free. So
// one peer alone may use half of all, many share alike, and somebody new always finds room.
package gate
