#!/usr/bin/env bash
# Starts one node of a recipe's run; the same line on every node:
#   bash torchrun.sh RECIPE [key=value ...] [--baseline] [--shrink F] [--rdzv-endpoint HOST:PORT] [--dry-run] [-- FLAGS]
# One node needs no --rdzv-endpoint. VWN_PYTHON names another interpreter than the .venv of this checkout, or python3.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${VWN_PYTHON:-$here/../../.venv/bin/python}
[[ -n "${VWN_PYTHON:-}" || -x "$python" ]] || python=python3
exec "$python" "$here/torchrun.py" "$@"
