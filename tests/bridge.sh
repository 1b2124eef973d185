#!/usr/bin/env bash
# The tests with the real Megatron-Bridge: bash tests/bridge.sh [pytest arguments]
# It has an environment of its own, .venv-bridge, with an older transformers than .venv's; what both can share is that of
# .venv. Of what Bridge asks for, only what a conversion imports is installed. Transformer Engine is not: Bridge merely
# mentions it, and gets a stand-in (tests/checkpoint/transformer_engine_stub.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/venv.sh
bridge=0.6.2
prepare_venv
environment=.venv-bridge python=.venv-bridge/bin/python
if [[ ! -f "$environment/installed" ]]; then
  .venv/bin/python -m venv "$environment"
  packages='import sysconfig; print(sysconfig.get_paths()["purelib"])'
  echo "import site; site.addsitedir('$(.venv/bin/python -c "$packages")')" >"$("$python" -c "$packages")/shared.pth"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps "megatron-bridge==$bridge"
  # nvidia-modelopt for save_hf_pretrained, megatron-energon for import_ckpt and export_ckpt.
  "$python" -m pip install --quiet --disable-pip-version-check \
    "transformers==5.12.1" nvidia-modelopt megatron-energon
  touch "$environment/installed"
fi
# Without it every test would be skipped, which looks like a success.
"$python" -c 'import importlib.util as util; assert util.find_spec("megatron.bridge"), "Megatron-Bridge is not there"'
export OMP_NUM_THREADS=1
exec "$python" -m pytest tests/checkpoint/test_bridge.py "$@"
