#!/usr/bin/env bash
# Installs the small Debian packages that the tests use, if they are missing and this user may install them. In make test they are: openssl and strace, and the PKCS#11 modules that keys
# are tested in (SoftHSM, NSS, a software TPM with its resource manager, opencryptoki).
set -euo pipefail
lib=/usr/lib/$(uname -m)-linux-gnu
missing=()
while read -r package file; do
  [ -e "$file" ] || missing+=("$package")
done <<FILES
openssl /usr/bin/openssl
strace /usr/bin/strace
softhsm2 /usr/lib/softhsm/libsofthsm2.so
libnss3 $lib/libsoftokn3.so
libnss3-tools /usr/bin/certutil
libtpm2-pkcs11-1 $lib/pkcs11/libtpm2_pkcs11.so
swtpm /usr/bin/swtpm
tpm2-tools /usr/bin/tpm2_getcap
tpm2-abrmd /usr/sbin/tpm2-abrmd
libtss2-tcti-swtpm0 $lib/libtss2-tcti-swtpm.so.0
libtss2-tcti-tabrmd0 $lib/libtss2-tcti-tabrmd.so.0
dbus /usr/bin/dbus-daemon
opensc /usr/bin/pkcs11-tool
opencryptoki /usr/sbin/pkcsslotd
procps /usr/bin/pgrep
FILES
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing what the tests need: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get -o DPkg::Lock::Timeout=300 -qq update
  apt-get -o DPkg::Lock::Timeout=300 -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "the tests need these Debian packages: ${missing[*]}. Install them: apt-get install ${missing[*]}" >&2
  exit 1
fi
