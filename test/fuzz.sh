#!/usr/bin/env bash
# Runs every fuzz target of the module for a short, fixed number of inputs (KEDGE_FUZZ_TIME, in go test's -fuzztime form).
set -euo pipefail
cd "$(dirname "$0")/.."
count=${KEDGE_FUZZ_TIME:-1000x}
found=0
while IFS=: read -r file line; do
  target=$(sed -E 's/^func (Fuzz[A-Za-z0-9_]*)\(.*/\1/' <<<"$line")
  found=$((found + 1))
  go test -run '^$' -fuzz "^$target\$" -fuzztime "$count" -fuzzminimizetime 1x "./$(dirname "$file")" >/tmp/kedge-fuzz.$$ 2>&1 ||
    { cat /tmp/kedge-fuzz.$$; rm -f /tmp/kedge-fuzz.$$; echo "fuzz: $target in $(dirname "$file") failed" >&2; exit 1; }
done < <(git ls-files --cached --others --exclude-standard '*_test.go' ':!test/istio' | xargs grep -HoE '^func Fuzz[A-Za-z0-9_]*\(.*')
rm -f /tmp/kedge-fuzz.$$
[ "$found" -gt 0 ] || { echo "fuzz: no target was found" >&2; exit 1; }
echo "fuzz: $found targets, $count inputs each"
