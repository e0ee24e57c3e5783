#!/usr/bin/env bash
# vLLM: examples/serving/vllm.sh runs/tiny [--port 8000 …]. Further flags go to the server.
# `vllm serve` is the same command; the builds for CPUs have only this form of it.
set -eu
checkpoint=$1
shift
exec python -m vllm.entrypoints.openai.api_server --model "$checkpoint" --reasoning-parser qwen3 \
	--enable-auto-tool-choice --tool-call-parser hermes "$@"
