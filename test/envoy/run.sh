#!/usr/bin/env bash
# Runs real Envoys with secrets from the kedge that is named. Envoy is had once, into a cache. With "soak" behind it only what takes minutes is run.
set -euo pipefail
export KEDGE_BIN=$1
cd "$(dirname "$0")"
ENVOY_BIN=$(./fetch.sh)
export ENVOY_BIN
if [ "${2:-}" = soak ]; then
	exec go test -race -count=1 -timeout 20m -tags e2e,soak -v -run TestAMeshMovesToAnotherRoot ./
fi
go test -race -count=1 -parallel 3 -timeout 20m -tags e2e ./ # what runs at once mostly waits for certificates to be renewed
