#!/bin/sh
# Builds the pilot-agent of this module's Istio into a cache folder, unless it is there already, and prints its path.
# A cold build takes two CPU-minutes; the cache is keyed by go.mod and go.sum, so a new Istio is a new build.
set -eu
cd "$(dirname "$0")"
key=$(cat go.mod go.sum | sha256sum | cut -c1-16)-$(go env GOVERSION GOOS GOARCH | tr '\n' '-' | sed 's/-$//')
dir=${KEDGE_CACHE:-$HOME/.cache/kedge}/pilot-agent
bin=$dir/pilot-agent-$key
if [ ! -x "$bin" ]; then
	mkdir -p "$dir"
	new=$(mktemp "$dir/.new.XXXXXX")
	trap 'rm -f "$new"' EXIT
	echo "building pilot-agent, which takes some minutes the first time" >&2
	go build -ldflags '-s -w' -o "$new" istio.io/istio/pilot/cmd/pilot-agent >&2
	chmod 755 "$new"
	mv "$new" "$bin"
fi
echo "$bin"
