#!/usr/bin/env bash
# transformers: examples/serving/transformers.sh runs/tiny [--port 8000 …]. Further flags go to the server.
set -eu
checkpoint=$1
shift
exec transformers serve "$checkpoint" "$@"
