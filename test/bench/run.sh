#!/usr/bin/env bash
# Measures the kedge that is named beside Istio's own CA server, which is built first (five minutes when Go's build cache has nothing of it).
set -euo pipefail
cd "$(dirname "$0")/../.."
go -C test/bench/istio build -trimpath -ldflags '-s -w' -o "$PWD/bin/istio-ca" .
go build -trimpath -o bin/bench ./test/bench
exec bin/bench -kedge "$@"
