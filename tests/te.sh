#!/usr/bin/env bash
# The tests that need Transformer Engine, in an environment of their own: bash tests/te.sh [pytest arguments]
# Its PyTorch extension is compiled first, once: 10 to 30 minutes on two cores and 1.5 GB of memory for each job. Needs a
# C++ compiler and the CUDA toolkit's headers (CUDA_HOME); no GPU. What runs without one is emulated (tests/modules).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/venv.sh
te=2.20.2
python=.venv-te/bin/python
if [[ ! -d "${CUDA_HOME:-/usr/local/cuda}/include" ]]; then
  echo "Transformer Engine cannot be compiled without the CUDA toolkit: install it and set CUDA_HOME." >&2
  exit 1
fi
if [[ ! -f .venv-te/installed ]]; then
  [[ -x "$python" ]] || "$(find_python)" -m venv .venv-te
  "$python" -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test]' ninja
  packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
  headers="$packages/nvidia/cudnn/include:$packages/nvidia/nccl/include:$packages/nvidia/cu13/include"
  # Built here, because setup.py would look for a binary elsewhere; without NCCL's symmetric memory, whose headers torch
  # does not bring.
  CPATH="$headers:$CUDA_HOME/include/cccl" NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 MAX_JOBS="${MAX_JOBS:-2}" \
    "$python" -m pip install --disable-pip-version-check --constraint constraints.txt --no-build-isolation \
    "transformer-engine[core_cu13,pytorch]==$te"
  touch .venv-te/installed
fi
export OMP_NUM_THREADS=1
exec "$python" -m pytest -m te "$@"
