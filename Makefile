# Two commands: 'make demo' shows what Kedge does, 'make test' tests it. 'make help' lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -X main.version=0.1.0-$(VERSION)
BIN     := $(CURDIR)/bin/kedge
GOTEST  := go test -race -timeout 14m

.PHONY: help build demo test fuzz e2e crash soak lint docs bench clean packages

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

build: ## build bin/kedge
	@mkdir -p bin
	go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN) ./cmd/kedge

demo: build ## start a CA, get an SVID through the CSR API, show it, leave nothing behind; with ROOT=hsm or ROOT=vault under a root that is elsewhere
	@test/demo.sh $(BIN) $(or $(ROOT),file)

packages: ## install the Debian packages that the tests need, when that is possible
	@test/packages.sh

test: packages build ## everything that needs only Go and small Debian packages
	KEDGE_BIN=$(BIN) $(GOTEST) ./...
	@test/fuzz.sh

fuzz: ## every fuzz target for a while: make fuzz KEDGE_FUZZ_TIME=1m
	@test/fuzz.sh

e2e: build ## against the real istio-agent and Istio's own client libraries, real servers of Vault and OpenBao, and real Envoys
	@test/istio/run.sh $(BIN)
	@test/vault/run.sh $(BIN)
	@test/envoy/run.sh $(BIN)

crash: packages build ## kill -9 under load a thousand times, cut the power a thousand times: an hour; KEDGE_KILLS, KEDGE_CUTS
	KEDGE_BIN=$(BIN) KEDGE_KILLS=$${KEDGE_KILLS:-1000} KEDGE_CUTS=$${KEDGE_CUTS:-1000} go test -race -count=1 -timeout 5h -v -run 'KillNine|PowerCut' ./test/crash/

soak: build ## half the peak for an hour, with rotation, pruning and restarts: nothing goes on growing; and two Envoys while a mesh moves to another root; KEDGE_SOAK=10m ('make test' has 20 s of it)
	KEDGE_BIN=$(BIN) KEDGE_SOAK=$${KEDGE_SOAK:-1h} go test -count=1 -timeout 4h -v -run TestSoak ./test/crash/
	@test/envoy/run.sh $(BIN) soak

lint: ## formatting, vet, staticcheck, and that every page and generated file is up to date
	@test/lint.sh

docs: ## write docs/configuration.md anew from the comments in the code
	go run ./cmd/kedge/config/gendocs

bench: packages build ## what a certificate costs, beside Istio's CA: writes docs/benchmarks.md; less of it with make bench BENCH=-quick
	@test/bench/run.sh $(BIN) $(or $(BENCH),-out docs/benchmarks.md)

clean: ## remove what was built
	rm -rf bin
