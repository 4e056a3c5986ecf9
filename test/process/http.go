package process

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Get asks the operations port for a path.
func (k *Kedge) Get(t testing.TB, path string) (code int, body string) {
	t.Helper()
	code, body, err := Fetch("http://" + k.Status(t).OpsAddress + path)
	if err != nil {
		t.Fatal(err)
	}
	return code, body
}

// Fetch asks for a URL of the operations port, also of a CA that no longer answers its admins.
func Fetch(url string) (int, string, error) {
	client := &http.Client{Timeout: Patience, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), err
}

// Ready waits at most limit until /readyz says so.
func (k *Kedge) Ready(t testing.TB, limit time.Duration) {
	t.Helper()
	url := "http://" + k.Status(t).OpsAddress + "/readyz"
	err := Poll(limit, func() error {
		code, body, err := Fetch(url)
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
	if err != nil {
		t.Fatalf("the CA is not ready: %v", err)
	}
}

// Metrics are the samples of a scrape, each under its name with its labels as Prometheus writes them.
type Metrics map[string]float64

// Metrics scrapes /metrics.
func (k *Kedge) Metrics(t testing.TB) Metrics {
	t.Helper()
	code, body := k.Get(t, "/metrics")
	if code != http.StatusOK {
		t.Fatalf("/metrics: %d %s", code, body)
	}
	samples := Metrics{}
	for lines := bufio.NewScanner(strings.NewReader(body)); lines.Scan(); {
		line := lines.Text()
		if strings.HasPrefix(line, "#") {
			continue
		}
		space := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[space+1:], 64)
		if err != nil {
			t.Fatalf("/metrics: %q: %v", line, err)
		}
		samples[line[:space]] = value
	}
	return samples
}

// Family says whether there is a sample of the name, whatever its labels; a histogram's count counts for it.
func (m Metrics) Family(name string) bool {
	for sample := range m {
		if sample == name || strings.HasPrefix(sample, name+"{") || sample == name+"_count" {
			return true
		}
	}
	return false
}
