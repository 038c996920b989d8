#!/usr/bin/env bash
# One NVIDIA GPU: equality, speed and memory of QLoRA and LoRA at Mistral-7B's sizes, with random weights and no network.
# Ends within nine minutes with a table, and writes benchmarks/results_gpu.json.
#
#   benchmarks/gpu.sh                       on a GPU
#   benchmarks/gpu.sh --parts qlora by_k    some parts
#   benchmarks/gpu.sh --device cpu          a rehearsal at a tiny size
#   WHEELS=folder benchmarks/gpu.sh         where packages are missing: installs them from there, beside the machine's torch
#
# Needs a torch (2.11 or newer) with CUDA, and these wheels, of the versions in requirements.lock:
wheels=(transformers tokenizers huggingface_hub safetensors regex trl peft accelerate datasets pyarrow dill multiprocess
  xxhash bitsandbytes matplotlib Jinja2 PyYAML)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ -n "${WHEELS:-}" ]; then
  "$python" -m venv --system-site-packages "${TMPDIR:-/tmp}/gpu-venv"
  python=${TMPDIR:-/tmp}/gpu-venv/bin/python
  "$python" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "${wheels[@]}"
  # Rows are text in Mistral's own tokens where these are there, else in SmolLM2's.
  "$python" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" mistral_common sentencepiece || true
fi
export PYTHONPATH="$PWD/trl/src:$PWD/alignment-handbook/src:$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec timeout 540 "$python" -m benchmarks.gpu "$@"
