#!/usr/bin/env bash
# SGLang, from its documentation; not run: examples/serving/sglang.sh runs/tiny [--port 8000 …].
set -eu
checkpoint=$1
shift
exec python -m sglang.launch_server --model-path "$checkpoint" --reasoning-parser qwen3 "$@"
