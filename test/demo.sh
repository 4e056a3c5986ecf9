#!/usr/bin/env bash
# Shows what Kedge does: starts a CA, gets an SVID through the real CSR API over TLS, shows what came and what was recorded, stops everything and leaves nothing behind.
#   demo.sh KEDGE [file|hsm|vault]
# file (the embedded default) has a root of Kedge's own; hsm has it in a token of SoftHSM, made in a ceremony; vault has it in the PKI engine of an OpenBao server.
set -euo pipefail
kedge=$1
root=${2:-file}
here=$(cd "$(dirname "$0")" && pwd)
case $root in file | hsm | vault) ;; *) echo "demo: ROOT is file, hsm or vault, and not '$root'" >&2; exit 2 ;; esac
# need PACKAGE WHAT installs a Debian package, where that is allowed.
need() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing the Debian package $1, $2"
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq install -y --no-install-recommends "$1" >/dev/null
  else
    echo "demo: the Debian package $1 is missing: apt-get install $1" >&2
    exit 1
  fi
}
case $root in
hsm) [ -e /usr/lib/softhsm/libsofthsm2.so ] || need softhsm2 'an HSM in software' ;;
vault)
  python3 -c 'import ensurepip' 2>/dev/null || need python3-venv 'with which the program of OpenBao is fetched'
  bao=$("$here/vault/fetch.sh") # once, into a cache
  ;;
esac

work=$(mktemp -d "${TMPDIR:-/tmp}/kedge-demo.XXXXXX")
pid=
vault=
finish() {
  for p in $pid $vault; do
    kill -TERM "$p" 2>/dev/null && wait "$p" || true
  done
  rm -rf "$work"
}
trap finish EXIT
cd "$work"
umask 077

step=0
say() {
  step=$((step + 1))
  if [ -t 1 ]; then printf '\n\033[1m%s. %s\033[0m\n' "$step" "$*"; else printf '\n%s. %s\n' "$step" "$*"; fi
}
# The ports are any that are free, so that the demo gets in nobody's way.
ports=(--set csr.listen=127.0.0.1:0 --set operations.listen=127.0.0.1:0)

case $root in
file)
  printf 'csr: {listen: "127.0.0.1:0"}\noperations: {listen: "127.0.0.1:0"}\n' > kedge.yaml
  say 'kedge serve: a CA with a root of its own, in an empty folder'
  ;;
hsm)
  mkdir tokens
  printf 'directories.tokendir = %s/tokens\nobjectstore.backend = file\nlog.level = ERROR\n' "$work" > softhsm2.conf
  export SOFTHSM2_CONF=$work/softhsm2.conf
  head -c 8 /dev/urandom | od -An -tx1 | tr -d ' \n' > pin
  softhsm2-util --init-token --free --label roots --so-pin "$(cat pin)so" --pin "$(cat pin)" >/dev/null
  uri="pkcs11:token=roots;object=mesh?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:$work/pin"
  say 'kedge ceremony: a plan is the whole input; what would be signed, before the key is made'
  "$kedge" ceremony --template root | awk -v uri="$uri" '
    /^purpose:/ { print "purpose: the root of the demo"; next }
    /^operators:/ { print "operators: [you]"; next }
    /^  uri:/ { print "  uri: \"" uri "\""; next }
    /^trustDomain:/ { print "trustDomain: cluster.local"; next }
    { gsub(/commonName: ""/, "commonName: Demo Root"); print }' > plan.yaml
  "$kedge" ceremony plan.yaml --dry-run
  say 'kedge ceremony: the key is made on the token, signs its certificate, and a record is written for the auditor'
  "$kedge" ceremony plan.yaml
  say 'kedge key inspect: what the token says of the key'
  "$kedge" key inspect "$uri"
  say 'kedge init: a configuration, checked against the real token'
  "$kedge" init --root pkcs11 --keys memory --set root.pkcs11.uri="$uri" --set root.pkcs11.certificateFile=root.pem "${ports[@]}"
  say 'kedge serve: the root in the token certifies an issuing CA whose key is in memory'
  ;;
vault)
  # The server takes a port that is free; should somebody else be faster, it takes another.
  for _ in 1 2 3 4 5; do
    port=$((20000 + RANDOM % 20000))
    "$bao" server -dev -dev-root-token-id=demo -dev-listen-address=127.0.0.1:$port > vault.log 2>&1 &
    vault=$!
    export BAO_ADDR=http://127.0.0.1:$port BAO_TOKEN=demo
    for _ in $(seq 100); do
      "$bao" status >/dev/null 2>&1 && break 2
      kill -0 "$vault" 2>/dev/null || break
      sleep 0.1
    done
    vault=
  done
  [ -n "$vault" ] || { cat vault.log >&2; exit 1; }
  say 'An OpenBao server with a root in its PKI engine, and a policy that allows Kedge what it needs'
  "$bao" secrets enable pki
  "$bao" secrets tune -max-lease-ttl=87600h pki
  "$bao" write pki/root/generate/internal common_name='Demo Root' key_type=ec key_bits=256 ttl=87600h max_path_length=1 >/dev/null 2>&1
  "$bao" policy write kedge - <<'HCL'
path "pki/issuer/default"                   { capabilities = ["read"] }
path "pki/issuer/default/sign-intermediate" { capabilities = ["update"] }
HCL
  "$bao" token create -policy=kedge -field=token > vault-token
  say 'kedge init: a configuration, checked against the real server'
  "$kedge" init --root vault --keys memory --set vault.address="$BAO_ADDR" --set vault.login.token=vault-token "${ports[@]}"
  say 'kedge serve: the root in OpenBao certifies an issuing CA whose key is in memory'
  ;;
esac

"$kedge" serve --config kedge.yaml > greeting 2> log.json &
pid=$!
for _ in $(seq 100); do
  grep -q '^Next:' greeting && break
  kill -0 "$pid" 2>/dev/null || { cat log.json >&2; exit 1; }
  sleep 0.1
done
sed '/^Next:/d' greeting

say 'kedge token create: a join token for one workload, signed by the CA itself'
"$kedge" token create --config kedge.yaml --identity ns/default/sa/web --out token

say 'kedge svid fetch: a key made here, its SVID from the CSR API that istio-agents use, over TLS'
"$kedge" svid fetch --config kedge.yaml --token-file token --out svid

say 'The chain, as openssl sees it'
openssl verify -CAfile svid/root-cert.pem -untrusted svid/cert-chain.pem svid/cert-chain.pem
openssl x509 -in svid/cert-chain.pem -noout -subject -issuer -serial -dates -ext subjectAltName,keyUsage,extendedKeyUsage,basicConstraints

say 'What the ledger has of it: recorded before it left'
serial=$(openssl x509 -in svid/cert-chain.pem -noout -serial | cut -d= -f2)
"$kedge" ledger show --config kedge.yaml "$serial"
echo
"$kedge" ledger list --config kedge.yaml
echo
"$kedge" ledger verify --config kedge.yaml

say 'Who signs, and what verifiers must trust'
"$kedge" authority list --config kedge.yaml
echo
"$kedge" bundle show --config kedge.yaml

printf '\nStopped, and nothing is left behind. For a CA that stays: %s serve\n' "$kedge"
