package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// ledgerSize is a CA with a ledger of some size.
type ledgerSize struct {
	name         string
	dir          string
	records      uint64
	octets       int64
	certificates []*tls.Certificate
	cost         map[string]*sample // µs of CPU time, by scenario
	ratio        map[string]*sample // to the first of them, in the same round
	perCommit    sample             // records, with tokens
}

// herdSecond is how many certificates a CA issues in a second when a whole mesh asks at once.
const herdSecond = 3000

// sizes measures whether a certificate costs more when the ledger is large, or was.
func (b *bench) sizes(ctx context.Context) (string, error) {
	small := &ledgerSize{name: "small", records: smallLedger}
	large := &ledgerSize{name: "large", records: uint64(b.live)}
	pruned := &ledgerSize{name: "large, and then pruned"}
	crowded := &ledgerSize{name: fmt.Sprintf("small, the callers' own certificates in a second with %d others", herdSecond), records: smallLedger + herdSecond}
	all := []*ledgerSize{small, large, pruned, crowded}
	for i, size := range all {
		size.dir = filepath.Join(b.dir, fmt.Sprintf("ledger-%d", i))
		size.cost, size.ratio = map[string]*sample{}, map[string]*sample{}
		for _, sc := range []scenario{byToken, byCertificate} {
			size.cost[sc.name], size.ratio[sc.name] = &sample{}, &sample{}
		}
	}
	b.progress("filling a ledger with %d records", b.live)
	var err error
	for size, others := range map[*ledgerSize]int{small: 0, large: 0, crowded: herdSecond} {
		if size.certificates, err = fill(ctx, dataFolder(size.dir), int(size.records)-others, others); err != nil {
			return "", err
		}
	}
	b.progress("pruning a copy of it")
	if out, err := exec.CommandContext(ctx, "cp", "-a", large.dir, pruned.dir).CombinedOutput(); err != nil {
		return "", fmt.Errorf("copying a ledger: %w: %s", err, out)
	}
	pruned.certificates = large.certificates
	if pruned.records, err = prune(ctx, dataFolder(pruned.dir)); err != nil {
		return "", err
	}
	for _, size := range all {
		info, err := os.Stat(filepath.Join(dataFolder(size.dir), "ledger.db"))
		if err != nil {
			return "", err
		}
		size.octets = info.Size()
	}
	for round := range b.rounds {
		b.progress("cost by the size of the ledger: round %d of %d", round+1, b.rounds)
		if err := b.sizeRound(ctx, round, all); err != nil {
			return "", err
		}
	}
	return sizeTable(all), nil
}

func (b *bench) sizeRound(ctx context.Context, round int, all []*ledgerSize) (err error) {
	servers := make([]*server, len(all))
	for i, size := range all {
		if servers[i], err = b.startKedge(ctx, b.kedge, size.dir); err != nil {
			return err
		}
		defer stopped(servers[i], &err)
	}
	b.crowd.used = mark{}
	for _, sc := range []scenario{byToken, byCertificate} {
		used := b.crowd.used
		costs := make([]float64, len(all))
		for turn := range all {
			i := (turn + round) % len(all)
			b.crowd.used = used
			m, err := b.costOf(ctx, servers[i], sc, keyP256, all[i].certificates)
			if err != nil {
				return err
			}
			costs[i] = m.cpu
			if !sc.certificates {
				all[i].perCommit.add(m.commits.events.mean())
			}
		}
		for i, size := range all {
			size.cost[sc.name].add(costs[i])
			size.ratio[sc.name].add(costs[i] / costs[0])
		}
	}
	return nil
}
