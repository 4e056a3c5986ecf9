#!/usr/bin/env bash
# Runs the tests of plugins/vault, and of the kedge that is named, against the real Vault core and the real OpenBao. Both are had once, into a cache.
set -euo pipefail
export KEDGE_BIN=$1
cd "$(dirname "$0")"
VAULT_BIN=$(./build.sh)
BAO_BIN=$(./fetch.sh)
export VAULT_BIN BAO_BIN
go test -race -count=1 -parallel 12 -timeout 20m -tags e2e ./ # what runs at once mostly waits
