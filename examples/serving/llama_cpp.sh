#!/usr/bin/env bash
# llama.cpp: examples/serving/llama_cpp.sh runs/tiny [--port 8000 …]. Further flags go to llama_cpp_server.py.
# The converted file is put into $GGUF, or beside the checkpoint, and made again if it is there.
set -eu
checkpoint=${1%/}
shift
file=${GGUF:-$checkpoint.gguf}
python "$(dirname "$0")/convert_to_gguf.py" "$checkpoint" --outfile "$file" --outtype "${OUTTYPE:-auto}"
exec python "$(dirname "$0")/llama_cpp_server.py" "$file" "$@"
