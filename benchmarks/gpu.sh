#!/usr/bin/env bash
# One NVIDIA GPU: equality, speed and memory of QLoRA and LoRA at Mistral-7B's sizes, with random weights and no network.
# Ends within nine minutes with a table, and writes benchmarks/results_gpu.json.
#
#   benchmarks/gpu.sh                       on a GPU
#   benchmarks/gpu.sh --parts qlora by_k    some parts
#   benchmarks/gpu.sh --layers 2            a rehearsal on a GPU: two decoder layers in place of 32
#   benchmarks/gpu.sh --device cpu          a rehearsal at a tiny size
#   PYTHONPATH=folder benchmarks/gpu.sh     where packages are missing: a folder from `pip install --no-deps --target`
#
# Needs torch 2.11 or newer with CUDA. Of the versions in requirements.lock: transformers, trl, peft, datasets, dill,
# multiprocess and bitsandbytes (of whose libraries only that of torch's CUDA is used). Of any that fit those: accelerate,
# tokenizers, huggingface_hub, pyarrow, pandas, xxhash, matplotlib, Jinja2. Rows are text in Mistral's own tokens where
# mistral_common and sentencepiece are there, else in SmolLM2's.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD/trl/src:$PWD/alignment-handbook/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec timeout 560 "$python" -m benchmarks.gpu "$@"
