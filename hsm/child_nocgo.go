//go:build !cgo

package hsm

import (
	"errors"
	"fmt"
	"os"
)

var errNoCgo = errors.New("this program was built without cgo, and PKCS#11 modules are C libraries: build it with CGO_ENABLED=1 and a C compiler ('make build' does)")

// ChildMain says what to do: without cgo no module can be loaded.
func ChildMain() int {
	fmt.Fprintln(os.Stderr, "hsm:", errNoCgo)
	return 1
}

// Supported says whether this program can load a module.
func Supported() error { return errNoCgo }
