package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// cores are the two that are used: one for the server under measurement, one for this process, which makes its load.
type cores struct{ server, generator int }

// findCores takes the last and the first core that this process may use.
func findCores() (cores, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return cores{}, fmt.Errorf("asking for the cores: %w", err)
	}
	c := cores{-1, -1}
	for core := range 64 * len(set) {
		if set.IsSet(core) {
			if c.generator < 0 {
				c.generator = core
			}
			c.server = core
		}
	}
	if c.server == c.generator {
		return c, errors.New("it takes two cores, one for the server and one for the load")
	}
	return c, nil
}

func pin(thread int, on ...int) error {
	var set unix.CPUSet
	for _, core := range on {
		set.Set(core)
	}
	if err := unix.SchedSetaffinity(thread, &set); err != nil {
		return fmt.Errorf("pinning a thread to core %d: %w", on, err)
	}
	return nil
}

// settle moves this process to the generator's core. A new thread is where the one is that makes it.
func (c cores) settle() error {
	runtime.GOMAXPROCS(1)
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, thread := range threads {
		id, err := strconv.Atoi(thread.Name())
		if err != nil {
			return err
		}
		if err := pin(id, c.generator); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// start starts a command on a core, where its threads stay. It is killed when this process ends before it.
func (c cores) start(core int, command *exec.Cmd) error { return startOn(command, core) }

// startOnBoth starts a command that has both cores.
func (c cores) startOnBoth(command *exec.Cmd) error { return startOn(command, c.server, c.generator) }

func startOn(command *exec.Cmd, on ...int) (err error) {
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // a child begins where the thread is that makes it
	defer runtime.UnlockOSThread()
	var before unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return err
	}
	if err := pin(0, on...); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &before)) }()
	return command.Start()
}

// schedClock is CPUCLOCK_SCHED of the kernel's linux/posix-timers_types.h: what the scheduler accounts for, in nanoseconds.
const schedClock = 2

// cpuTime is the CPU time of another process so far, user and system, of all its threads, also of those that ended. It comes from the process's CPU
// clock (clock_getcpuclockid(3)), so that it is exact where /proc/PID/stat counts ticks of 10 ms and /proc/PID/schedstat knows one thread only. What the
// kernel does elsewhere for the process is not in it: writing the ledger's journal, the receiving half of a loopback packet that the generator sent.
func cpuTime(pid int) (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|schedClock), &ts); err != nil {
		return 0, fmt.Errorf("reading the CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// threadCPU is the CPU time of the calling thread.
func threadCPU() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		panic(err) // Linux has it since 2.6.12
	}
	return time.Duration(ts.Nano())
}

// ticksPerSecond is the unit of /proc/stat, USER_HZ, on every platform that Go knows.
const ticksPerSecond = 100

// busy is the time that both cores have spent on anything so far, or on other machines' work, where this one is virtual.
func (c cores) busy() (total time.Duration, err error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 9 || fields[0] != fmt.Sprintf("cpu%d", c.server) && fields[0] != fmt.Sprintf("cpu%d", c.generator) {
			continue
		}
		for _, i := range []int{1, 2, 3, 6, 7, 8} { // user, nice, system, irq, softirq, steal
			ticks, err := strconv.ParseInt(fields[i], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/stat: %q: %w", line, err)
			}
			total += time.Duration(ticks) * time.Second / ticksPerSecond
		}
	}
	return total, nil
}

// own is the CPU time of this process and of those that it started and saw end.
func own() (total time.Duration, err error) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var usage unix.Rusage
		if err := unix.Getrusage(who, &usage); err != nil {
			return 0, err
		}
		total += time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}
	return total, nil
}

// watch returns a function that says how much of both cores others had since watch was called.
func (c cores) watch() (others func() (share float64, err error), err error) {
	at := time.Now()
	read := func() (time.Duration, error) {
		busy, err := c.busy()
		mine, ownErr := own()
		return busy - mine, errors.Join(err, ownErr)
	}
	before, err := read()
	return func() (float64, error) {
		after, err := read()
		return max(0, (after-before).Seconds()/time.Since(at).Seconds()/2), err
	}, err
}

// machine describes where the results come from, without names.
func machine(dir string) (string, error) {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	model := "unknown CPU"
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return "", err
	}
	fileSystem := fmt.Sprintf("file system %#x", fs.Type)
	if fs.Type == unix.EXT4_SUPER_MAGIC {
		fileSystem = "ext4"
	}
	release, _, _ := strings.Cut(unix.ByteSliceToString(name.Release[:]), "-")
	return fmt.Sprintf("Measured on %s: %s, %d cores, Linux %s, the ledger on %s, %s.", time.Now().UTC().Format(time.DateOnly), model, runtime.NumCPU(),
		release, fileSystem, runtime.Version()), nil
}
