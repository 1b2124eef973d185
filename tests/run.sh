#!/usr/bin/env bash
# All tests, in the .venv that the quickstart uses too: bash tests/run.sh [pytest arguments]
# About half an hour on two CPU cores after the installation; tests that need a GPU say so and are skipped without one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/venv.sh
prepare_venv
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest "$@"
