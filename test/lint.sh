#!/usr/bin/env bash
# What a reader may rely on in every file.
set -euo pipefail
cd "$(dirname "$0")/.."
failed=0
complain() { echo "lint: $*" >&2; failed=1; }

unformatted=$(git ls-files --cached --others --exclude-standard '*.go' | xargs -r gofmt -l)
[ -z "$unformatted" ] || complain "run gofmt -w on: $unformatted"

# A test that cannot run fails; it is not passed over. One place decides about that on a developer's machine.
asks=$(git grep -nE '[eE]nv\("CI"\)' -- '*.go' ':!test/machine/' || true)
[ -z "$asks" ] || complain "tests that decide by themselves what CI means:"$'\n'"$asks"
skips=$(git grep -nE '\b[tbf]\.Skip(f|Now)?\(' -- '*_test.go' || true)
[ -z "$skips" ] || complain "tests that skip themselves:"$'\n'"$skips"
sleeps=$(git grep -nE 'time\.Sleep\(' -- '*.go' || true)
[ -z "$sleeps" ] || complain "time.Sleep:"$'\n'"$sleeps"

# ca knows no transport and no vendor; imports point inward.
vendors='"(google\.golang\.org/grpc|istio\.io|github\.com/hashicorp|github\.com/miekg|k8s\.io|net/http|github\.com/prometheus)'
outward=$(git grep -nE "$vendors" -- 'ca/*.go' || true)
[ -z "$outward" ] || complain "ca knows a transport or a vendor:"$'\n'"$outward"
outward=$(git grep -nE '"kedge/(issuer|plugins|hsm|cmd)' -- 'ca/*.go' 'hsm/*.go' ':!*_test.go' || true)
[ -z "$outward" ] || complain "imports that point outward:"$'\n'"$outward"

go vet ./...
go vet -tags e2e,soak ./test/vault ./test/envoy
go -C test/lint tool -n staticcheck >/dev/null
"$(go -C test/lint tool -n staticcheck)" ./...
"$(go -C test/lint tool -n staticcheck)" -tags e2e,soak ./test/vault ./test/envoy
go -C test/istio vet ./...
go -C test/bench/istio vet ./...
go -C test/vault/server vet ./...

# Without cgo everything builds, and what needs a PKCS#11 module says what to do.
nocgo=$(mktemp -d)
trap 'rm -rf "$nocgo"' EXIT
CGO_ENABLED=0 go build -o "$nocgo/kedge" ./cmd/kedge
uri='pkcs11:token=a;object=b?module-path=/m.so'
echo "{dataDir: $nocgo/data, root: {kind: pkcs11, pkcs11: {uri: '$uri', certificateFile: $nocgo/root.pem}}, issuingCA: {keyStore: pkcs11, pkcs11: {uri: '$uri'}}}" >"$nocgo/kedge.yaml"
for arguments in "key list $uri" "config check --config $nocgo/kedge.yaml" "serve --config $nocgo/kedge.yaml"; do
	said=$(timeout 60 "$nocgo/kedge" $arguments 2>&1 || true)
	[[ $said == *'built without cgo'*'build it with CGO_ENABLED=1'* ]] || complain "without cgo 'kedge $arguments' says: $said"
done
[ ! -e "$nocgo/data" ] || complain "without cgo 'kedge serve' makes a data folder before it says so"

go mod verify >/dev/null
go mod tidy -diff
[ $failed = 0 ] && echo "lint: good"
exit $failed
