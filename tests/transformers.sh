#!/usr/bin/env bash
# The tests of the Hugging Face model with other versions of transformers: bash tests/transformers.sh VERSION...
# pyproject.toml allows what passed here. Each version has an environment of its own, with what it asks for; everything
# else is that of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/venv.sh
if (($# == 0)); then
  echo "no version: give some, as in bash tests/transformers.sh 5.8.0 5.24.0" >&2
  exit 2
fi
prepare_venv
export OMP_NUM_THREADS=1
for version in "$@"; do
  environment=.venv-transformers/$version
  if [[ ! -f "$environment/installed" ]]; then
    .venv/bin/python -m venv "$environment"
    packages='import sysconfig; print(sysconfig.get_paths()["purelib"])'
    echo "import site; site.addsitedir('$(.venv/bin/python -c "$packages")')" >"$("$environment/bin/python" -c "$packages")/shared.pth"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "transformers==$version"
    touch "$environment/installed"
  fi
  "$environment/bin/python" -c "import transformers; print('[transformers ' + transformers.__version__ + ']')"
  "$environment/bin/python" -m pytest tests/hf
done
