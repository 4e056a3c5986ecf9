#!/bin/sh
# Builds the core of Vault that ./server is into a cache folder, unless it is there already, and prints its path. A cold build takes three CPU-minutes; the cache is keyed by
# its sources.
set -eu
cd "$(dirname "$0")/server"
cache=${KEDGE_CACHE:-$HOME/.cache/kedge}

key=$(cat main.go go.mod go.sum | sha256sum | cut -c1-16)-$(go env GOVERSION GOOS GOARCH | tr '\n' '-' | sed 's/-$//')
vault=$cache/vault/server-$key
if [ ! -x "$vault" ]; then
	mkdir -p "$cache/vault"
	new=$(mktemp "$cache/vault/.new.XXXXXX")
	trap 'rm -f "$new"' EXIT
	echo "building Vault's core, which takes some minutes the first time" >&2
	go build -mod=readonly -ldflags '-s -w' -o "$new" . >&2
	chmod 755 "$new"
	mv "$new" "$vault"
fi
echo "$vault"
