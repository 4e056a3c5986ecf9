// Package contracttest holds one test suite for each of ca's seams. Every implementation runs it, and adds only the tests of
// what is its own:
//
//	func TestContract(t *testing.T) {
//		contracttest.Root(t, func(t *testing.T) ca.Root { … })
//	}
package contracttest
