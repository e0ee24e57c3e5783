# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's own server, from the package xllamacpp, until its process is ended.

python examples/serving/llama_cpp_server.py runs/tiny.gguf --port 8000

With the binary of llama.cpp: llama-server -m runs/tiny.gguf --jinja --port 8000
"""

import argparse
import signal

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", help="a GGUF file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--context", type=int, default=0, help="tokens of all slots together (default: the model's)")
    parser.add_argument("--slots", type=int, default=1, help="requests at a time")
    parser.add_argument("--threads", type=int, default=0, help="default: llama.cpp's own choice")
    parser.add_argument("--float32", action="store_true", help="attention in float32 too, not in float16")
    options = parser.parse_args()
    settings = xllamacpp.CommonParams()
    settings.model.path = options.file
    settings.hostnames, settings.port = [options.host], options.port
    settings.n_ctx, settings.n_parallel = options.context, options.slots
    settings.use_jinja = True
    if options.float32:
        # The kernel of flash attention rounds to float16, whatever the cache holds.
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if options.threads:
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(settings)
    print(f"listening at {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
