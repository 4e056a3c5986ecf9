#!/usr/bin/env bash
# Runs the tests against Istio's real parts with the kedge that is named. The pilot-agent is built once into a cache.
set -euo pipefail
export KEDGE_BIN=$1
cd "$(dirname "$0")"
PILOT_AGENT_BIN=$(./build.sh)
BAO_BIN=$(../vault/fetch.sh)
export PILOT_AGENT_BIN BAO_BIN
go test -count=1 -timeout 20m ./...
