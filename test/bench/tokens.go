package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
)

// What of a module's own rate should come through kedge/hsm: nearly all where the token is what takes its time, and most of C_Sign plus one verification where the module itself fills the
// processor.
const (
	tokenAim  = 0.9
	moduleAim = 0.8
)

// tokens measures how many signatures of a token come through kedge/hsm, with Go's benchmark of that package, which knows how the tokens are made.
func (b *bench) tokens(ctx context.Context) (string, error) {
	b.progress("tokens: SoftHSM, NSS and a TPM")
	c := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkToken$", "-benchtime", "1x", "-timeout", "20m", "./hsm")
	c.Dir = b.source
	var out, errOut bytes.Buffer
	c.Stdout, c.Stderr = &out, &errOut
	err := b.cores.startOnBoth(c)
	if err == nil {
		err = c.Wait()
	}
	if err != nil {
		return "", fmt.Errorf("measuring tokens: %w: %s%s", err, out.String(), errOut.String())
	}
	t := newTable("Signatures of a token, P-256", "module | sessions | C_Sign alone, 1/s | C_Sign and one verification, 1/s | through kedge/hsm, 1/s | of C_Sign alone | of C_Sign and one verification | "+
		"aim | p99 with twice as many waiting (eight at least), ms | from the child's death to the next signature, ms")
	rows := 0
	scanner := bufio.NewScanner(&out)
	for scanner.Scan() {
		name, found := metrics(scanner.Text())
		if name == "" {
			continue
		}
		rows++
		module, sessions, _ := strings.Cut(name, "/")
		alone, verified, through := found["raw/s"], found["raw+verify/s"], found["through/s"]
		aim := fmt.Sprintf("≥ %.0f %% of C_Sign and one verification: %s", 100*moduleAim, verdict(through >= moduleAim*verified))
		if module == "TPM" {
			aim = fmt.Sprintf("≥ %.0f %% of C_Sign alone: %s", 100*tokenAim, verdict(through >= tokenAim*alone))
		}
		t.row("%s | %s | %.0f | %.0f | %.0f | %.0f %% | %.0f %% | %s | %.1f | %.0f", module, sessions, alone, verified, through, 100*through/alone, 100*through/verified, aim,
			found["p99-ms"], found["recovery-ms"])
	}
	if rows == 0 {
		return "", errors.New("measuring tokens: the benchmark printed no result")
	}
	return t.String(), nil
}

// metrics reads a line of Go's benchmarks: the name below Benchmark…/ without the number of processors, and the numbers by their units.
func metrics(line string) (name string, found map[string]float64) {
	fields := strings.Fields(line)
	if len(fields) < 4 || !strings.HasPrefix(fields[0], "BenchmarkToken/") {
		return "", nil
	}
	name = strings.TrimPrefix(fields[0], "BenchmarkToken/")
	if i := strings.LastIndex(name, "-"); i > 0 {
		name = name[:i]
	}
	found = map[string]float64{}
	for i := 2; i+1 < len(fields); i += 2 {
		if n, err := strconv.ParseFloat(fields[i], 64); err == nil {
			found[fields[i+1]] = n
		}
	}
	return name, found
}
