#!/usr/bin/env bash
# The tests with the oldest or the newest versions that pyproject.toml allows:  bash tests/versions.sh oldest|newest
# Installs torch (with its triton), transformers, megatron-core and hyper-connections into an environment of its own,
# .venv-oldest or .venv-newest (several GB), and runs there the quick tests, the kernels in Triton's interpreter, the CPU
# emulation and the Hugging Face tests. What passes is what pyproject.toml may declare.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/venv.sh

which=${1:-}
if [[ "$which" != oldest && "$which" != newest ]]; then
  echo "usage: bash tests/versions.sh oldest|newest" >&2
  exit 2
fi
folder=.venv-$which
python=$folder/bin/python
[[ -x "$python" ]] || "$(find_python)" -m venv "$folder"

# Lower bounds of pyproject.toml as exact versions; the newest are what pip takes by itself.
constraints=$folder/constraints.txt
: >"$constraints"
if [[ "$which" == oldest ]]; then
  "$python" - >"$constraints" <<'PYTHON'
import re, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
for requirement in wanted:
    found = re.match(r"(torch|transformers|megatron-core|hyper-connections)(\[\w+\])?>=([\d.]+)", requirement)
    if found:
        print(f"{found[1]}=={found[3]}")
PYTHON
fi
"$python" -m pip install --quiet --disable-pip-version-check --upgrade --constraint "$constraints" --editable '.[train,data,study]' \
  hyper-connections psutil pytest pytest-xdist setuptools wheel
"$python" -m pip check
"$python" -m pip list --format freeze | grep -iE '^(torch|triton|transformers|megatron-core|hyper-connections|numpy)=='

export OMP_NUM_THREADS=1
status=0
# What is missing there (DALI, lm-eval, linters) belongs to no file of these; each part runs although another failed.
"$python" -m pytest -q --quick tests || status=1
"$python" -m pytest -q tests/ops tests/cpu tests/hf tests/megatron_fixes tests/training/test_versions.py || status=1
exit "$status"
