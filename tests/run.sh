#!/usr/bin/env bash
# All tests, in the .venv that the quickstart uses too: bash tests/run.sh [--quick] [pytest arguments]
# About a quarter of an hour on two CPU cores after the installation; --quick takes a minute, from every room. What needs a GPU
# or Transformer Engine is skipped without it, and the last line says how much that was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/venv.sh
prepare_venv
export OMP_NUM_THREADS=1
# Two processes, each with whole files; a later "-n 0" among the arguments runs everything in one. tests/conftest.py sets
# the order, which xdist would otherwise replace by the number of tests.
exec .venv/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder "$@"
