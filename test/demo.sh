#!/usr/bin/env bash
# Shows what Kedge does: starts a CA on the embedded default, gets an SVID through the real CSR API over TLS, shows what came and what
# was recorded, stops everything and leaves nothing behind.
set -euo pipefail
kedge=$1
work=$(mktemp -d "${TMPDIR:-/tmp}/kedge-demo.XXXXXX")
pid=
finish() {
  [ -z "$pid" ] || { kill -TERM "$pid" 2>/dev/null && wait "$pid" || true; }
  rm -rf "$work"
}
trap finish EXIT
cd "$work"

say() { if [ -t 1 ]; then printf '\n\033[1m%s\033[0m\n' "$*"; else printf '\n%s\n' "$*"; fi; }

# The default configuration, but for the ports: any that are free, so that the demo gets in nobody's way.
cat > kedge.yaml <<'YAML'
csr: {listen: "127.0.0.1:0"}
operations: {listen: "127.0.0.1:0"}
YAML

say '1. kedge serve: a CA with a root of its own, in an empty folder'
"$kedge" serve --config kedge.yaml > greeting 2> log.json &
pid=$!
for _ in $(seq 100); do
  grep -q '^Next:' greeting && break
  kill -0 "$pid" 2>/dev/null || { cat log.json >&2; exit 1; }
  sleep 0.1
done
sed '/^Next:/d' greeting

say '2. kedge token create: a join token for one workload, signed by the CA itself'
"$kedge" token create --config kedge.yaml --identity ns/default/sa/web --out token

say '3. kedge svid fetch: a key made here, its SVID from the CSR API that istio-agents use, over TLS'
"$kedge" svid fetch --config kedge.yaml --token-file token --out svid

say '4. The chain, as openssl sees it'
openssl verify -CAfile svid/root-cert.pem -untrusted svid/cert-chain.pem svid/cert-chain.pem
openssl x509 -in svid/cert-chain.pem -noout -subject -issuer -serial -dates -ext subjectAltName,keyUsage,extendedKeyUsage,basicConstraints

say '5. What the ledger has of it: recorded before it left'
serial=$(openssl x509 -in svid/cert-chain.pem -noout -serial | cut -d= -f2)
"$kedge" ledger show --config kedge.yaml "$serial"
echo
"$kedge" ledger list --config kedge.yaml
echo
"$kedge" ledger verify --config kedge.yaml

say '6. Who signs, and what verifiers must trust'
"$kedge" authority list --config kedge.yaml
echo
"$kedge" bundle show --config kedge.yaml

say "Stopped, and nothing is left behind. For a CA that stays: $kedge serve"
