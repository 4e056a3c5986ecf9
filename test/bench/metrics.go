package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
)

// commits is what Kedge says of the ledger's commits.
type commits struct{ seconds, events histogram }

// since is what came since before.
func (c commits) since(before commits) commits {
	return commits{c.seconds.since(before.seconds), c.events.since(before.events)}
}

// histogram is one of Prometheus.
type histogram struct {
	bounds []float64 // upper ones, the last of them infinite
	counts []float64 // up to each bound, cumulative
	sum    float64
}

func (h histogram) since(before histogram) histogram {
	d := histogram{bounds: h.bounds, counts: append([]float64(nil), h.counts...), sum: h.sum - before.sum}
	for i := range before.counts {
		d.counts[i] -= before.counts[i]
	}
	return d
}

func (h histogram) mean() float64 {
	if len(h.counts) == 0 {
		return 0
	}
	return h.sum / h.counts[len(h.counts)-1]
}

// quantile interpolates within a bucket, as Prometheus does.
func (h histogram) quantile(q float64) float64 {
	if len(h.counts) == 0 {
		return 0
	}
	wanted := q * h.counts[len(h.counts)-1]
	var low, below float64
	for i, bound := range h.bounds {
		if h.counts[i] >= wanted {
			if math.IsInf(bound, 1) {
				return low
			}
			return low + (bound-low)*(wanted-below)/max(h.counts[i]-below, 1)
		}
		low, below = bound, h.counts[i]
	}
	return low
}

// scrape reads /metrics.
func (s *server) scrape(ctx context.Context) (io.ReadCloser, error) {
	ask, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.operations+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	response, err := http.DefaultClient.Do(ask)
	if err != nil {
		return nil, err
	}
	return response.Body, nil
}

// commits are those so far.
func (s *server) commits(ctx context.Context) (c commits, err error) {
	body, err := s.scrape(ctx)
	if err != nil {
		return c, err
	}
	defer body.Close()
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		for name, h := range map[string]*histogram{"kedge_ledger_commit_duration_seconds": &c.seconds, "kedge_ledger_commit_events": &c.events} {
			rest, ok := strings.CutPrefix(lines.Text(), name)
			if !ok {
				continue
			}
			if err := h.read(rest); err != nil {
				return c, fmt.Errorf("/metrics: %q: %w", lines.Text(), err)
			}
		}
	}
	return c, lines.Err()
}

// read takes up a sample of the histogram: what stands behind its name.
func (h *histogram) read(sample string) error {
	space := strings.LastIndexByte(sample, ' ')
	if space < 0 {
		return fmt.Errorf("a sample has no value")
	}
	value, err := strconv.ParseFloat(sample[space+1:], 64)
	if err != nil {
		return err
	}
	if sample[:space] == "_sum" {
		h.sum = value
	}
	label, ok := strings.CutPrefix(sample[:space], `_bucket{le="`)
	if !ok {
		return nil
	}
	bound, err := strconv.ParseFloat(strings.TrimSuffix(label, `"}`), 64)
	if err != nil {
		return err
	}
	h.bounds, h.counts = append(h.bounds, bound), append(h.counts, value)
	return nil
}
