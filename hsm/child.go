package hsm

import (
	"os"

	"golang.org/x/sys/unix"
)

// childVerb is the argument with which the program is its own child.
const childVerb = "hsm-child"

// The descriptors that the child has besides the three of every program.
const (
	socketDescriptor = 3
	pinDescriptor    = 4 // the reading end of a pipe with the PIN, when that comes from the environment
)

// IsChild says whether the program was started to be the child that a module lives in.
func IsChild(args []string) bool { return len(args) == 2 && args[1] == childVerb }

// KeepOutOfDumps makes sure that no core dump of this process is written and that nobody but root may look into its memory: of parent and child, since a kernel that pipes
// core dumps to a program takes no notice of RLIMIT_CORE.
func KeepOutOfDumps() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return os.NewSyscallError("setrlimit(RLIMIT_CORE)", err)
	}
	return os.NewSyscallError("prctl(PR_SET_DUMPABLE)", unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
}
