#!/usr/bin/env bash
# Runs the tests against Istio's real parts with the kedge that is named. The pilot-agent is built once into a cache, Istio's CA server whenever it has changed.
set -euo pipefail
export KEDGE_BIN=$1
cd "$(dirname "$0")"
PILOT_AGENT_BIN=$(./build.sh)
ISTIO_CA_BIN=$PWD/../../bin/istio-ca
go -C ../bench/istio build -trimpath -ldflags '-s -w' -o "$ISTIO_CA_BIN" . # as 'make bench' builds it
BAO_BIN=$(../vault/fetch.sh)
export PILOT_AGENT_BIN ISTIO_CA_BIN BAO_BIN
go test -count=1 -timeout 20m ./...
